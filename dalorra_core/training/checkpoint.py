"""Checkpoints that survive a kill: safetensors and JSON, written beside and renamed into place.

Random streams are named, not stored (sampling/streams.py), so a step number, the parameters and
the two Adam moments are the whole state of a run. Nothing is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dalorra_core.errors import ConfigError, DalorraError

__all__ = ["Checkpoint", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

_NAME = re.compile(r"^step-(\d{8})$")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
_KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """State after ``step`` optimiser steps.

    Attributes:
        step: Finished optimiser steps.
        config: The run's configuration as JSON values; a resumed run must have the same.
        params: Adapter parameters.
        moments: ``<parameter>/<moment>`` for Adam's running averages and step counts.
    """

    step: int
    config: Mapping[str, Any]
    params: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]

    @staticmethod
    def of_optimizer(
        optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the optimiser's moments under the names of ``params``."""
        return {
            f"{name}/{moment}": optimizer.state[value][moment].detach().cpu().contiguous()
            for name, value in params.items()
            for moment in _MOMENTS
            if value in optimizer.state
        }

    def restore(self, optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> None:
        """Copy parameters and moments back; changes ``optimizer`` and ``params``."""
        for name, value in params.items():
            with torch.no_grad():
                value.copy_(self.params[name])
            if f"{name}/step" in self.moments:
                moments = {key: self.moments[f"{name}/{key}"] for key in _MOMENTS}
                on_device = {k: v.to(value.device) for k, v in moments.items() if k != "step"}
                step = moments["step"].to(value.device if _fused(optimizer) else "cpu")
                optimizer.state[value] = {**on_device, "step": step}


def _fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint under ``directory`` atomically and drop all but the newest two."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step-{checkpoint.step:08d}"
    scratch = directory / f".writing-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    params = {k: v.detach().cpu().contiguous() for k, v in checkpoint.params.items()}
    save_file(params, scratch / "params.safetensors")
    save_file(dict(checkpoint.moments), scratch / "moments.safetensors")
    meta = {"step": checkpoint.step, "config": checkpoint.config}
    (scratch / "checkpoint.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for file in scratch.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    scratch.replace(target)
    for old in _checkpoints(directory)[:-_KEPT]:
        shutil.rmtree(old)
    return target


def _checkpoints(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(p for p in directory.iterdir() if _NAME.match(p.name))


def latest_checkpoint(directory: Path) -> Path | None:
    """Return the newest whole checkpoint under ``directory``, or None."""
    found = _checkpoints(directory)
    return found[-1] if found else None


def load_checkpoint(path: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Read a checkpoint of the same run.

    Args:
        path: One ``step-...`` directory.
        config: Configuration of the run that resumes.

    Raises:
        ConfigError: If the checkpoint belongs to another configuration; names the settings.
        DalorraError: If it cannot be read.
    """
    try:
        meta = json.loads((path / "checkpoint.json").read_text(encoding="utf-8"))
        params = load_file(path / "params.safetensors")
        moments = load_file(path / "moments.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise DalorraError(f"checkpoint {path} cannot be read: {error}") from error
    if changed := sorted(_differences(meta["config"], config)):
        raise ConfigError(
            f"checkpoint {path} was written with other settings: {'; '.join(changed)}. "
            "Resume with the same configuration or start anew in another run directory"
        )
    return Checkpoint(meta["step"], meta["config"], params, moments)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted({*old, *new})
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}")]
    return [] if old == new else [f"{path.lstrip('.')} was {old!r}, now {new!r}"]
