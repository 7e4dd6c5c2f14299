"""The training loop: accelerate underneath, exact resume, and a run directory to come back to.

Nothing here draws a random number: batches come from (seed, epoch), gates from (seed, step), so the
state of a run is its step count, its parameters and Adam's moments.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from dalorra_core.adapters.state import AdapterState
from dalorra_core.config import OptimConfig
from dalorra_core.data.collate import EncodedExample, TokenBatch, collate, length_buckets
from dalorra_core.data.tasks import task_of
from dalorra_core.errors import ConfigError, DalorraError
from dalorra_core.methods.method import Draw
from dalorra_core.predictive.scoring import padded_token_limit, score_rows
from dalorra_core.predictive.stem import kept_stem_states, stem_states
from dalorra_core.predictive.trunk import RowStates
from dalorra_core.training.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from dalorra_core.training.evaluation import evaluate, json_number
from dalorra_core.training.prepare import TrainingData, rows_digest
from dalorra_core.training.processes import Processes
from dalorra_core.training.progress import Progress
from dalorra_core.training.settings import TrainConfig
from dalorra_core.training.step import StepLoss, TrainStep
from dalorra_core.training.updates import Updater

__all__ = ["TrainingResult", "last_step", "micro_batches", "run_identity", "train"]

_LOG_EVERY = 10


@dataclass(frozen=True)
class TrainingResult:
    """What a finished run leaves behind.

    Attributes:
        state: The trained adapter, on the CPU.
        steps: Optimiser steps.
        seconds: Wall time of this process's part of the run.
        resumed_at: Step it continued from, 0 for a fresh run.
    """

    state: AdapterState
    steps: int
    seconds: float
    resumed_at: int


def micro_batches(
    lengths: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    start: int,
    shuffle: bool = True,
) -> Iterator[list[int]]:
    """Yield the row indices of batch ``start`` and those that follow, for ever.

    Batch k of the endless sequence of epochs is the same whoever asks for it, so a resumed run
    finds its place by arithmetic. Without ``shuffle`` every epoch is the rows in their order, the
    last incomplete batch left out.
    """
    per_epoch = _batches_per_epoch(len(lengths), batch_size, shuffle=shuffle)
    in_order = [list(range(k * batch_size, (k + 1) * batch_size)) for k in range(per_epoch)]
    epoch, batches, k = -1, in_order, start
    while True:
        if shuffle and k // per_epoch != epoch:
            epoch = k // per_epoch
            batches = length_buckets(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
        yield batches[k % per_epoch]
        k += 1


def _batches_per_epoch(num_rows: int, batch_size: int, *, shuffle: bool) -> int:
    if not shuffle and num_rows < batch_size:
        raise ConfigError(
            f"data.no_shuffle leaves incomplete batches out: optim.batch_size must be at most the "
            f"{num_rows} training rows, got {batch_size}"
        )
    return -(-num_rows // batch_size) if shuffle else num_rows // batch_size


def last_step(optim: OptimConfig, num_rows: int, *, shuffle: bool) -> int:
    """Return the step after which training ends.

    Args:
        optim: ``steps``, or with ``run_to_epoch_end`` the end of the epoch that its last step is
            in; the learning rate is 0 there, so only what does not follow it can move.
        num_rows: Training rows.
        shuffle: Whether an epoch has its last incomplete batch.

    Source:
        methods.md 1.7: published runs have ceil(steps / floor(N / b)) epochs.

    Example:
        >>> last_step(OptimConfig(run_to_epoch_end=True), 640, shuffle=False)
        5120
    """
    if not optim.run_to_epoch_end:
        return optim.steps
    per_epoch = _batches_per_epoch(num_rows, optim.batch_size, shuffle=shuffle)
    per_step = optim.gradient_accumulation
    epochs = -(-optim.steps * per_step // per_epoch)
    return -(-epochs * per_epoch // per_step)


def train(  # noqa: PLR0913  one call says all of a run
    module: TrainStep,
    data: TrainingData,
    config: TrainConfig,
    run_dir: Path,
    accelerator: Accelerator,
    *,
    base: str,
    resume: bool,
) -> TrainingResult:
    """Run the optimiser steps that remain and return the adapter.

    Args:
        module: Frozen label model with the adapter's initial parameters.
        data: Encoded rows.
        config: The run.
        run_dir: Checkpoints, ``metrics.jsonl`` and logs go here.
        accelerator: Device, precision and gradient accumulation.
        base: Fingerprint of the base model; a checkpoint is of one base, wherever that lies.
        resume: Continue from the newest checkpoint when there is one.

    Raises:
        ConfigError: If ``run_dir`` holds checkpoints and ``resume`` is False, they belong to
            another configuration, or other processes do not have the same run before them.
        DalorraError: If the loss stops being finite, or another process is gone.
    """
    processes = Processes.of(accelerator)
    updater = Updater(module, config.optim, accelerator, processes)
    identity = run_identity(config, data, base)
    done = _restore(module, updater.adamw, identity, run_dir, resume=resume)
    processes.check_alike(identity, done, module.params)
    run = _Run(module, updater, data, config, run_dir, accelerator, processes, done, identity)
    started = time.monotonic()
    with Progress(run.last, done, enabled=accelerator.is_main_process) as progress:
        run.steps(progress)
    params = {name: value.detach().cpu().clone() for name, value in module.params.items()}
    state = AdapterState(module.state.specs, module.state.r, module.state.scaling, params)
    return TrainingResult(state, run.last, time.monotonic() - started, done)


def run_identity(config: TrainConfig, data: TrainingData, base: str) -> dict[str, Any]:
    """Return what a resumed run must have in common with the first, which may lie elsewhere now.

    That is its settings, training rows and base model. Names and places do not count where contents
    do: the adapter's name, where the base lies, and the directory of a task's data set. Nor does
    what changes no number: whether layers are run again for gradients or spread over processes.
    """
    places = {"root"} if task_of(config.data) is not None else set[str]()
    excluded = {"name": True, "data": places, "run": {"recompute", "shard_base"}}
    settings = config.model_dump(mode="json", exclude=excluded)
    return {**settings, "base": base, "train_rows": rows_digest(data.train)}


def _restore(
    module: TrainStep,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
    run_dir: Path,
    *,
    resume: bool,
) -> int:
    newest = latest_checkpoint(run_dir / "checkpoints")
    if newest is None:
        return 0
    if not resume:
        raise ConfigError(
            f"run directory {run_dir} already holds {newest.name}: pass --resume to continue it, "
            "or another --run-dir to start anew"
        )
    checkpoint = load_checkpoint(newest, identity)
    checkpoint.restore(optimizer, module.params)
    return checkpoint.step


@dataclass(frozen=True)
class _Logged:
    """The loss of one process's rows and their part of the micro-batch."""

    out: StepLoss
    weight: float

    @property
    def values(self) -> dict[str, float]:
        """What the log says; those of all processes sum to the values of the micro-batch."""
        out = self.out
        values = {"loss": float(out.loss.detach()), "nll": float(out.nll)}
        values |= {name: float(t.value.detach()) for name, t in out.kl_terms.items()}
        return {name: self.weight * value for name, value in values.items()}


class _Run:
    """One process's loop; holds what every step needs."""

    def __init__(  # noqa: PLR0913, PLR0917  a plain bundle of the loop's parts
        self,
        module: TrainStep,
        updater: Updater,
        data: TrainingData,
        config: TrainConfig,
        run_dir: Path,
        accelerator: Accelerator,
        processes: Processes,
        done: int,
        identity: dict[str, Any],
    ) -> None:
        self.module, self.updater, self.processes = module, updater, processes
        updater.prepare(done)
        self.data, self.config, self.run_dir = data, config, run_dir
        self.accelerator, self.done, self.identity = accelerator, done, identity
        self.num_labels = len(data.label_set.labels)
        self.stems: RowStates | None = None
        self.shuffle = not config.data.no_shuffle
        self.last = last_step(config.optim, len(data.train), shuffle=self.shuffle)

    def steps(self, progress: Progress) -> None:
        done, optim = self.done, self.config.optim
        batches = micro_batches(
            [len(row.token_ids) for row in self.data.train],
            batch_size=optim.batch_size,
            seed=self.config.run.seed,
            start=done * optim.gradient_accumulation,
            shuffle=self.shuffle,
        )
        visits = (self.last - done) * optim.gradient_accumulation * optim.batch_size
        own_visits = visits / self.processes.count
        if own_visits > len(self.data.train):  # fewer would not pay for the pass that finds them
            model, rows = self.module.label_model, self.data.train
            counted = progress.preparing("rows through the layers below the adapter", len(rows))
            self.stems = kept_stem_states(model, rows) or stem_states(model, rows, counted)
        for step in range(done, self.last):
            tokens, logged = 0, None
            for number in range(optim.gradient_accumulation):
                batch = self._batch(next(batches))
                tokens += batch.num_tokens
                logged = self._micro_step(batch, step, number)
            progress.advance(tokens)
            self._after_step(step + 1, cast("_Logged", logged), progress)

    def _batch(self, indices: list[int]) -> TokenBatch:
        rows = [self.data.train[i] for i in indices]
        batch = collate(rows, num_labels=self.num_labels)
        if self.stems is not None:
            batch = replace(batch, stem=self.stems.of(indices))
        return batch

    def _micro_step(self, batch: TokenBatch, step: int, part: int) -> "_Logged":
        share = self.processes.share(len(batch.labels))
        own = batch.rows(share.rows).to(self.accelerator.device)
        with self.accelerator.accumulate(self.module):
            with self.accelerator.autocast():
                out: StepLoss = self.module(own, step, part, share.rows.start)
            self.updater.apply(out, step, share.weight)
        return _Logged(out, share.weight)

    def _after_step(self, step: int, logged: "_Logged", progress: Progress) -> None:
        run, last = self.config.run, step == self.last
        if step % _LOG_EVERY == 0 or last:
            self._log(step, logged, progress)
        if step % run.checkpoint_every == 0 or last:
            self._checkpoint(step)
        if (step % run.eval_every == 0 or last) and self.data.validation:
            self._evaluate(step, progress)

    def _log(self, step: int, logged: "_Logged", progress: Progress) -> None:
        values = self.processes.total(logged.values, self.accelerator.device)
        if not all(torch.isfinite(torch.tensor(list(values.values())))):
            raise DalorraError(
                f"step {step}: the loss is not finite ({values}). Lower optim.lr or "
                "method.mask_lr; the last checkpoint is intact"
            )
        if "phi" in self.module.params:
            values["keep_prob"] = float(self.module.params["phi"].detach().sigmoid().mean())
        values["tokens_per_s"] = progress.tokens_per_second
        progress.show(values)
        self._record({"step": step, **values})
        self.accelerator.log(values, step=step)

    def _evaluate(self, step: int, progress: Progress) -> None:
        is_first = self.accelerator.is_main_process
        if not (is_first or self.module.label_model.trunk.sharded):
            return
        rows = _spread(self.data.validation, self.config.run.eval_rows)
        predictives = self._predictives(rows)
        if not is_first:  # it only had to run the passes too
            return
        values = {}
        for estimator, log_probs in predictives.items():
            labels = torch.tensor([row.label for row in rows])
            report = evaluate(log_probs, labels)
            values |= {f"{estimator}/{k}": e.value for k, e in report.metrics.items()}
        progress.note(f"step {step} validation ({len(rows)} rows): {_short(values)}")
        shown = {name: json_number(value) for name, value in values.items()}
        self._record({"step": step, "validation": shown})
        self.accelerator.log({f"validation/{k}": v for k, v in values.items()}, step=step)

    @torch.no_grad()
    def _predictives(self, rows: Sequence[EncodedExample]) -> dict[str, Tensor]:
        method, predictive = self.module.method, self.config.predictive
        packs = {"mean": method.mean_pack(self.module.state, self.config.method)}
        if method.stochastic:
            key, design = ("evaluation", predictive.seed), predictive.design
            draw = Draw(key, predictive.num_samples, design=design)
            packs["mc"] = method.predict_pack(self.module.state, self.config.method, draw)
        device = self.accelerator.device
        stems = kept_stem_states(self.module.label_model, rows)
        return {
            name: score_rows(
                self.module.label_model,
                pack.to(device, torch.float32),
                rows,
                num_labels=self.num_labels,
                max_padded_tokens=padded_token_limit(device),
                stems=stems,
            ).log_probs
            for name, pack in packs.items()
        }

    def _checkpoint(self, step: int) -> None:
        if not all(bool(value.isfinite().all()) for value in self.module.params.values()):
            raise DalorraError(
                f"step {step}: a parameter is not finite. Lower optim.lr or method.mask_lr; the "
                "last checkpoint is intact"
            )
        if not self.accelerator.is_main_process:
            return
        save_checkpoint(
            self.run_dir / "checkpoints",
            Checkpoint(
                step,
                self.identity,
                self.module.params,
                Checkpoint.of_optimizer(self.updater.adamw, self.module.params),
            ),
        )

    def _record(self, values: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with (self.run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")


def _spread(rows: Sequence[EncodedExample], limit: int | None) -> list[EncodedExample]:
    """Return at most ``limit`` rows, evenly spaced, so that every class of a sorted file is met."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def _short(values: dict[str, float]) -> str:
    shown = [
        k
        for k in values
        if k.split("/")[1] in ("accuracy", "nll", "ece", "auroc_oos_predictive_entropy")
    ]
    return ", ".join(f"{k} {values[k]:.4f}" for k in shown)
