"""dalorra_core.predictive.pass_size: which size wins, by a clock that the test moves."""

from pathlib import Path
from typing import Literal

import pytest
from torch import Tensor

from dalorra_core.predictive import shared_base
from dalorra_core.predictive.pass_size import fastest_size, tried_tokens
from dalorra_core.predictive.shared_base import SharedBase, identify
from dalorra_core.predictive.trunk import Stem, Trunk
from tests.support.tiny_models import save_tiny_base, tiny_model


class Machine:
    """Runs passes in a time of its own; the first run of all takes longer."""

    def __init__(self, seconds_per_token: dict[int, float]) -> None:
        self.seconds_per_token = seconds_per_token
        self.now_s = 100.0
        self.ran: list[int] = []

    def run(self, size: int) -> None:
        self.now_s += size * self.seconds_per_token[size] * (1 if self.ran else 1.5)
        self.ran.append(size)

    def fastest(self, budget_s: float = 3.0) -> int:
        sizes = sorted(self.seconds_per_token)
        return fastest_size(
            self.run, default=512, sizes=sizes, budget_s=budget_s, clock=lambda: self.now_s
        )


@pytest.mark.parametrize(
    ("at_256", "at_512", "at_1024", "expected"),
    [
        (1.0, 1.0, 0.94, 1024),
        (1.0, 1.0, 0.96, 512),  # not enough to leave the default
        (0.9, 1.0, 0.8, 1024),
        (0.8, 1.0, 2.0, 256),
        (1.0, 1.0, 1.0, 512),
    ],
)
def test_the_size_with_the_most_tokens_a_second_wins_if_clearly(
    at_256: float, at_512: float, at_1024: float, expected: int
) -> None:
    machine = Machine({256: at_256 / 10_000, 512: at_512 / 10_000, 1024: at_1024 / 10_000})
    assert machine.fastest() == expected
    assert machine.ran == [256, 256, 512, 1024, 256, 512, 1024]


def test_what_does_not_fit_into_the_time_is_not_tried() -> None:
    """0.256 s, then 0.384 s a run of 256 is expected: 512 fits, 1024 (1.5 s) does not."""
    machine = Machine({256: 0.001, 512: 0.0008, 1024: 0.0001})
    assert machine.fastest(budget_s=1.8) == 512
    assert 1024 not in machine.ran
    assert machine.now_s <= 101.8


def test_a_slow_machine_keeps_the_default_after_one_pass() -> None:
    machine = Machine({256: 0.01, 512: 0.001, 1024: 0.001})
    assert machine.fastest() == 512
    assert machine.ran == [256]


def test_the_better_of_two_runs_counts() -> None:
    machine = Machine({256: 0.0001, 512: 0.0001, 1024: 0.00005})
    plain = machine.run

    def disturbed(size: int) -> None:
        plain(size)
        machine.now_s += 1.0 if len(machine.ran) == 4 else 0.0  # other work during the first 1024

    assert (
        fastest_size(disturbed, default=512, sizes=(256, 512, 1024), clock=lambda: machine.now_s)
        == 1024
    )


def test_a_model_is_tried_with_passes_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk, ran = Trunk(tiny_model()), []
    whole = Trunk.stem

    def noted(self: Trunk, input_ids: Tensor, layer: int) -> Stem:
        ran.append((input_ids.numel(), layer))
        return whole(self, input_ids, layer)

    monkeypatch.setattr(Trunk, "stem", noted)
    assert tried_tokens(trunk, 512) in (256, 512, 1024, 2048)
    assert ran[0] == (256, 1)  # of two layers, the last one is not run


@pytest.mark.parametrize(
    ("tokens", "megabytes", "expected"),
    [(None, None, 512), (100, None, 100), ("auto", None, 1024), ("auto", 1, 442), (100, 1, 100)],
)
def test_a_base_model_takes_passes_of_the_size_that_was_asked_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int | Literal["auto"] | None,
    megabytes: int | None,
    expected: int,
) -> None:
    monkeypatch.setattr(shared_base, "tried_tokens", lambda _trunk, default: 2 * default)
    base = SharedBase.load(
        identify(save_tiny_base(tmp_path / "base")),
        device="cpu",
        pass_memory_mb=megabytes,
        pass_tokens=tokens,
    )
    assert base.pass_tokens == expected
