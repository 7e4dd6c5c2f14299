"""One training run from configuration to artifact."""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from pydantic import JsonValue

from dalorra_core.adapters.inject import TargetSpec, find_targets
from dalorra_core.adapters.state import label_rows_only
from dalorra_core.artifact.peft_io import peft_sha256
from dalorra_core.artifact.store import load_artifact, pack_tensors, save_artifact
from dalorra_core.base_models.loading import load_tokenizer, pick_device, pick_dtype
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.matching import BaseIdentity
from dalorra_core.predictive.shared_base import SharedBase, identify
from dalorra_core.predictive.stem import kept_stem_states
from dalorra_core.training.existing import check_is_fitted, load_trained
from dalorra_core.training.finishing import finished, manifest_of
from dalorra_core.training.loop import run_identity
from dalorra_core.training.members import fit_after_training, train_members
from dalorra_core.training.peft_factors import starting_factors
from dalorra_core.training.prepare import TrainingData, prepare_training_data, rows_digest
from dalorra_core.training.processes import PATIENCE, Processes
from dalorra_core.training.settings import TrainConfig

__all__ = ["run_training"]


def run_training(  # noqa: PLR0913  options by name
    config: TrainConfig,
    output: Path,
    run_dir: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    from_adapter: Path | None = None,
    base: SharedBase | None = None,
    report: Any = print,
) -> Path:
    """Train, evaluate on the held-out split, choose a policy and write the artifact.

    Args:
        config: The run.
        output: Artifact directory to write.
        run_dir: Checkpoints and logs; kept after the run.
        resume: Continue from the newest checkpoint of ``run_dir``.
        overwrite: Replace an existing artifact at ``output``.
        from_adapter: Artifact of the adapter that this run would train first, for a method that
            is fitted afterwards; None trains it.
        base: The base model of ``config`` with its device, precision and attention, where it is in
            memory already, as it is there; None loads it.
        report: Called with lines for the user.

    Returns:
        ``output``.

    Raises:
        ConfigError, DataError, BaseModelError, ArtifactError: All that can be known is checked
            before the first step.
    """
    if output.exists() and not overwrite:
        raise ConfigError(f"output {output} already exists; pass --overwrite to replace it")
    if from_adapter is not None:
        check_is_fitted(config)
    accelerator = _accelerator(config, run_dir)  # it also says which GPU is this process's
    report = report if accelerator.is_main_process else _silent
    identity = identify(config.base) if base is None else base.identity
    tokenizer = load_tokenizer(identity.directory) if base is None else base.tokenizer
    data = prepare_training_data(config.data, tokenizer)  # before the slow part
    base = base or _loaded(identity, config, data, Processes.of(accelerator), from_adapter)
    label_model, specs = _build(config, base, data)
    METHODS[config.method.name].shapes(specs, config.adapter.r, config.method)  # or says why not
    start = starting_factors(config.adapter, base.trunk.model, specs, data.label_set.token_ids)
    origin: dict[str, JsonValue] = {}
    if config.adapter.start is not None:
        origin = {"start": {"sha256": peft_sha256(Path(config.adapter.start))}}
    run_dir.mkdir(parents=True, exist_ok=True)
    if config.run.tensorboard:
        accelerator.init_trackers("tensorboard")
    kept_stem_states(label_model, data.train)  # where they are shared, they are no part of a run
    if from_adapter is None:
        result = train_members(
            label_model,
            specs,
            data,
            config,
            run_dir,
            accelerator,
            base=identity.fingerprint,
            resume=resume,
            report=report,
            start=start,
        )
    else:
        stored, result = load_trained(from_adapter, config, identity, data, specs)
        origin = {"from_adapter": {"name": stored.manifest.name, "sha256": stored.sha256}}
    if not base.trunk.sharded:  # otherwise all run what the first would run alone
        accelerator.end_training()
    if base.trunk.sharded or accelerator.is_main_process:
        result = fit_after_training(label_model, data, config, result, report)
        manifest = manifest_of(config, base, data, specs, result, origin)
        staged = run_dir / f"artifact-{accelerator.process_index}"
        save_artifact(staged, manifest, pack_tensors(result.state.params), overwrite=True)
        manifest = finished(staged, config, base, data, report)
        if accelerator.is_main_process:  # nobody sees an adapter without its policy and probes
            tensors = pack_tensors(load_artifact(staged).tensors)
            save_artifact(output, manifest, tensors, overwrite=overwrite)
        shutil.rmtree(staged)
    if base.trunk.sharded:
        accelerator.end_training()
    return output


def _accelerator(config: TrainConfig, run_dir: Path) -> Accelerator:
    device = pick_device(config.run.device)
    bf16 = pick_dtype(config.run.precision, device) is torch.bfloat16
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        # On a CPU the frozen weights are loaded in bfloat16 and need no autocast.
        mixed_precision="bf16" if bf16 and device.type == "cuda" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            config.optim.gradient_accumulation  # as a number, a launcher's environment would win
        ),
        log_with="tensorboard" if config.run.tensorboard else None,
        project_dir=str(run_dir) if config.run.tensorboard else None,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    count = Processes.of(accelerator).count
    if config.optim.batch_size < count:
        raise ConfigError(
            f"optim.batch_size must be at least the {count} processes that share its rows, got "
            f"{config.optim.batch_size}"
        )
    return accelerator


def _loaded(
    identity: BaseIdentity,
    config: TrainConfig,
    data: TrainingData,
    processes: Processes,
    from_adapter: Path | None,
) -> SharedBase:
    """Load the base model, spread over the processes where the settings say so.

    Processes that differ in anything that passes depend on would then wait for one another.
    """
    run = config.run
    own = run_identity(config, data, identity.fingerprint)
    own |= {"run.shard_base": run.shard_base, "from_adapter": from_adapter is not None}
    own["validation_rows"] = rows_digest(data.validation) if run.shard_base else None
    processes.check_same(own)
    return SharedBase.load(
        identity,
        device=run.device,
        dtype=run.precision,
        attention=run.attention,
        sharded=run.shard_base and processes.count > 1,
    )


def _silent(_: str) -> None:
    """Take what other processes than the first would report."""


def _build(
    config: TrainConfig, base: SharedBase, data: TrainingData
) -> tuple[LabelModel, tuple[TargetSpec, ...]]:
    found = find_targets(base.trunk.model, config.adapter.target_modules, config.adapter.layers)
    specs = label_rows_only(found, len(data.label_set.labels))
    return LabelModel(base.trunk, specs, data.label_set), specs
