"""From configuration to trained parameters: a run of the loop for each member, then a fit.

Most methods train once and are done. An ensemble trains its members one after the other; a method
that is fitted after training trains as another one first.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from dalorra_core.adapters.gradients import LabelGradients
from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.state import AdapterState
from dalorra_core.artifact.store import as_stored
from dalorra_core.methods import METHODS
from dalorra_core.methods.method import FitContext
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.gradients import label_gradients_of_rows
from dalorra_core.predictive.scoring import padded_token_limit, score_rows
from dalorra_core.predictive.stem import kept_stem_states
from dalorra_core.training.loop import TrainingResult, train
from dalorra_core.training.prepare import TrainingData
from dalorra_core.training.settings import TrainConfig
from dalorra_core.training.step import TrainStep

__all__ = ["fit_after_training", "member_seed", "train_members"]

_SEEDS_APART = 1_000_003
"""Members of one run and runs of nearby seeds share no seed."""


def member_seed(seed: int, member: int) -> int:
    """Return the seed of one member; the first has the run's own."""
    return (seed + _SEEDS_APART * member) % 2**64


def train_members(  # noqa: PLR0913
    label_model: LabelModel,
    specs: tuple[TargetSpec, ...],
    data: TrainingData,
    config: TrainConfig,
    run_dir: Path,
    accelerator: Accelerator,
    *,
    base: str,
    resume: bool,
    report: Callable[[str], None],
    start: Mapping[str, Tensor] | None = None,
) -> TrainingResult:
    """Run the training loop as often as the method asks and return the whole adapter.

    A finished member is not trained again when a run resumes: its last checkpoint is its result.

    Args:
        label_model: The frozen model with adapted layers.
        specs: Adapted modules.
        data: Encoded rows.
        config: The run.
        run_dir: Checkpoints and logs; members have a folder each.
        accelerator: Device, precision and gradient accumulation.
        base: Fingerprint of the base model.
        resume: Continue from the newest checkpoints.
        report: Called with lines for the user.
        start: Factors that every member starts from; None draws them.
    """
    method = METHODS[config.method.name]
    members = method.members(config.method)
    results = []
    for member in range(members):
        seed = member_seed(config.run.seed, member)
        own = config.model_copy(
            update={
                "method": method.trained_as(config.method),
                "run": config.run.model_copy(update={"seed": seed}),
            }
        )
        module = TrainStep(
            label_model,
            specs,
            config.adapter,
            own.method,
            optim=config.optim,
            num_examples=len(data.train),
            seed=seed,
            recompute=config.run.recompute,
            start=start,
        ).to(label_model.head.weight.device)
        label = f", member {member + 1} of {members}" if members > 1 else ""
        report(_opening(config, data, module) + label)
        folder = run_dir / f"member-{member}" if members > 1 else run_dir
        folder.mkdir(parents=True, exist_ok=True)
        results.append(train(module, data, own, folder, accelerator, base=base, resume=resume))
        accelerator.free_memory()  # it would hold on to every member's module and optimisers
    whole = results[0]
    if members > 1:
        params = method.join([result.state for result in results])
        whole = replace(
            whole,
            state=replace(whole.state, params=params),
            seconds=sum(result.seconds for result in results),
        )
    return whole


def fit_after_training(
    label_model: LabelModel,
    data: TrainingData,
    config: TrainConfig,
    result: TrainingResult,
    report: Callable[[str], None],
    *,
    exact: bool = False,
) -> TrainingResult:
    """Return the result with what the method fits once the parameters are trained, if it does.

    The fit sees the parameters as they will be stored, so that it makes no difference whether they
    were just trained or read from an artifact.

    Args:
        label_model: The frozen model with adapted layers.
        data: Encoded rows.
        config: The run.
        result: The trained parameters.
        report: Called with lines for the user.
        exact: They will be stored without rounding; see ``pack_tensors``.
    """
    method = METHODS[config.method.name]
    if method.fit is None:
        return result
    started = time.monotonic()
    device = label_model.head.weight.device
    params = {k: v.to(device) for k, v in as_stored(result.state.params, exact=exact).items()}
    state = replace(result.state, params=params)
    found = method.fit(state, config.method, _fit_context(label_model, state, data, config, report))
    fitted = {name: value.detach().cpu() for name, value in found.items()}
    seconds = result.seconds + time.monotonic() - started
    return replace(result, state=replace(result.state, params=fitted), seconds=seconds)


def _fit_context(
    label_model: LabelModel,
    state: AdapterState,
    data: TrainingData,
    config: TrainConfig,
    report: Callable[[str], None],
) -> FitContext:
    device = label_model.head.weight.device
    limit, labels = padded_token_limit(device), len(data.label_set.labels)
    modules = METHODS[config.method.name].gradient_modules(state.specs, config.method)
    kept = kept_stem_states(label_model, data.train)

    def predict(pack: SamplePack, indices: Sequence[int]) -> Tensor:
        return score_rows(
            label_model,
            pack.to(device, torch.float32),
            [data.train[i] for i in indices],
            num_labels=labels,
            max_padded_tokens=limit,
            stems=None if kept is None else kept.pick(indices),
        ).log_probs

    def gradients(pack: SamplePack, indices: Sequence[int]) -> Iterator[LabelGradients]:
        rows = [data.train[i] for i in indices]
        moved = pack.to(device, torch.float32)
        chunks = label_gradients_of_rows(
            label_model,
            moved,
            rows,
            modules=modules,
            max_padded_tokens=limit,
            stems=None if kept is None else kept.pick(indices),
        )
        return (found for _, found in chunks)

    return FitContext(
        num_rows=len(data.train),
        seed=config.run.seed,
        predict=predict,
        gradients=gradients,
        report=report,
    )


def _opening(config: TrainConfig, data: TrainingData, module: TrainStep) -> str:
    trainable = sum(p.numel() for p in module.params.values())
    tokens = sum(len(r.token_ids) for r in data.train)
    epochs = (
        config.optim.steps * config.optim.batch_size * config.optim.gradient_accumulation
    ) / len(data.train)
    return (
        f"{config.method.name} on {config.base}: {len(data.train)} rows ({tokens} tokens), "
        f"{len(data.label_set.labels)} labels, {len(module.state.specs)} adapted modules, "
        f"{trainable} trained parameters, {config.optim.steps} steps = {epochs:.1f} epochs"
    )
