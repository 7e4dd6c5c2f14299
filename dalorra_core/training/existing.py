"""Start a fit from an adapter that is trained already, instead of training one."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.state import AdapterState
from dalorra_core.artifact.manifest import Manifest
from dalorra_core.artifact.store import Artifact, load_artifact
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.predictive.matching import BaseIdentity, check_base, state_of
from dalorra_core.training.loop import TrainingResult
from dalorra_core.training.prepare import TrainingData
from dalorra_core.training.settings import TrainConfig

__all__ = ["check_is_fitted", "load_trained"]


def check_is_fitted(config: TrainConfig) -> None:
    """Refuse to start from an adapter where nothing would be done with it.

    Raises:
        ConfigError: The method trains its parameters itself and fits nothing afterwards, or
            the factors to start from are given twice.
    """
    if METHODS[config.method.name].fit is None:
        fitted = sorted(name for name, method in METHODS.items() if method.fit is not None)
        raise ConfigError(
            "--from-adapter is for methods that are fitted after training "
            f"({', '.join(fitted)}), got method {config.method.name}"
        )
    if config.adapter.start is not None:
        raise ConfigError(
            "adapter.start must be null with --from-adapter, which trains nothing, got "
            f"{config.adapter.start!r}"
        )


def load_trained(
    directory: Path,
    config: TrainConfig,
    base: BaseIdentity,
    data: TrainingData,
    specs: tuple[TargetSpec, ...],
) -> tuple[Artifact, TrainingResult]:
    """Return a stored adapter, and it as if it had just been trained.

    Args:
        directory: Its artifact.
        config: The run.
        base: The run's base model.
        data: The run's rows, labels and prompt.
        specs: The run's adapted modules.

    Raises:
        ArtifactError: It cannot be read, or belongs to another base model or tokenizer.
        ConfigError: The run's own training would have made another kind of adapter; names every
            difference with both values.
    """
    artifact = load_artifact(directory)
    check_base(artifact, base)
    differences = list(_differences(artifact.manifest, config, data, specs))
    if differences:
        lines = "\n".join(
            f"  {name}: {there} there, {here} here" for name, there, here in differences
        )
        raise ConfigError(f"--from-adapter {directory} is not what this run would train:\n{lines}")
    stored = state_of(artifact)
    state = AdapterState(stored.specs, stored.r, stored.scaling, dict(stored.params))
    return artifact, TrainingResult(state, steps=0, seconds=0.0, resumed_at=0)


def _differences(
    manifest: Manifest, config: TrainConfig, data: TrainingData, specs: tuple[TargetSpec, ...]
) -> Iterator[tuple[str, object, object]]:
    """Yield the settings that differ: (name, value of the adapter, value of this run)."""
    settings = METHODS[config.method.name].trained_as(config.method)
    yield from _changed("method", _flat(manifest.method), _flat(settings))
    stored = {module.name: _flat(module) for module in manifest.modules}
    own = {spec.name: {k: repr(v) for k, v in asdict(spec).items()} for spec in specs}
    if list(stored) != list(own):
        yield "adapter.target_modules", _names(list(stored)), _names(list(own))
    else:
        for name, values in stored.items():
            yield from _changed(f"module {name}", values, own[name])
    prompt, template = manifest.prompt, data.template
    for name, there, here in (
        ("adapter.r", manifest.r, config.adapter.r),
        ("adapter.lora_alpha", manifest.lora_alpha, config.adapter.lora_alpha),
        ("labels", manifest.labels.labels, data.label_set.labels),
        ("label tokens", manifest.labels.token_ids, data.label_set.token_ids),
        ("labels of every question", manifest.labels.union, data.union),
        ("kind of question", prompt.kind, template.kind),
        ("data.prompt", prompt.template, template.template),
        ("data.append_eos", prompt.append_eos, config.data.append_eos),
        ("data.max_tokens", prompt.max_tokens, config.data.max_tokens),
    ):
        if there != here:
            yield name, repr(there), repr(here)


def _flat(settings: Any) -> dict[str, str]:
    return {name: repr(value) for name, value in settings.model_dump(mode="json").items()}


def _changed(
    group: str, there: dict[str, str], here: dict[str, str]
) -> Iterator[tuple[str, object, object]]:
    for name in sorted(there.keys() | here.keys()):
        values = there.get(name, "nothing"), here.get(name, "nothing")
        if values[0] != values[1]:
            yield f"{group}.{name}", *values


def _names(modules: list[str]) -> str:
    shown = ", ".join(modules[:3])
    return f"{len(modules)} modules ({shown}{', ...' if len(modules) > 3 else ''})"  # noqa: PLR2004
