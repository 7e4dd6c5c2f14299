"""benchmarks.detection on a tiny adapter, held to torchmetrics' area."""

import json
from pathlib import Path

import pytest
import torch
from torchmetrics.functional.classification import binary_auroc

from benchmarks.detection import main
from dalorra_core.artifact.store import load_artifact
from dalorra_core.data.examples import TextExample
from dalorra_core.metrics import summarise
from dalorra_core.predictive.predictor import Predictor
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter, with_manifest
from tests.support.tiny_models import save_tiny_base, write_jsonl


def test_areas_of_the_plan_stand_beside_the_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_tiny_base(tmp_path / "base")
    adapter = save_tiny_adapter(tmp_path / "tiny", base)
    known = load_artifact(adapter).manifest.labels
    with_manifest(adapter, labels=known.model_copy(update={"out_of_scope_label": "oos"}))
    texts = [f"{TEXTS[i % 4]} {TEXTS[i // 4]}" for i in range(16)]
    outside = [i % 3 == 0 for i in range(16)]
    rows = [
        {"id": f"{i}", "text": text, "label": "oos" if outside[i] else known.labels[0]}
        for i, text in enumerate(texts)
    ]
    found_at = tmp_path / "found.json"
    sizes = ("--rows", "100", "--outside", "100", "--reference", "64", "--resamples", "200")
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ("--texts", str(data), *sizes, "--device", "cpu", "--output", str(found_at))
    assert main([str(adapter), *options]) == 0
    found = json.loads(found_at.read_text("utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    assert (found["rows"], found["outside"]) == (10, 6)

    predictor = Predictor.load(adapter, base=str(base), device="cpu")
    encoded = [predictor.encode(TextExample(f"{i}", text)) for i, text in enumerate(texts)]
    information = summarise(predictor.predict(encoded).log_probs).mutual_information
    area = float(binary_auroc(information, torch.tensor(outside).long()))
    assert found["auroc"]["plan"]["mutual_information"] == pytest.approx(area, abs=1e-6)

    gaps = found["less_the_reference"]
    assert set(gaps) == {"plan", "iid 10", "half", "other half"}
    for name, of in gaps.items():
        for score, gap in of.items():
            areas = [found["auroc"][which][score] for which in (name, "reference")]
            assert gap["value"] == pytest.approx(areas[0] - areas[1])
            assert gap["low"] <= gap["value"] <= gap["high"]
