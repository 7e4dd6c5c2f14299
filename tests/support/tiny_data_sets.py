"""Small data sets laid out as the public ones, and where those lie when they are there."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_models import write_jsonl

__all__ = ["SHARED_DATA", "needs_shared_data", "tiny_data_root"]

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
"""The public data sets beside the repository."""

needs_shared_data = pytest.mark.skipif(
    not (SHARED_DATA / "MANIFEST.json").is_file(), reason="needs the data sets in ../shared/data"
)

_TREC = ("number", "human")
_SENTIMENT = ("positive", "negative")
_INTENTS = {"banking": ("balance", "transfer"), "travel": ("flight", "balance_abroad")}


def tiny_data_root(root: Path) -> Path:
    """Write openbookqa, arc_challenge, boolq, sst2, trec and clinc150 in miniature."""
    for split, size in (("train", 40), ("validation", 11)):
        _questions(root / "openbookqa", split, ["ABCD"] * size)
        _questions(root / "boolq", split, [("True", "False")] * size, passage="account " * 60)
    _questions(root / "arc_challenge", "train", ["ABCD", "ABC", "ABCDE", "ABCD"] * 5)
    _questions(root / "arc_challenge", "validation", ["ABCD", "ABC", "ABCDE"] * 3)
    for split, size in (("train", 60), ("validation", 8), ("test", 10)):
        _texts(root / "sst2", split, _SENTIMENT, size)
        _texts(root / "trec", split, _TREC, size)
        both = (*_INTENTS["banking"], *_INTENTS["travel"], "oos")
        _texts(root / "clinc150", split, both, size)
    (root / "trec" / "validation.jsonl").unlink()
    _labels(root / "sst2", {"labels": _SENTIMENT})
    _labels(root / "trec", {"labels": _TREC})
    every = [*_INTENTS["banking"], *_INTENTS["travel"], "oos"]
    clinc = {"labels": every, "out_of_scope_label": "oos", "domains": _INTENTS}
    _labels(root / "clinc150", clinc)
    return root


def _labels(folder: Path, values: dict[str, Any]) -> None:
    (folder / "labels.json").write_text(json.dumps(values), encoding="utf-8")


def _texts(folder: Path, split: str, labels: tuple[str, ...], size: int) -> None:
    rows = [
        {"id": f"{split}-{i}", "text": f"{split} bank word {i}", "label": labels[i % len(labels)]}
        for i in range(size)
    ]
    write_jsonl(folder / f"{split}.jsonl", rows)


def _questions(folder: Path, split: str, choices: list[Any], *, passage: str | None = None) -> None:
    rows = [
        {
            "id": f"{folder.name}-{split}-{i}",
            "question": f"{split} which is word {i}",
            "context": passage,
            "choices": [
                {"label": c, "text": c if passage else f"the {c.lower()}{i}"} for c in labels
            ],
            "answer": labels[i % len(labels)],
        }
        for i, labels in enumerate(choices)
    ]
    write_jsonl(folder / f"{split}.jsonl", rows)
