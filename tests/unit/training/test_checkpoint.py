"""dalorra_core.training.checkpoint: a step, its tensors and Adam's moments, safe against a kill."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dalorra_core.errors import ConfigError, DalorraError
from dalorra_core.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

CONFIG: dict[str, Any] = {"optim": {"lr": 0.1, "steps": 9}, "name": "x", "layers": [1, 2]}


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {n: nn.Parameter(torch.randn(3, 2, generator=generator)) for n in ("a.lora_A", "phi")}


def adam(params: dict[str, nn.Parameter], *, fused: bool = True) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(params.values()), lr=0.1, fused=fused)


def take_step(params: dict[str, nn.Parameter], optimizer: torch.optim.AdamW, k: int) -> None:
    for i, value in enumerate(params.values()):
        value.grad = torch.full_like(value, 0.3 * (k + 1) * (-1) ** (k + i))
    optimizer.step()


def checkpoint_of(step: int, config: dict[str, Any] | None = None) -> Checkpoint:
    return Checkpoint(step, config or CONFIG, {"phi": torch.full((2,), float(step))}, {})


@pytest.mark.parametrize("fused", [False, True])
def test_adam_goes_on_exactly_where_it_was(tmp_path: Path, fused: bool) -> None:
    params = parameters()
    optimizer = adam(params, fused=fused)
    for k in range(3):
        take_step(params, optimizer, k)
    moments = Checkpoint.of_optimizer(optimizer, params)
    path = save_checkpoint(tmp_path, Checkpoint(3, CONFIG, params, moments))
    fresh = parameters()
    other = adam(fresh, fused=fused)
    loaded = load_checkpoint(path, CONFIG)
    assert loaded.step == 3
    loaded.restore(other, fresh)
    for k in range(3, 6):
        take_step(params, optimizer, k)
        take_step(fresh, other, k)
    for name, value in params.items():
        assert torch.equal(fresh[name], value)
    assert not torch.equal(params["phi"], parameters()["phi"])


def test_a_checkpoint_from_before_the_first_step_has_no_moments(tmp_path: Path) -> None:
    params = parameters()
    optimizer = adam(params)
    path = save_checkpoint(
        tmp_path, Checkpoint(0, CONFIG, params, Checkpoint.of_optimizer(optimizer, params))
    )
    load_checkpoint(path, CONFIG).restore(optimizer, params)
    assert not optimizer.state


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 100, 20):
        save_checkpoint(tmp_path, checkpoint_of(step))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000100"


def test_nothing_there_is_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    (tmp_path / "step-1").mkdir()
    (tmp_path / ".writing-7").mkdir()
    assert latest_checkpoint(tmp_path) is None


def test_a_crash_while_writing_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, checkpoint_of(5))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, checkpoint_of(10))
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "step-00000005"
    assert float(load_checkpoint(newest, CONFIG).params["phi"][0]) == 5.0
    save_checkpoint(tmp_path, checkpoint_of(10))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000005", "step-00000010"]


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_of(5))
    again = Checkpoint(5, CONFIG, {"phi": torch.full((2,), 7.0)}, {})
    path = save_checkpoint(tmp_path, again)
    assert float(load_checkpoint(path, CONFIG).params["phi"][0]) == 7.0


def test_other_settings_are_named_with_both_values(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint_of(5))
    changed = {"optim": {"lr": 0.2, "steps": 9}, "name": "x", "layers": [1, 3], "new": 1}
    with pytest.raises(ConfigError) as caught:
        load_checkpoint(path, changed)
    message = str(caught.value)
    assert (
        "layers was [1, 2], now [1, 3]; new was None, now 1; optim.lr was 0.1, now 0.2" in message
    )
    assert "steps" not in message


@pytest.mark.parametrize("name", ["checkpoint.json", "params.safetensors", "moments.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    params = parameters()
    optimizer = adam(params)
    take_step(params, optimizer, 0)
    moments = Checkpoint.of_optimizer(optimizer, params)
    path = save_checkpoint(tmp_path, Checkpoint(1, CONFIG, params, moments))
    file = path / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if damage == "empty" else content[: len(content) // 2])
    with pytest.raises(DalorraError, match=f"checkpoint {path} cannot be read"):
        load_checkpoint(path, CONFIG)
