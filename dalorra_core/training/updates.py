"""How the gradients of one step move the parameters: the optimisers, their schedules, the order."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator

from dalorra_core.config import OptimConfig
from dalorra_core.methods.method import ParamGroup
from dalorra_core.objectives.elbo import weighted_sum
from dalorra_core.training.processes import Processes
from dalorra_core.training.step import StepLoss, TrainStep

__all__ = ["Updater"]


class Updater:
    """AdamW, and SGD where a method asks for it, under one linear schedule.

    Args:
        module: The parameters.
        optim: Rates, steps and accumulation.
        accelerator: Device, precision and gradient accumulation.
        processes: Those whose gradients are added up before each step.
    """

    def __init__(
        self,
        module: TrainStep,
        optim: OptimConfig,
        accelerator: Accelerator,
        processes: Processes,
    ) -> None:
        self._module, self._optim, self._accelerator = module, optim, accelerator
        self._processes = processes
        groups = module.method.param_groups(module.state, optim, module.method_config)
        self.adamw = torch.optim.AdamW(
            self._groups([g for g in groups if g.optimizer == "adamw"]), eps=optim.eps, fused=True
        )
        rest = [g for g in groups if g.optimizer == "sgd"]
        self._sgd = torch.optim.SGD(self._groups(rest)) if rest else None
        self._moved_by_sgd = [module.params[name] for group in rest for name in group.names]
        self._schedules: list[Any] = []
        self._prepared: list[Any] = []

    def _groups(self, groups: Sequence[ParamGroup]) -> list[dict[str, Any]]:
        return [
            {
                "params": [self._module.params[name] for name in group.names],
                "lr": group.lr,
                "initial_lr": group.lr,  # the schedule asks for it when it starts in the middle
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ]

    def prepare(self, done: int) -> None:
        """Start the schedules after ``done`` steps."""
        # importing it takes seconds where PEFT is installed: each command would wait for them
        from transformers import get_linear_schedule_with_warmup  # noqa: PLC0415

        warmup = int(self._optim.warmup_ratio * self._optim.steps)
        optimizers = [o for o in (self.adamw, self._sgd) if o is not None]
        self._schedules = [
            get_linear_schedule_with_warmup(o, warmup, self._optim.steps, last_epoch=done - 1)
            for o in optimizers
        ]
        self._prepared = [self._accelerator.prepare(o) for o in optimizers]

    def apply(self, out: StepLoss, step: int, weight: float = 1.0) -> None:
        """Move the parameters along the gradients of one micro-batch; inside ``accumulate``.

        Accelerate's optimisers do nothing before the last micro-batch of a step.

        Args:
            out: The loss.
            step: Optimiser steps already taken.
            weight: This process's part of the micro-batch; parts sum to 1, so that a divergence
                counts once.
        """
        if self._module.method.divergence_apart:
            self._accelerator.backward(out.data_loss * weight)
            self._add_up()
            adamw, *sgd = self._prepared
            adamw.step()
            adamw.zero_grad()
            if self._accelerator.sync_gradients:
                self._add_divergence_gradients(out, step, weight)
            for optimizer in sgd:
                optimizer.step()
        else:
            self._accelerator.backward(out.loss * weight)
            self._add_up()
            for optimizer in self._prepared:
                optimizer.step()
        if self._accelerator.sync_gradients:
            for schedule in self._schedules:
                schedule.step()
        for optimizer in self._prepared:
            optimizer.zero_grad()

    def _add_up(self) -> None:
        """Make the gradients of a step those of all processes' rows."""
        if self._accelerator.sync_gradients:
            grads = [param.grad for param in self._module.params.values()]
            self._processes.add_up([grad for grad in grads if grad is not None])

    def _add_divergence_gradients(self, out: StepLoss, step: int, weight: float) -> None:
        """Add the divergences' gradients at the parameters as they are now to what SGD moves."""
        loss = weighted_sum(self._module.divergences(step, out.pack)) * weight
        found = torch.autograd.grad(loss, self._moved_by_sgd, allow_unused=True)
        self._processes.add_up([gradient for gradient in found if gradient is not None])
        for param, gradient in zip(self._moved_by_sgd, found, strict=True):
            if gradient is not None:
                param.grad = gradient if param.grad is None else param.grad + gradient
