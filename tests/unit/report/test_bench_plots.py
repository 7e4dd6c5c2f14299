"""Figures of a bench: they hold the numbers they were given, and survive odd names and gaps."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dalorra_core.metrics.selective import RiskCoverageCurve, risk_coverage_curve
from dalorra_core.report.bench_plots import (
    CostPoint,
    Curve,
    GroupPanel,
    PosteriorMap,
    Score,
    SweepPanel,
    grouped,
    posterior_heat_maps,
    posterior_maps,
    risk_coverage_by_method,
    score_against_cost,
    sweep,
)
from dalorra_core.report.plots import reliability_diagram, save_figures
from dalorra_core.report.reliability import reliability

TWO = (Score(1.0, 0.5), Score(2.0))


def drawn(figure: Any) -> None:
    """Draw it: layout and labels are only worked out then."""
    figure.savefig(io.BytesIO())


def legend_of(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def points_of(container: Any) -> list[list[float]]:
    return container.lines[0].get_xydata().tolist()


def test_modules_become_maps_by_kind_and_layer() -> None:
    layers = "model.layers.{}.self_attn.{}"
    keep = {
        layers.format(10, "q_proj"): [0.1, 0.2],
        layers.format(9, "q_proj"): [0.3, 0.4],
        layers.format(9, "v_proj"): [0.5, 0.6],
        "lm_head": [0.7, 0.8],
    }
    q, v, head = posterior_maps(keep)
    assert (q.name, q.layers, q.keep_prob.tolist()) == ("q_proj", (9, 10), [[0.3, 0.4], [0.1, 0.2]])
    assert (v.name, v.layers, v.keep_prob.tolist()) == ("v_proj", (9,), [[0.5, 0.6]])
    assert (head.name, head.layers, head.keep_prob.tolist()) == ("lm_head", (), [[0.7, 0.8]])


def test_heat_maps_share_a_scale_around_the_prior() -> None:
    deep = PosteriorMap("q_proj", (0, 1), torch.tensor([[0.5, 0.9], [0.6, 0.7]]))
    head = PosteriorMap("lm_head", (), torch.tensor([[0.65, 0.7]]))
    figure = posterior_heat_maps({"trec": (deep, head)}, prior_prob=0.7, title="t")
    drawn(figure)
    first, second, bar = figure.axes
    for axes in (first, second):
        assert axes.images[0].get_clim() == pytest.approx((0.5, 0.9))
    assert first.images[0].get_array().tolist() == deep.keep_prob.tolist()
    shown = second.images[0].get_array()
    assert shown[0].tolist() == head.keep_prob[0].tolist()
    assert shown.mask.tolist() == [[False, False], [True, True]]
    assert first.get_title() == "trec\nq_proj"
    assert "0.7" in bar.get_ylabel()


def test_an_adapter_on_one_layer_has_one_map_of_its_modules() -> None:
    keep = {"model.layers.29.self_attn.q_proj": (0.5, 0.9), "lm_head": (0.6, 0.7)}
    (one,) = posterior_maps(keep)
    assert one.kinds == ("q_proj", "lm_head")
    figure = posterior_heat_maps({"trec": (one,), "sst2": (one,)}, prior_prob=0.7, title="t")
    drawn(figure)
    first, second, _ = figure.axes
    assert first.images[0].get_array().tolist() == one.keep_prob.tolist()
    assert [label.get_text() for label in second.get_yticklabels()] == ["q_proj", "lm_head"]
    assert (first.get_title(), first.get_ylabel()) == ("trec", "")


def test_an_untrained_posterior_is_drawn() -> None:
    flat = PosteriorMap("q_proj", (0,), torch.full((1, 3), 0.5))
    figure = posterior_heat_maps({"": (flat,)}, prior_prob=0.5, title="t")
    drawn(figure)
    low, high = figure.axes[0].images[0].get_clim()
    assert low < 0.5 < high


def test_a_sweep_holds_its_curves_and_references() -> None:
    curve = Curve("OBQA", (1.0, 4.0), TWO, reference=Score(1.5, 0.1))
    plain = Curve("BoolQ", (1.0, 2.0), TWO)
    panels = [SweepPanel("ECE (%)", (curve, plain)), SweepPanel("NLL", (plain,))]
    figure = sweep(panels, x_label="K", title="t", reference_name="learned")
    drawn(figure)
    first, second = figure.axes
    assert points_of(first.containers[0]) == [[1.0, 1.0], [4.0, 2.0]]
    assert [line.get_ydata() for line in first.lines if line.get_linestyle() == "--"] == [
        [1.5, 1.5]
    ]
    assert [t.get_text() for t in first.get_xticklabels()] == ["1", "2", "4"]
    # Equal names have equal colours in all panels.
    colors = [axes.containers[-1].lines[0].get_color() for axes in (first, second)]
    assert colors[0] == colors[1]
    assert legend_of(figure) == ["OBQA", "BoolQ", "dashed: learned"]
    bare = sweep([SweepPanel("NLL", (plain,))], x_label="r", title="t")
    assert legend_of(bare) == ["BoolQ"]


def test_groups_stand_apart_and_gaps_stay_empty() -> None:
    panel = GroupPanel("ACC", ("AAO", "WB"), {"a": (Score(1.0), None), "b": TWO})
    figure = grouped([panel], title="t")
    drawn(figure)
    (axes,) = figure.axes
    a, b = (points_of(container) for container in axes.containers)
    assert a == [[pytest.approx(-0.175), 1.0]]
    assert b == [[pytest.approx(0.175), 1.0], [pytest.approx(1.175), 2.0]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["AAO", "WB"]


def curve_of(right: list[bool]) -> RiskCoverageCurve:
    return risk_coverage_curve(torch.linspace(1.0, 0.5, len(right)), torch.tensor(right))


def test_risk_coverage_is_the_mean_over_seeds_with_a_band() -> None:
    curves = {"a": [curve_of([True, True, False, True]), curve_of([True, True, True, True])]}
    figure = risk_coverage_by_method(curves, title="t")
    drawn(figure)
    (axes,) = figure.axes
    coverage, risk = zip(*axes.lines[0].get_xydata().tolist(), strict=True)
    assert coverage == (25, 50, 75, 100)
    assert risk == pytest.approx((0, 0, 100 / 6, 12.5))
    assert len(axes.collections) == 1
    # AURC: (0 + 0 + 1/3 + 1/4) / 4 and 0, their mean in percent.
    assert legend_of(figure) == ["a (AURC 7.29 %)"]
    many = {str(k): curves["a"] for k in range(5)}
    assert len(risk_coverage_by_method(many, title="t").axes[0].collections) == 0


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    right = [k % 3 > 0 for k in range(1000)]
    (line,) = risk_coverage_by_method({"a": [curve_of(right)]}, title="t").axes[0].lines
    points = line.get_xydata().tolist()
    assert len(points) == 400
    assert points[0][0] == pytest.approx(0.1)
    assert points[-1] == pytest.approx([100.0, 33.4])


@pytest.mark.parametrize(("dearest", "scale"), [(500.0, "log"), (50.0, "linear")])
def test_cost_is_logarithmic_where_it_spans_a_lot(dearest: float, scale: str) -> None:
    points = [CostPoint("MLE", 10.0, Score(70.0)), CostPoint("ENS", dearest, Score(72.0, 1.0))]
    figure = score_against_cost(points, x_label="s", y_label="ACC", title="t")
    drawn(figure)
    (axes,) = figure.axes
    assert axes.get_xscale() == scale
    assert [points_of(c) for c in axes.containers] == [[[10.0, 70.0]], [[dearest, 72.0]]]
    assert legend_of(figure) == ["MLE", "ENS"]


def test_a_name_is_no_formula() -> None:
    name = r"_$\frac$ 5 $"
    drawn(score_against_cost([CostPoint(name, 1.0, TWO[1])], x_label=name, y_label="$", title="$$"))


def test_many_reliability_diagrams_take_several_lines() -> None:
    confidence, right = torch.linspace(0.5, 1.0, 40), torch.arange(40) % 4 > 0
    one = reliability(confidence, right, torch.Generator().manual_seed(0))
    figure = reliability_diagram({str(k): one for k in range(5)}, "t")
    places = [axes.get_subplotspec().get_geometry()[:2] for axes in figure.axes]
    assert places == [(2, 3)] * 5


def test_figures_are_written_twice_each(tmp_path: Path) -> None:
    figure = sweep([SweepPanel("NLL", (Curve("a", (1.0, 2.0), TWO),))], x_label="r", title="t")
    paths = save_figures(tmp_path / "figures", {"rank": figure})
    assert [path.name for path in paths] == ["rank.png", "rank.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert math.isclose(figure.get_size_inches()[0], 4.0)
