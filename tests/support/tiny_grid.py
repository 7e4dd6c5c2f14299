"""Tiny data sets under the names of real tasks, and grids that a tiny model runs quickly."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.support.tiny_models import write_jsonl
from tests.support.tiny_tasks import INTENTS

__all__ = ["tiny_grid", "tiny_root", "write_grid"]

_FILLERS = ("the", "what", "is", "you")
_WORDS = {"positive": "transfer", "negative": "flight"}


def tiny_root(directory: Path) -> Path:
    """Write ``sst2`` (two labels) and ``trec`` (four), texts that one word decides."""
    _write(directory / "sst2", _WORDS, {"train": 48, "validation": 16, "test": 24})
    _write(directory / "trec", INTENTS, {"train": 48, "test": 16})
    return directory


def _write(folder: Path, words: dict[str, str], splits: dict[str, int]) -> None:
    rng = np.random.default_rng(len(words))
    labels = list(words)
    for split, count in splits.items():
        rows = []
        for i in range(count):
            fillers = [_FILLERS[k] for k in rng.integers(len(_FILLERS), size=3)]
            label = labels[i % len(labels)]
            text = " ".join([*fillers, words[label], str(i)])
            rows.append({"id": f"{split}-{i}", "text": text, "label": label})
        write_jsonl(folder / f"{split}.jsonl", rows)
    text = json.dumps({"labels": labels})
    (folder / "labels.json").write_text(text, encoding="utf-8")


def tiny_grid(base: Path, **changes: Any) -> dict[str, Any]:
    """Return a grid of MLE, MLE+T and DALorRA on ``sst2``; changes are top-level keys."""
    grid: dict[str, Any] = {
        "name": "tiny",
        "tasks": [{"task": "sst2", "train_rows": "all"}],
        "out_of_distribution": {"sst2": ["trec"]},
        "seeds": [1],
        "settings": {
            "base": str(base),
            "adapter": {"r": 2, "lora_alpha": 4},
            "optim": {"lr": 3e-2, "steps": 12, "batch_size": 4},
            "predictive": {"num_samples": 3},
            "run": {"checkpoint_every": 4, "eval_every": 100},
        },
        "methods": {
            "MLE": {"method": "mle"},
            "MLE+T": {"of": "MLE", "temperature": True},
            "DALorRA": {"method": {"name": "dalorra", "tau": 0.5}, "optim": {"steps": 8}},
        },
        "evaluation": {
            "rows": 12,
            "predictives": ["monte_carlo", "mean_mask"],
            "resamples": 20,
        },
    }
    return copy.deepcopy({**grid, **changes})


def write_grid(path: Path, grid: dict[str, Any]) -> Path:
    """Write a grid file and return its path."""
    path.write_text(yaml.safe_dump(grid, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path
