"""Spoil valid documents: by their structure, by their bytes, or by hostile pieces of text.

Everything is decided by a ``random.Random``, so a case is known by its seed, and Hypothesis can
drive the same mutators by lending its own.
"""

import json
import struct
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

__all__ = ["FRAGMENTS", "Mutator", "mutate_json", "mutate_tensors", "mutate_text"]

Mutator = Callable[[bytes, Random], bytes]

FRAGMENTS: Sequence[str] = (
    *("", " ", "\n", "\t", "\r\n", "\x00", "\x07", "\x1b[31m", "\x7f", "\x85", "\ufeff"),
    *("\ud800", "\udfff", "\ud83d", "\ufffe", "\uffff", "\U0010ffff", "\U000e0001"),
    *("\u202e", "\u2066", "\u2069", "\u200b", "\u200d", "\u2060", "\u00ad", "\u0301" * 40),
    *("{text}", "{question}", "{0}", "{", "}", "{{", "%s", "%n", "${x}", "{text!r}"),
    *("<|unk|>", "<|start|>", "<|end|>", "<|im_start|>", "<|im_end|>", "</s>", "<pad>", "[INST]"),
    *("../../etc/passwd", "/etc/passwd", "..\\..", "a/../b", ".", "..", "~", "CON", "a" * 300),
    *("\u0130", "\u00df", "\ufb01", "\u1e9e", "\u3000", "\u2028", "\u2029", "1", "-0", "NaN"),
    *("'; DROP TABLE x; --", "<script>", "A" * 5000, "\u00e9" * 3000, "\U0001f468\u200d\U0001f469"),
    *("topics", "topics:3f9a00112233", "topics@prod", "@", ":", "topics:", ":x", "quiz"),
)
"""Texts that have broken something somewhere."""

_RAW = (
    *("1e999", "-1e999", "9" * 5000, "-0", "1E400", "NaN", "Infinity", "-Infinity", "1e-400"),
    *("[" * 5000 + "]" * 5000, '{"a":' * 900 + "1" + "}" * 900, '"\\ud800"', '"\\u0000"', "01"),
    *("+1", "true", "tru", "'x'", "/*x*/1", "1,", '"a" "b"', "\\", '"\\x41"'),
)
_NUMBERS = (
    *(0, 1, -1, 2, 26, 27, 63, 64, 65, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63),
    *(2**64, 10**30, -(2**63), 0.5, -0.5, 1.0, 1.5, 1e-320, 1e308, -1e308),
)
_MARK = "\ue000raw%d\ue001"


def mutate_json(document: bytes, draw: Random) -> bytes:
    """Return a JSON document changed in structure, in one to four places, or in bytes."""
    if draw.random() < 0.2:
        return mutate_bytes(document, draw)
    try:
        tree = json.loads(document)
    except (ValueError, RecursionError):
        return mutate_bytes(document, draw)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        tree = _change(tree, draw)
    return _write(tree, draw)


def mutate_text(text: bytes, draw: Random) -> bytes:
    """Return a text with fragments put in, repeated or cut; lone surrogates are kept as bytes."""
    found = text.decode("utf-8", "surrogatepass")
    for _ in range(draw.randint(1, 4)):
        place = draw.randint(0, len(found))
        piece = draw.choice(FRAGMENTS)
        if draw.random() < 0.1:
            piece = (piece or "x") * draw.choice((2, 50, 3000))
        cut = draw.choice((0, 0, 0, 1, 7, len(found)))
        found = (found[:place] + piece + found[place + cut :])[:65_536]
    return found.encode("utf-8", "surrogatepass")


def mutate_bytes(content: bytes, draw: Random) -> bytes:
    """Return bytes with a few of them flipped, cut out, doubled, swapped or put in."""
    found = bytearray(content)
    for _ in range(draw.randint(1, 6)):
        start = draw.randint(0, len(found))
        end = min(len(found), start + draw.choice((1, 1, 2, 4, 16, 200)))
        kind = draw.randrange(5)
        if kind == 0 and end > start:
            found[start] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del found[start:end]
        elif kind == 2:
            found[start:start] = found[start:end] * draw.choice((1, 2, 30))
        elif kind == 3:
            found[start:end] = bytes(draw.randrange(256) for _ in range(end - start))
        else:
            found[start:start] = draw.choice(FRAGMENTS).encode("utf-8", "surrogatepass")
    return bytes(found)


def mutate_tensors(content: bytes, draw: Random) -> bytes:
    """Return a safetensors file whose header lies: of offsets, shapes, types, names, its length."""
    if draw.random() < 0.2 or len(content) < 8:
        return mutate_bytes(content, draw)
    (size,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + size], content[8 + size :]
    try:
        entries = json.loads(header)
    except (ValueError, RecursionError):
        return mutate_bytes(content, draw)
    if isinstance(entries, dict) and entries and draw.random() < 0.7:
        _lie(entries, draw, len(data))
        changed = _write(entries, draw)
    else:
        changed = mutate_json(header, draw)
    announced = len(changed)
    if draw.random() < 0.15:
        announced = draw.choice((0, 1, len(changed) - 1, len(changed) + 1, 2**31, 2**63, 2**64 - 1))
    if draw.random() < 0.15:
        data = data[: draw.randint(0, len(data))] + b"\xff" * draw.choice((0, 1, 64))
    return struct.pack("<Q", max(0, announced)) + changed + data


def _lie(entries: dict[str, Any], draw: Random, size: int) -> None:
    """Change one entry of a tensor header as an attacker would."""
    name = draw.choice(list(entries))
    entry = entries[name]
    far = draw.choice((0, 1, size, size + 1, size * 2, 2**31, 2**53, 2**63, 2**64 - 1, -1))
    kind = draw.randrange(6)
    if kind == 0:
        entries[draw.choice(FRAGMENTS)] = entry
    elif kind == 1:
        entries["__metadata__"] = {draw.choice(FRAGMENTS): draw.choice(FRAGMENTS)}
    elif not isinstance(entry, dict):
        entries[name] = draw.choice(_NUMBERS)
    elif kind == 2:
        entry["dtype"] = draw.choice(
            ("F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "", "i8")
        )
    elif kind == 3:
        entry["shape"] = draw.choice(([], [0], [far], [far, far], [2**32, 2**32], [1] * 5000, [-1]))
    elif kind == 4:
        entry["data_offsets"] = draw.choice(([0, far], [far, 0], [far, far], [0], [], [far] * 3))
    elif entry:
        del entry[draw.choice(list(entry))]


def _change(tree: Any, draw: Random) -> Any:
    """Return a tree with one place in it changed; a deep tree is entered at random."""
    if isinstance(tree, dict) and tree and draw.random() < 0.85:
        return _change_object(tree, draw)
    if isinstance(tree, list) and tree and draw.random() < 0.85:
        return _change_list(tree, draw)
    return _replaced(tree, draw)


def _change_object(tree: dict[str, Any], draw: Random) -> dict[str, Any]:
    key = draw.choice(list(tree))
    kind = draw.randrange(8)
    if kind == 0:
        return {name: value for name, value in tree.items() if name != key}
    if kind == 1:
        return {(draw.choice(FRAGMENTS) if k == key else k): v for k, v in tree.items()}
    if kind == 2:
        return {**tree, draw.choice(FRAGMENTS): tree[key]}
    if kind == 3:
        other = draw.choice(list(tree))
        return {**tree, key: tree[other], other: tree[key]}
    return {**tree, key: _change(tree[key], draw)}


def _change_list(tree: list[Any], draw: Random) -> list[Any]:
    place = draw.randrange(len(tree))
    kind = draw.randrange(6)
    if kind == 0:
        return tree[:place] + tree[place + 1 :]
    if kind == 1:
        return tree[:place] + [tree[place]] * draw.choice((2, 3, 70)) + tree[place + 1 :]
    if kind == 2:
        return [*tree, _value(draw)]
    return [*tree[:place], _change(tree[place], draw), *tree[place + 1 :]]


def _replaced(tree: Any, draw: Random) -> Any:
    kind = draw.randrange(5)
    if kind == 0 and isinstance(tree, str):
        place = draw.randint(0, len(tree))
        return tree[:place] + draw.choice(FRAGMENTS) + tree[place:]
    if kind == 1 and isinstance(tree, int | float):
        return tree + draw.choice((1, -1, 0.5, 1e9))
    if kind == 2:
        return draw.choice(([tree], {"x": tree}, [tree, tree], str(tree)))
    return _value(draw)


def _value(draw: Random) -> Any:
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(FRAGMENTS)
    if kind == 1:
        return draw.choice(_NUMBERS)
    if kind == 2:
        return _MARK % draw.randrange(len(_RAW))
    return draw.choice((None, True, False, [], {}, [[]], [None], {"": None}))


def _write(tree: Any, draw: Random) -> bytes:
    """Return a tree as JSON, sometimes with pieces that no JSON writer makes."""
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.5)
    for number, raw in enumerate(_RAW):
        mark = _MARK % number
        for form in (json.dumps(mark), json.dumps(mark, ensure_ascii=False)):
            text = text.replace(form, raw)
    if draw.random() < 0.05 and text.startswith('{"'):
        text = '{"' + text[2:].partition('"')[0] + '":null,' + text[1:]  # the same key twice
    return text.encode("utf-8", "surrogatepass")
