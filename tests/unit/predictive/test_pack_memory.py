"""What a loaded adapter says its sample packs take in memory, and what it refuses to draw."""

from pathlib import Path

import pytest

from dalorra_core.errors import ConfigError
from dalorra_core.predictive import predictor as predictor_module
from dalorra_core.predictive.plan import SamplingPlan
from dalorra_core.predictive.predictor import Predictor
from tests.support.tiny_artifacts import save_tiny_adapter
from tests.support.tiny_models import random_rows, save_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("pack-memory") / "base")


def loaded(base: Path, folder: Path, method: str) -> Predictor:
    adapter = save_tiny_adapter(folder / method, base, method=method)
    return Predictor.load(adapter, base=str(base), device="cpu")


def bytes_of_noise(predictor: Predictor) -> int:
    """One float32 for each entry of every A."""
    return sum(4 * predictor.manifest.r * m.d_in for m in predictor.manifest.modules)


def test_more_samples_than_fit_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = loaded(base, tmp_path, "blob")
    each = bytes_of_noise(predictor)
    monkeypatch.setattr(predictor_module, "MOST_PACK_BYTES", 6 * each - 1)
    assert predictor.max_num_samples == 5
    assert predictor.pack(SamplingPlan(5)).num_samples == 5
    message = rf"at most 5 for this adapter, got 6: a sample takes {each} bytes.* {6 * each - 1}"
    with pytest.raises(ConfigError, match=message):
        predictor.pack(SamplingPlan(6))
    assert predictor.pack(SamplingPlan(6, estimator="mean_mask")).num_samples == 1


def test_what_is_not_drawn_has_no_such_limit(base: Path, tmp_path: Path) -> None:
    for method in ("mle", "ensemble"):
        assert loaded(base, tmp_path, method).max_num_samples is None


def test_the_default_pack_counts_whatever_its_size(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = loaded(base, tmp_path, "blob")
    monkeypatch.setattr(predictor_module, "BYTES_KEPT", 0)
    without = predictor.memory_bytes - 3 * bytes_of_noise(predictor)
    monkeypatch.setattr(predictor_module, "BYTES_KEPT", 10 * bytes_of_noise(predictor))
    assert predictor.memory_bytes == without + 10 * bytes_of_noise(predictor)
    head = predictor.model.head
    stored = sum(t.nbytes for t in predictor.artifact.tensors.values())
    assert without == stored + head.weight.nbytes + head.token_ids.nbytes


def test_noise_of_tokens_counts_before_it_is_drawn(base: Path, tmp_path: Path) -> None:
    predictor = loaded(base, tmp_path, "c_lora")
    before, longest = predictor.memory_bytes, predictor.max_tokens
    predictor.predict(random_rows((longest,), num_labels=4))
    assert predictor.memory_bytes == before
    pack = predictor.pack(predictor.default_plan)
    noise = sum(t.nbytes for t in pack.tensors() if t.dim() == 3 and len(t) == pack.num_samples)
    positions = sum(1 if m.name == "lm_head" else longest for m in predictor.manifest.modules)
    assert noise == 4 * pack.num_samples * predictor.manifest.r * positions
