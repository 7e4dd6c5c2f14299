"""benchmarks.estimators on a tiny adapter: every estimator beside PEFT, which gives the same."""

import json
from pathlib import Path

import pytest

from benchmarks.estimators import main
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
    options = ("--rows", "8", "--reference", "64", "--repeats", "2", "--timed-rows", "3")
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
