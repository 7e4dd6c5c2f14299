"""benchmarks.estimators on a tiny adapter: every estimator beside PEFT, which gives the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.estimators import main
from benchmarks.estimators_further import FURTHER, applicable
from dalorra_core.predictive.adaptive import BOUNDS
from dalorra_core.predictive.predictor import Predictor
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter
from tests.support.tiny_models import save_tiny_base, write_jsonl


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
def test_errors_and_costs_stand_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_base(tmp_path / "base")
    adapter = save_tiny_adapter(tmp_path / "tiny", base)
    rows = [{"id": f"{i}", "text": f"{TEXTS[i % 4]} {TEXTS[i // 4]}"} for i in range(8)]
    texts, output = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "found.json"
    options = (
        "--estimators",
        "designs",
        "--rows",
        "8",
        "--reference",
        "64",
        "--repeats",
        "2",
        "--timed-rows",
        "3",
    )
    more = ("--peer-samples", "3", "--device", "cpu", "--output", str(output))
    assert main([str(adapter), "--texts", str(texts), *options, *more]) == 0
    found = json.loads(output.read_text("utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    names = {f"{d} {m}" for d in ("iid", "stratified", "antithetic") for m in (2, 4, 10)}
    estimators = found["errors"]["estimators"]
    assert set(estimators) == {"mean_mask", *names}
    assert estimators["mean_mask"]["information_error"] is None
    assert estimators["iid 2"]["mean_error"] > estimators["iid 10"]["mean_error"] > 0
    peers = {"PEFT loop, 3", "PEFT mixed batch, 3"}
    ways = found["cost"]["ways"]
    assert set(ways) == {"mean_mask", *names, "ours, iid 3", *peers}
    assert ways["mean_mask"]["ratio_to_mean_mask"] == 1.0
    assert all(way["ms_per_row"] > 0 for way in ways.values())
    assert set(found["largest_difference"]) == peers
    assert max(found["largest_difference"].values()) < 1e-4
    assert "on_equal_samples" not in found


def further(tmp_path: Path, *options: str, **adapter: Any) -> dict[str, Any]:
    """Return what the benchmark finds for a tiny adapter of two layers."""
    base = save_tiny_base(tmp_path / "base")
    place = save_tiny_adapter(tmp_path / "tiny", base, layers=(1, 1), **adapter)
    rows = [{"id": f"{i}", "text": f"{TEXTS[i % 4]} {TEXTS[i // 4]}"} for i in range(8)]
    texts, output = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "found.json"
    sizes = ("--rows", "8", "--reference", "64", "--packs", "8", "--sizes", "2", "6")
    last = ("--repeats", "0", "--device", "cpu", "--output", str(output))
    assert main([str(place), "--texts", str(texts), *sizes, *options, *last]) == 0
    return json.loads(output.read_text("utf-8"))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_others_are_judged_on_equal_samples(tmp_path: Path) -> None:
    """A head of its own gates only: nothing is left to sample once they are summed out."""
    found = further(tmp_path, "--estimators", *FURTHER, targets=("lm_head",), r=6)
    assert "errors" not in found
    assert "cost" not in found
    equal = found["on_equal_samples"]
    shares = equal["shares"]
    assert shares["iid 6"] == {
        "mean": 1.0,
        "mean_se": 0.0,
        "information": 1.0,
        "information_se": 0.0,
    }
    assert shares["iid 2"]["mean"] > 1.5
    sizes = ("exact_head", "blend", "control_variate")
    names = {f"{name} {m}" for name in sizes for m in (2, 6)} | {"linearised", "linearised, probit"}
    bounds = {f"adaptive, {b}{d}" for b in BOUNDS for d in ("", ", decisions")}
    assert set(shares) == {"iid 2", "iid 6", "mean_mask"} | names | bounds
    # Both are exact here, up to the reference's own error.
    for exact in ("exact_head 2", "control_variate 2"):
        assert abs(shares[exact]["mean"]) < 0.3
    assert set(equal["adaptive"]) == bounds
    certain = equal["adaptive"]["adaptive, certain, decisions"]
    assert certain["label_flips"] == certain["decision_flips"] == 0.0
    assert 2 <= equal["adaptive"]["adaptive, student"]["mean_samples"] <= 6


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_other_designs_have_packs_of_their_own(tmp_path: Path) -> None:
    found = further(tmp_path / "head", "--estimators", "exact_head", "--designs", "stratified")
    shares = found["on_equal_samples"]["shares"]
    for name in ("stratified", "exact_head, stratified"):
        assert {f"{name} 2", f"{name} 6"} < set(shares)
        assert shares[f"{name} 2"]["mean"] > shares[f"{name} 6"]["mean"]
    assert shares["exact_head, stratified 6"]["mean"] < shares["stratified 6"]["mean"] < 1
    plain = further(tmp_path / "plain", "--estimators", "blend", "--designs", "stratified")
    again = plain["on_equal_samples"]["shares"]
    assert "exact_head, stratified 2" not in again
    assert again["stratified 6"]["mean"] == pytest.approx(shares["stratified 6"]["mean"], rel=1e-3)


def test_what_an_adapter_does_not_allow_or_what_is_dear_is_left_out_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny_base(tmp_path / "base")

    def names(name: str, **adapter: Any) -> tuple[str, ...]:
        place = save_tiny_adapter(tmp_path / name, base, **adapter)
        return applicable(Predictor.load(place, base=str(base), device="cpu"))

    assert names("all") == FURTHER
    assert names("headless", targets=("q_proj",)) == tuple(n for n in FURTHER if n != "exact_head")
    assert names("wide", targets=("lm_head",), r=9) == names("headless-2", targets=("v_proj",))
    assert names("other", method="blob") == ("blend", "adaptive")
    monkeypatch.setattr("benchmarks.estimators_further.CHEAP_LABELS", 3)
    assert names("four-labels") == ("exact_head", "blend", "adaptive")
