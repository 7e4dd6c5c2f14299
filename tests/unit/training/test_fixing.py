"""dalorra_core.training.fixing: lower gates become columns of B, and samples share those layers."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dalorra_core.adapters.plain_lora import plain_loras
from dalorra_core.artifact.store import as_stored, load_artifact
from dalorra_core.cli import app
from dalorra_core.errors import ConfigError
from dalorra_core.methods.dalorra import METHOD, PHI, DalorraConfig
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.matching import state_of
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.training.fixing import METHODS_WITH_PLAIN_GATES, fix_gates, gates_fixed_below
from tests.support.tiny_artifacts import save_tiny_adapter, with_manifest
from tests.support.tiny_manifest import tiny_manifest
from tests.support.tiny_models import (
    assert_near,
    batch_of,
    merged_label_logits,
    random_rows,
    save_tiny_base,
    tiny_adapter,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("base"))


def test_fixed_gates_stand_at_their_means_and_the_others_are_drawn_as_before() -> None:
    tiny = tiny_adapter(num_hidden_layers=3)
    fixed, config = gates_fixed_below(tiny.state, 2), DalorraConfig()
    draw = Draw(("fixing",), 4)
    before = METHOD.predict_pack(tiny.state, config, draw)
    after = METHOD.predict_pack(fixed, config, draw)
    loras = list(plain_loras(after.condensed()))
    (row,) = random_rows((6,))
    for m, lora in enumerate(loras):
        gates = {}
        for place, spec in enumerate(tiny.state.specs):
            drawn = before.modules[spec.name].z
            assert drawn is not None
            low = spec.layer is not None and spec.layer < 2
            gates[spec.name] = tiny.state.params[PHI][place].sigmoid() if low else drawn[m]
            up = tiny.state.params[f"{spec.name}.lora_B"] * gates[spec.name]
            torch.testing.assert_close(lora.modules[spec.name].up, up)
        expected = merged_label_logits(tiny, row.token_ids, gates)
        found = tiny.model(batch_of([row]), after.narrow(m, m + 1)).logits[0, 0]
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_mean_mask_stays() -> None:
    tiny, rows = tiny_adapter(num_hidden_layers=3), batch_of(random_rows((6, 4)))
    packs = [
        METHOD.mean_pack(state, DalorraConfig())
        for state in (tiny.state, gates_fixed_below(tiny.state, 2))
    ]
    before, after = (tiny.model(rows, pack).logits for pack in packs)
    assert_near(after, before)


@pytest.mark.parametrize("method", METHODS_WITH_PLAIN_GATES)
def test_an_adapter_is_written_whole(method: str, base: Path, tmp_path: Path) -> None:
    source = save_tiny_adapter(tmp_path / "topics", base, r=2, method=method)
    with_manifest(
        source,
        policies=tiny_manifest().policies,
        provenance={"steps": 3, "validation": {"nll": 1.0}},
    )
    found = fix_gates(source, tmp_path / "fast", below_layer=1, name="fast", base=str(base))
    artifact = load_artifact(found)
    assert artifact.manifest.name == "fast"
    assert artifact.manifest.policies == ()
    assert artifact.manifest.method == load_artifact(source).manifest.method
    assert artifact.manifest.provenance.keys() == {"steps", "gates_fixed"}
    assert artifact.manifest.provenance["gates_fixed"] == {
        "below_layer": 1,
        "from": "topics",
        "sha256": load_artifact(source).sha256,
    }
    old = Predictor.load(source, base=str(base))
    new = Predictor.load(found, base=str(base))  # which checks its golden probes
    assert len(artifact.manifest.golden) == 2
    expected = as_stored(gates_fixed_below(state_of(load_artifact(source)), 1).params)
    assert all(torch.equal(artifact.tensors[name].float(), expected[name]) for name in expected)
    assert new.mask_set(new.default_plan) != old.mask_set(old.default_plan)
    pack = new.pack(new.default_plan)
    shared = {name for name, module in pack.modules.items() if module.shared}
    assert shared == {m.name for m in artifact.manifest.modules if m.layer == 0}


@pytest.mark.parametrize(
    ("layers", "below", "method", "said"),
    [
        ((0, 1), 0, "dalorra", "here 1 to 1; got 0"),
        ((0, 1), 2, "dalorra", "here 1 to 1; got 2"),
        ((1, 1), 1, "dalorra", "here none; got 1"),
        ((0, 1), 1, "mle", "method must be one of dalorra, frozen_gates to fix its gates, got mle"),
    ],
)
def test_what_has_nothing_to_fix_is_refused(
    base: Path, tmp_path: Path, layers: tuple[int, int], below: int, method: str, said: str
) -> None:
    source = save_tiny_adapter(tmp_path / "topics", base, layers=layers, method=method)
    with pytest.raises(ConfigError, match=said):
        fix_gates(source, tmp_path / "fast", below_layer=below, base=str(base))
    assert not (tmp_path / "fast").exists()


def test_an_existing_output_is_kept_unless_told(base: Path, tmp_path: Path) -> None:
    source = save_tiny_adapter(tmp_path / "topics", base, r=2)
    output = fix_gates(source, tmp_path / "fast", below_layer=1, base=str(base))
    kept = (output / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match="already exists; pass --overwrite"):
        fix_gates(source, output, below_layer=1, base=str(base))
    assert (output / "manifest.json").read_bytes() == kept
    fix_gates(source, output, below_layer=1, name="again", base=str(base), overwrite=True)
    assert load_artifact(output).manifest.name == "again"


def test_the_command_says_what_comes_next(base: Path, tmp_path: Path) -> None:
    source = save_tiny_adapter(tmp_path / "topics", base, r=2)
    arguments = [str(source), "-o", str(tmp_path / "fast"), "--base", str(base)]
    found = CliRunner().invoke(app, ["fix-gates", *arguments, "--below-layer", "1"])
    assert found.exit_code == 0, found.output
    assert "it has no policy: dalorra calibrate" in found.output
    refused = CliRunner().invoke(app, ["fix-gates", *arguments, "--below-layer", "1"])
    assert refused.exit_code == 1
    assert "already exists; pass --overwrite" in refused.output
