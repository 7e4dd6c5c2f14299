"""A PEFT LoRA becomes an artifact: as it is, or with what a method fits to it afterwards.

Everything but the factors is what a training run would have: rows, labels, prompt, tokens, default
policy and golden probes come from the same settings by the same code.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.plain_lora import PlainLora
from dalorra_core.adapters.state import AdapterState
from dalorra_core.artifact.peft_io import peft_sha256, read_peft
from dalorra_core.artifact.placing import scratch_directory
from dalorra_core.artifact.reading import read_file
from dalorra_core.artifact.store import pack_tensors, save_artifact
from dalorra_core.config import AdapterConfig
from dalorra_core.data.labels import LabelSet
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.shared_base import SharedBase, identify
from dalorra_core.training.finishing import finished, manifest_of
from dalorra_core.training.loop import TrainingResult
from dalorra_core.training.members import fit_after_training
from dalorra_core.training.peft_factors import factors_for, read_lora, specs_of
from dalorra_core.training.prepare import TrainingData, prepare_training_data
from dalorra_core.training.settings import TrainConfig

__all__ = ["check_is_plain", "import_peft", "read_label_tokens"]

_LARGEST_FILE = 1 << 24


def import_peft(
    directory: Path,
    config: TrainConfig,
    output: Path,
    *,
    label_tokens: Mapping[str, int] | None = None,
    overwrite: bool = False,
    report: Any = print,
) -> Path:
    """Write a plain PEFT LoRA as an artifact, with what the method fits to it.

    Its factors are kept exactly: where bfloat16 would change one, it is stored in float32.

    Args:
        directory: PEFT directory.
        config: As for a training run; ``adapter`` comes from the directory and what is about the
            training itself has no effect. The method is ``mle``, or one fitted on ``mle``.
        output: Artifact directory to write.
        label_tokens: Token that the LoRA was trained to answer each label with; None takes the
            ones that training would have chosen.
        overwrite: Replace an existing artifact at ``output``.
        report: Called with lines for the user.

    Returns:
        ``output``.

    Raises:
        ConfigError, DataError: A setting, a row or the label tokens cannot be used.
        ArtifactError: The directory cannot be read, or is more than plain LoRA.
        BaseModelError: The base model is not there, or the LoRA is not of its modules.
    """
    check_is_plain(config)
    if output.exists() and not overwrite:
        raise ConfigError(f"output {output} already exists; pass --overwrite to replace it")
    read_peft(directory)  # before the slow part
    identity = identify(config.base)
    run = config.run
    base = SharedBase.load(
        identity, device=run.device, dtype=run.precision, attention=run.attention
    )
    data = _with_tokens(prepare_training_data(config.data, base.tokenizer), label_tokens)
    token_ids, model = data.label_set.token_ids, base.trunk.model
    lora = read_lora(directory, model)
    report(
        f"{directory}: {len(lora.modules)} modules, r {lora.r}, lora_alpha "
        f"{lora.scaling * lora.r:g}"
    )
    specs = specs_of(model, lora, len(token_ids))
    label_model = LabelModel(base.trunk, specs, data.label_set)  # or says which token is none
    params = factors_for(model, lora, specs, token_ids)
    config = config.model_copy(update={"adapter": _adapter_of(lora, specs)})
    state = AdapterState(specs, lora.r, lora.scaling, params)
    METHODS[config.method.name].shapes(specs, lora.r, config.method)  # or says why not
    result = TrainingResult(state, steps=0, seconds=0.0, resumed_at=0)
    result = fit_after_training(label_model, data, config, result, report, exact=True)
    del label_model
    origin: dict[str, JsonValue] = {
        "from_peft": {"name": directory.resolve().name, "sha256": peft_sha256(directory)}
    }
    tensors = pack_tensors(result.state.params, exact=True)
    with scratch_directory(output) as scratch:
        staged = scratch / "artifact"
        save_artifact(staged, manifest_of(config, base, data, specs, result, origin), tensors)
        manifest = finished(staged, config, base, data, report)
    save_artifact(output, manifest, tensors, overwrite=overwrite)
    return output


def check_is_plain(config: TrainConfig) -> None:
    """Refuse a method that a LoRA alone does not make.

    Raises:
        ConfigError: It trains parameters of its own, or several adapters.
    """
    method = METHODS[config.method.name]
    inner = method.trained_as(config.method).name
    if inner != "mle" or method.members(config.method) > 1:
        raise ConfigError(
            "method must be mle, or one that is fitted on it afterwards (tfb, or laplace with "
            f"method.trained_as=mle), got {config.method.name}; dalorra train with adapter.start "
            "trains another method from the LoRA's factors"
        )


def read_label_tokens(path: Path) -> dict[str, int]:
    """Return the label tokens in a JSON file: one object from label to token id.

    Raises:
        ConfigError: It is something else.
        ArtifactError: It cannot be read.
    """
    try:
        values: Any = json.loads(read_file(path, _LARGEST_FILE))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"label_tokens: {path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"label_tokens: {path} must be an object from label to token id, got "
            f"{type(values).__name__}"
        )
    tokens: dict[str, int] = {}
    for label, token in values.items():
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ConfigError(
                f"label_tokens: {path} must have token ids from 0 on, got {token!r} for {label!r}"
            )
        tokens[label] = token
    return tokens


def _with_tokens(data: TrainingData, tokens: Mapping[str, int] | None) -> TrainingData:
    """Return the data with other tokens for its labels.

    Raises:
        ConfigError: The labels are others.
        DataError: Two labels have the same token.
    """
    if tokens is None:
        return data
    labels = data.label_set.labels
    if different := sorted(set(labels) ^ set(tokens)):
        raise ConfigError(
            f"label_tokens must name the {len(labels)} labels of the rows; these are in one of "
            f"the two only: {', '.join(different[:5])}"
        )
    return replace(data, label_set=LabelSet(labels, tuple(tokens[name] for name in labels)))


def _adapter_of(lora: PlainLora, specs: tuple[TargetSpec, ...]) -> AdapterConfig:
    """Return the settings under which a run would train such an adapter."""
    numbers = [spec.layer for spec in specs if spec.layer is not None]
    return AdapterConfig(
        r=lora.r,
        lora_alpha=lora.scaling * lora.r,
        target_modules=tuple(dict.fromkeys(spec.name.rpartition(".")[2] for spec in specs)),
        layers=(min(numbers), max(numbers)) if numbers else None,
    )
