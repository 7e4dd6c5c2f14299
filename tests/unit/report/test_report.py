"""dalorra_core.report: the numbers behind the figures, and figures without matplotlib."""

import sys

import pytest
import torch

from dalorra_core.calibration.what_if import CurvePoint
from dalorra_core.errors import ConfigError
from dalorra_core.metrics.calibration import ece, ece_noise_floor
from dalorra_core.report.plots import CertifiedPoint, check_plotting, histograms, risk_coverage
from dalorra_core.report.reliability import reliability


def drawn(n: int, bias: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    confidence = 0.5 + 0.5 * torch.rand(n, generator=generator, dtype=torch.float64)
    right = torch.rand(n, generator=generator, dtype=torch.float64) < confidence - bias
    return confidence, right


def test_ece_and_its_floor_are_those_of_the_metrics() -> None:
    confidence, right = drawn(400, 0.1)
    found = reliability(confidence, right, torch.Generator().manual_seed(0))
    probs = torch.stack([confidence, 1 - confidence], dim=1)
    assert found.ece == pytest.approx(ece(probs, (~right).long()))
    floor = ece_noise_floor(confidence, 15, generator=torch.Generator().manual_seed(1))
    assert found.ece_by_chance == pytest.approx(floor.mean, abs=5 * floor.std / 1000**0.5 * 2)
    assert int(found.count.sum()) == 400


def test_a_calibrated_model_lies_in_the_band_and_a_biased_one_does_not() -> None:
    for bias, least, most in ((0.0, 0.75, 1.0), (0.3, 0.0, 0.2)):
        found = reliability(*drawn(4000, bias), torch.Generator().manual_seed(0))
        inside = (found.low <= found.accuracy) & (found.accuracy <= found.high)
        assert least <= float(inside.double().mean()) <= most


def test_one_row_is_a_diagram() -> None:
    found = reliability(torch.tensor([1.0]), torch.tensor([True]), torch.Generator())
    assert (found.accuracy.tolist(), found.low.tolist(), found.ece) == ([1.0], [1.0], 0.0)


def test_the_figures_hold_what_they_were_given() -> None:
    point = CurvePoint(0.9, 0.5, 0.6, 0.04, 0.01, 0.08, 50)
    figure = risk_coverage({"by x": [point]}, [CertifiedPoint("risk-0.1", 0.5, 0.04, 0.1)], "t")
    (axes,) = figure.axes
    assert axes.lines[0].get_xydata().tolist() == [[50.0, 4.0]]
    assert [t.get_text() for t in axes.texts] == ["risk-0.1"]
    assert axes.get_title(loc="left") == "t"
    inside = histograms({"confidence": torch.rand(9)}, torch.zeros(9, dtype=torch.bool), {})
    assert inside.axes[0].get_legend_handles_labels()[1] == ["in scope"]


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"dalorra\[calibrate\]"):
        check_plotting()
