"""A real vLLM against the local engine: `make test-vllm`, not part of the gate."""

import json
from pathlib import Path

import pytest

from benchmarks.serving.vllm_parity import main
from tests.support.required import require_or_skip

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


@pytest.mark.vllm
def test_a_real_vllm_gives_the_local_engines_numbers(tmp_path: Path) -> None:
    require_or_skip("vllm", PYTHON.is_file())
    output = tmp_path / "parity.json"
    assert main(["--python", str(PYTHON), "--output", str(output)]) == 0
    found = json.loads(output.read_text("utf-8"))
    assert found["rows"] == 12
    assert found["probabilities"] <= 1e-4
    assert found["label_mass"] <= 0.05
