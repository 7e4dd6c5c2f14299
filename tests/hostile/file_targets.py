"""Hostile bytes in files and in texts: manifests, tensors, prompts; see ``targets``."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dalorra_core.artifact.manifest import manifest_digest
from dalorra_core.artifact.store import (
    ADAPTER_FILE,
    MANIFEST_FILE,
    load_artifact,
    pack_tensors,
    save_artifact,
)
from dalorra_core.data.encode import encode
from dalorra_core.data.examples import Choice, ChoiceExample, TextExample
from dalorra_core.data.labels import LabelSet
from dalorra_core.data.prompts import DEFAULT_CHOICE_TEMPLATE, PromptTemplate, render
from dalorra_core.data.tokenization import special_token_ids
from dalorra_core.errors import ArtifactError, InputError
from dalorra_core.predictive.matching import state_of
from tests.hostile.mutate import FRAGMENTS, mutate_json, mutate_tensors, mutate_text
from tests.hostile.targets import Outcome, Target
from tests.support.tiny_manifest import tiny_manifest, tiny_params
from tests.support.tiny_tokenizer import tiny_tokenizer

__all__ = ["file_targets"]

MAX_FLOATS = 2**20
"""What a sound artifact of a few hundred bytes may hold at most, with room to spare."""

_TEMPLATE = PromptTemplate("text", "custom", "Read: {text}\nIntent:")
_LABELS = LabelSet(("A", "B"), (5, 6))


def file_targets(folder: Path) -> tuple[Target, ...]:
    """Return the targets of the core; ``folder`` is theirs to write in."""
    attack = _Attack(folder / "attacked")
    return (
        Target("manifest", (attack.manifest,), mutate_json, attack.raw_manifest),
        Target("sealed_manifest", (attack.manifest,), mutate_json, attack.sealed_manifest),
        Target("tensors", (attack.tensors,), mutate_tensors, attack.listed_tensors),
        Target("prompt", _prompt_seeds(), mutate_text, check_prompt),
    )


class _Attack:
    """An adapter directory whose files an attacker may write."""

    def __init__(self, directory: Path) -> None:
        save_artifact(directory, tiny_manifest(), pack_tensors(tiny_params()))
        self._directory = directory
        self.manifest = (directory / MANIFEST_FILE).read_bytes()
        self.tensors = (directory / ADAPTER_FILE).read_bytes()

    def raw_manifest(self, content: bytes) -> Outcome:
        """Load with a manifest as it is: whatever was changed, its digest no longer fits."""
        outcome = self._load(content, self.tensors)
        assert outcome == "refused" or content == self.manifest, "a changed manifest was taken"
        return outcome

    def sealed_manifest(self, content: bytes) -> Outcome:
        """Load with a manifest that its forger has sealed."""
        return self._load(_sealed(content), self.tensors)

    def listed_tensors(self, content: bytes) -> Outcome:
        """Load with tensors that a forged manifest vouches for."""
        values = json.loads(self.manifest)
        values["files"] = {ADAPTER_FILE: hashlib.sha256(content).hexdigest()}
        return self._load(_sealed(json.dumps(values).encode()), content)

    def _load(self, manifest: bytes, tensors: bytes) -> Outcome:
        (self._directory / MANIFEST_FILE).write_bytes(manifest)
        (self._directory / ADAPTER_FILE).write_bytes(tensors)
        try:
            artifact = load_artifact(self._directory)
            state = state_of(artifact)
        except ArtifactError:
            return "refused"
        assert sum(value.numel() for value in state.params.values()) < MAX_FLOATS
        assert all(value.dtype == torch.float32 for value in state.params.values())
        return "taken"


def _sealed(content: bytes) -> bytes:
    """Return a manifest with the digest that fits it, in the form in which one is written."""
    try:
        values: Any = json.loads(content)
        if not isinstance(values, dict):
            return content
        values.pop("manifest_sha256", None)
        values["manifest_sha256"] = manifest_digest(values)
        return (json.dumps(values, indent=1, ensure_ascii=False) + "\n").encode()
    except (ValueError, RecursionError):
        return content


@cache
def _tokenizer() -> Any:
    return tiny_tokenizer(adds_start=True)


def _prompt_seeds() -> tuple[bytes, ...]:
    texts = [*FRAGMENTS, "transfer to my account", "a " * 32_768, "a" * 65_536, "\u0e01" * 20_000]
    return tuple(text.encode("utf-8", "surrogatepass") for text in texts)


def check_prompt(content: bytes) -> Outcome:
    """Encode a text as a row and as a question, whole and cut.

    Raises:
        AssertionError: A control token came out of text, the text did not come back, or a limit
            was not kept.
    """
    text = content.decode("utf-8", "surrogatepass")
    row = TextExample("request", text)
    question = ChoiceExample(
        "request", text[:2000], text, (Choice("A", "x"), Choice("B", text[:99]))
    )
    tokenizer, control = _tokenizer(), special_token_ids(_tokenizer())
    try:
        for example, template in ((row, _TEMPLATE), (question, DEFAULT_CHOICE_TEMPLATE)):
            options: Any = {"tokenizer": tokenizer, "template": template, "label_set": _LABELS}
            ids = encode(example, max_tokens=10**9, **options).token_ids
            assert not control & set(ids[1:]), "text became a control token"
            assert tokenizer.decode(list(ids[1:])) == render(example, template).text
        for side in ("start", "end"):
            cut = encode(row, max_tokens=64, truncate=side, **options | {"template": _TEMPLATE})
            assert 1 <= len(cut.token_ids) <= 64
            assert not control & set(cut.token_ids[1:]), "cut text became a control token"
    except InputError:
        return "refused"
    return "taken"
