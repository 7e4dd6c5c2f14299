"""benchmarks.training_step: ours and the peer take steps on the same batches."""

import argparse
from pathlib import Path

import pytest

from benchmarks.training_step import PEER, contender
from dalorra_core.data.labels import LabelSet
from tests.support.tiny_models import LABEL_TOKENS, batch_of, random_rows, save_tiny_base


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT's own
@pytest.mark.parametrize("name", [PEER, "mle", "dalorra"])
def test_contenders_take_steps(tmp_path: Path, name: str) -> None:
    base = save_tiny_base(tmp_path / "base")
    labels = LabelSet(tuple("ABCDE"), LABEL_TOKENS[:5])
    options = argparse.Namespace(base=str(base), device="cpu", precision="float32")
    step = contender(name, labels, options)
    for seed in range(3):
        step(batch_of(random_rows((5, 3), seed=seed)))
