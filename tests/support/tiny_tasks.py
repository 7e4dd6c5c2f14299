"""Two tasks that a tiny model learns in seconds, as files, and a configuration to train on them."""

from pathlib import Path
from typing import Any

import numpy as np

from dalorra_core.training.settings import TrainConfig
from tests.support.tiny_models import save_tiny_base, write_jsonl

__all__ = ["INTENTS", "TinyTask", "choice_task", "text_task", "tiny_config"]

INTENTS = {"money": "transfer", "travel": "flight", "time": "alarm", "food": "order"}
"""Label to the one word of the text that gives it away."""

_FILLERS = ("the", "what", "is", "you")
_ANSWERS = {"A": "speed", "B": "hotel", "C": "bank"}


class TinyTask:
    """A base model and a data directory in one folder.

    Attributes:
        base: Base model directory.
        data: Directory with train.jsonl and validation.jsonl.
    """

    def __init__(self, folder: Path, kind: str, family: str = "llama") -> None:
        self.base = save_tiny_base(folder / "base", family)
        self.data = (text_task if kind == "text" else choice_task)(folder / "data")


def _sentence(rng: np.random.Generator, word: str) -> str:
    fillers = [_FILLERS[i] for i in rng.integers(len(_FILLERS), size=rng.integers(3))]
    return " ".join([*fillers, word])


def text_task(directory: Path, *, rows: int = 64) -> Path:
    """Write texts whose intent one word decides, and a few out-of-scope ones for validation."""
    rng = np.random.default_rng(0)
    labels = list(INTENTS)

    def row(split: str, i: int) -> dict[str, Any]:
        label = labels[i % len(labels)]
        text = _sentence(rng, INTENTS[label])
        return {"id": f"{split}-{i}", "text": text, "label": label}

    validation = [row("validation", i) for i in range(16)]
    validation += [
        {"id": f"oos-{i}", "text": _sentence(rng, "weather"), "label": "oos"} for i in range(4)
    ]
    write_jsonl(directory / "train.jsonl", [row("train", i) for i in range(rows)])
    write_jsonl(directory / "validation.jsonl", validation)
    return directory


def choice_task(directory: Path, *, rows: int = 48) -> Path:
    """Write questions of two or three choices whose answer one word decides."""
    rng = np.random.default_rng(1)

    def row(split: str, i: int) -> dict[str, Any]:
        answer = "ABC"[i % 3]
        labels = "ABC" if answer == "C" or i % 2 else "AB"
        choices = [{"label": c, "text": text} for c, text in zip(labels, _FILLERS, strict=False)]
        question = _sentence(rng, _ANSWERS[answer])
        return {"id": f"{split}-{i}", "question": question, "choices": choices, "answer": answer}

    write_jsonl(directory / "train.jsonl", [row("train", i) for i in range(rows)])
    write_jsonl(directory / "validation.jsonl", [row("validation", i) for i in range(12)])
    return directory


def tiny_config(task: TinyTask, **groups: Any) -> TrainConfig:
    """Return settings under which a tiny model learns a tiny task; groups add to the defaults."""
    defaults: dict[str, dict[str, Any]] = {
        "method": {"name": "dalorra", "mask_lr": 3e-2},
        "adapter": {"r": 4, "lora_alpha": 8},
        "data": {"source": str(task.data), "out_of_scope_label": "oos"},
        "optim": {"lr": 3e-2, "steps": 80, "batch_size": 8},
        "run": {"device": "cpu", "checkpoint_every": 20, "eval_every": 40},
        "predictive": {"num_samples": 4},
    }
    merged = {key: {**defaults.get(key, {}), **groups.get(key, {})} for key in defaults}
    if groups.get("method", {}).get("name", "dalorra") != "dalorra":
        merged["method"] = dict(groups["method"])
    return TrainConfig.model_validate({"name": "tiny", "base": str(task.base), **merged})
