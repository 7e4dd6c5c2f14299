"""Fix the gates of lower layers at their keep probabilities, so that all samples share them.

A gate that is the same in every sample is no gate: its probability goes into the column of B that
it scales, and what is left is plain LoRA. Samples then differ from a later layer on, and all that
lies below it is run once (docs/decisions/0032).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import JsonValue

from dalorra_core.adapters.state import AdapterState
from dalorra_core.artifact.placing import scratch_directory
from dalorra_core.artifact.store import Artifact, load_artifact, pack_tensors, save_artifact
from dalorra_core.data.rows import parse_row
from dalorra_core.errors import ConfigError
from dalorra_core.methods.dalorra import PHI
from dalorra_core.predictive.matching import state_of
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.training.finishing import golden_probes

__all__ = ["ALWAYS_ON", "METHODS_WITH_PLAIN_GATES", "fix_gates", "gates_fixed_below"]

ALWAYS_ON = 40.0
"""Logit of a gate that is on in every sample: off with probability 4e-18."""

METHODS_WITH_PLAIN_GATES = ("dalorra", "frozen_gates")
"""Methods whose gates are independent and have no weight but their logit."""


def gates_fixed_below(state: AdapterState, layer: int) -> AdapterState:
    """Return a state whose gates below a decoder layer are on, at B diag(p) in place of B.

    Its mean mask is that of the state, to rounding.

    Args:
        state: Of a method with plain gates.
        layer: Gates of this one and later ones, and those of the label head, stay as they are.

    Source:
        docs/method.md, section 6, eq. (J14).
    """
    params = dict(state.params)
    phi = params[PHI].clone()  # (L, r)
    for place, spec in enumerate(state.specs):
        if spec.layer is not None and spec.layer < layer:
            up = f"{spec.name}.lora_B"  # (d_out, r)
            params[up] = params[up] * phi[place].sigmoid()
            phi[place] = ALWAYS_ON
    return replace(state, params=params | {PHI: phi})


def fix_gates(
    source: Path,
    output: Path,
    *,
    below_layer: int,
    name: str | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter whose gates are fixed below a decoder layer; it is to be calibrated anew.

    Args:
        source: Artifact directory.
        output: Artifact directory to write.
        below_layer: See ``gates_fixed_below``; at least one adapted layer lies below it.
        name: Of the new adapter; None takes the old one's.
        base: Base model directory, hub id or alias; None takes the one named in the manifest.
        overwrite: Replace an existing artifact at ``output``.

    Returns:
        ``output``.

    Raises:
        ConfigError: There is nothing to fix below that layer, or the method has other gates.
        ArtifactError: The source cannot be read, or the target not be written.
        BaseModelError: The base model, which computes the golden probes, is not there.
    """
    artifact = load_artifact(source)
    manifest = artifact.manifest
    if output.exists() and not overwrite:
        raise ConfigError(f"output {output} already exists; pass --overwrite to replace it")
    state = _fixable(artifact, below_layer)
    tensors = pack_tensors(gates_fixed_below(state, below_layer).params)
    origin: dict[str, JsonValue] = {
        "gates_fixed": {
            "below_layer": below_layer,
            "from": manifest.name,
            "sha256": artifact.sha256,
        }
    }
    fixed = manifest.model_copy(
        update={
            "name": manifest.name if name is None else name,
            "policies": (),
            "calibration": None,
            "golden": (),
            "golden_predictive": None,
            "provenance": _without_its_answers(manifest.provenance) | origin,
        }
    )
    rows = [
        parse_row({"id": probe.id, **probe.row}, require_labels=False) for probe in manifest.golden
    ]
    with scratch_directory(output) as scratch:
        staged = scratch / "artifact"
        save_artifact(staged, fixed, tensors)
        predictor = Predictor.load(staged, base=base, dtype="float32", verify_golden=False)
        fixed = predictor.manifest.model_copy(update={"golden": golden_probes(predictor, rows)})
    save_artifact(output, fixed, tensors, overwrite=overwrite)
    return output


def _without_its_answers(provenance: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Leave out what was measured on the answers of the adapter as it was."""
    return {key: value for key, value in provenance.items() if key != "validation"}


def _fixable(artifact: Artifact, below_layer: int) -> AdapterState:
    """Return the state of an artifact that has gates below and from that layer on.

    Raises:
        ConfigError: It has not.
    """
    method = artifact.manifest.method.name
    if method not in METHODS_WITH_PLAIN_GATES:
        raise ConfigError(
            f"method must be one of {', '.join(METHODS_WITH_PLAIN_GATES)} to fix its gates, "
            f"got {method}"
        )
    state = state_of(artifact)
    layers = [spec.layer for spec in state.specs if spec.layer is not None]
    if not layers or not min(layers) < below_layer <= max(layers):
        there = f"{min(layers) + 1} to {max(layers)}" if len(set(layers)) > 1 else "none"
        raise ConfigError(
            f"below_layer must have adapted layers below it and from it on, here {there}; got "
            f"{below_layer}"
        )
    return state
