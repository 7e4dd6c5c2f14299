"""Two revisions of a tiny adapter on one tiny base model, trained for a moment."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["tiny_revisions"]

_TEXTS = {"transfer": "transfer to my account", "flight": "book a flight", "alarm": "set an alarm"}


def tiny_revisions(folder: Path, sources: Sequence[str]) -> Path:
    """Train one adapter a source into ``folder / "root"`` and return the base model's directory."""
    from dalorra_core.training.run import run_training  # noqa: PLC0415
    from dalorra_core.training.settings import load_config  # noqa: PLC0415 - slow, and not always needed
    from tests.support.tiny_models import save_tiny_base, write_jsonl  # noqa: PLC0415

    torch.set_num_threads(1)
    base = save_tiny_base(folder / "base")
    labels = list(_TEXTS)
    rows: list[dict[str, Any]] = [
        {"id": str(n), "text": _TEXTS[labels[n % 3]], "label": labels[n % 3]} for n in range(12)
    ]
    for split in ("train", "validation"):
        write_jsonl(folder / "data" / f"{split}.jsonl", rows)
    for seed, source in enumerate(sources):
        overrides = [
            "name=tiny",
            f"base={base}",
            f"data.source={folder / 'data'}",
            "data.max_tokens=96",
            f"optim.steps={4 + 8 * seed}",
            "optim.lr=0.02",
            "run.device=cpu",
            f"run.seed={seed}",
            "predictive.num_samples=3",
        ]
        config = load_config(None, overrides)
        place = folder / "trained" / source
        run_training(config, place, folder / f"run-{seed}", report=lambda _line: None)
        shutil.copytree(place, folder / "root" / source)
    return base
