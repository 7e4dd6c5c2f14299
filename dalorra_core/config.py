"""Every setting of a training run, validated, with its domain and its default.

Unknown keys are errors. Each field's description says its unit and effect; the tables of
docs/training.md are made from them.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from dalorra_core.errors import ConfigError

__all__ = [
    "AdapterConfig",
    "DalorraConfig",
    "DataConfig",
    "MethodConfig",
    "MleConfig",
    "OptimConfig",
    "PredictiveConfig",
    "RunConfig",
    "TrainConfig",
    "load_config",
]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AdapterConfig(_Settings):
    """Shape and place of the low-rank adapter."""

    r: int = Field(default=8, ge=1, le=512, description="Rank of every adapted module.")
    lora_alpha: float = Field(
        default=16.0,
        gt=0,
        description="Scale numerator: the adapter's output is times lora_alpha / r.",
    )
    target_modules: tuple[str, ...] = Field(
        default=("q_proj", "v_proj", "lm_head"),
        min_length=1,
        description="Last path components of the linear layers to adapt.",
    )
    layers: tuple[int, int] | None = Field(
        default=None,
        description="First and last decoder layer to adapt, from 0, both included; null: all.",
    )

    @property
    def scaling(self) -> float:
        """lora_alpha / r; never depends on the gates."""
        return self.lora_alpha / self.r


class DalorraConfig(_Settings):
    """DALorRA: variational Bernoulli gates over the ranks of every adapted module."""

    name: Literal["dalorra"] = "dalorra"
    prior_prob: float = Field(
        default=0.5, gt=0, lt=1, description="p0: prior and initial keep probability of a rank."
    )
    tau: float = Field(
        default=2 / 3, gt=0, le=5, description="Temperature of the relaxed gates in training."
    )
    num_train_samples: int = Field(
        default=1,
        ge=1,
        le=64,
        description="S: gate draws per optimiser step; log-likelihoods are averaged.",
    )
    kl_weight: float = Field(default=1.0, ge=0, description="Factor on the KL; 1 is the ELBO.")
    kl_scale: Literal["per_example", "unit"] = Field(
        default="per_example",
        description="per_example: KL times kl_weight / N (the ELBO); unit: times kl_weight.",
    )
    train_masks: Literal["relaxed", "straight_through"] = Field(
        default="relaxed",
        description="relaxed: binary-Concrete; straight_through: hard forward, relaxed gradient.",
    )
    test_masks: Literal["hard", "relaxed"] = Field(
        default="hard",
        description="Gates at prediction: hard Bernoulli draws, or relaxed at tau.",
    )
    mask_lr: float = Field(
        default=1e-2, gt=0, description="Peak learning rate of the gate logits phi."
    )


class MleConfig(_Settings):
    """MLE: plain LoRA, one deterministic function."""

    name: Literal["mle"] = "mle"


MethodConfig = Annotated[DalorraConfig | MleConfig, Field(discriminator="name")]


class DataConfig(_Settings):
    """Where rows come from and how they become prompts."""

    source: str = Field(
        description="Directory with <split>.jsonl, one .jsonl file, or hub:NAME[:CONFIG]."
    )
    train_split: str = Field(default="train", description="Split to train on.")
    validation_split: str | None = Field(
        default="validation",
        description="Held-out split for evaluation during training; null: none.",
    )
    out_of_scope_label: str | None = Field(
        default=None,
        description="Rows with this label are not trained on; evaluation tests rejection.",
    )
    prompt: str | None = Field(
        default=None,
        description="Template with {text} for text rows, or a family (rl_fixed, so, rl_compat) for "
        "multiple choice; null: the default of the data's form.",
    )
    max_tokens: int = Field(default=300, ge=2, description="Longest prompt in tokens.")
    truncate: Literal["none", "start", "end"] = Field(
        default="none",
        description="How a longer training row is cut; none refuses it before training.",
    )


class OptimConfig(_Settings):
    """AdamW, its schedule and the batch."""

    lr: float = Field(default=1e-4, gt=0, description="Peak learning rate of lora_A and lora_B.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Decoupled weight decay of lora_A and lora_B."
    )
    eps: float = Field(default=1e-6, gt=0, description="AdamW epsilon.")
    steps: int = Field(default=5000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(default=4, ge=1, description="Examples per forward pass and process.")
    gradient_accumulation: int = Field(
        default=1, ge=1, description="Forward passes per optimiser step."
    )
    warmup_ratio: float = Field(
        default=0.06,
        ge=0,
        lt=1,
        description="Share of the steps with rising learning rate; then linear to 0.",
    )


class RunConfig(_Settings):
    """Seeds, precision, checkpoints and logs of one run."""

    seed: int = Field(
        default=1,
        ge=0,
        lt=2**64,
        description="Fixes initial factors, data order and training gates.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA when there is one."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of the frozen base in training; adapter and loss stay float32. auto: bfloat16 "
        "on CUDA (with autocast), float32 on CPU.",
    )
    attention: Literal["sdpa", "eager"] = Field(
        default="sdpa",
        description="Attention kernel; eager is faster on CPU in bfloat16.",
    )
    checkpoint_every: int = Field(
        default=200, ge=1, description="Optimiser steps between checkpoints."
    )
    eval_every: int = Field(default=500, ge=1, description="Optimiser steps between evaluations.")
    eval_rows: int | None = Field(
        default=1000,
        ge=1,
        description="Validation rows of those evaluations, evenly spaced; null: all.",
    )
    tensorboard: bool = Field(
        default=False, description="Write TensorBoard logs beside the checkpoints."
    )


class PredictiveConfig(_Settings):
    """The default predictive stored in the artifact."""

    num_samples: int = Field(
        default=10, ge=1, le=256, description="M: posterior samples per answer."
    )
    seed: int = Field(default=0, ge=0, description="Picks the mask set.")
    design: Literal["iid"] = Field(
        default="iid", description="How the M samples are drawn together."
    )


class TrainConfig(_Settings):
    """One training run, whole."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the adapter."
    )
    base: str = Field(
        default="smollm2-135m-instruct", description="Directory, hub id or built-in alias."
    )
    method: MethodConfig = Field(default_factory=DalorraConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig
    optim: OptimConfig = Field(default_factory=OptimConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    predictive: PredictiveConfig = Field(default_factory=PredictiveConfig)

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" not in value:
            return {"name": "dalorra", **value}  # as when there is no group ``method`` at all
        return value


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML, TOML or JSON file, apply ``key.sub=value`` overrides, and validate.

    Args:
        path: The file; None starts from nothing but the overrides.
        overrides: Dotted assignments such as ``method.tau=0.5``; the value is read as YAML.

    Raises:
        ConfigError: Naming the file, each wrong setting, its domain and its value.
    """
    raw = _read_mapping(path) if path is not None else {}
    for text in overrides:
        _assign(raw, text)
    try:
        return TrainConfig.model_validate(raw)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(p) for p in e['loc']) or '(top)'}: {e['msg']}; got {e['input']!r}"
            for e in error.errors()
        ]
        where = f"{path}" if path is not None else "the command line"
        raise ConfigError(f"{where}: {len(lines)} wrong setting(s)\n" + "\n".join(lines)) from None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config file {path}: {error}") from None
    try:
        if path.suffix == ".toml":
            value: object = tomllib.loads(text)
        elif path.suffix == ".json":
            value = json.loads(text)
        else:
            value = yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {path} cannot be parsed: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"config file {path} must hold a mapping, found {type(value).__name__}")
    return value


def _assign(raw: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"an override must read KEY=VALUE, such as method.tau=0.5; got {text!r}")
    *parents, leaf = key.strip().split(".")
    node: Any = raw
    for part in parents:
        child = node.setdefault(part, {})
        if isinstance(child, str):  # method=dalorra, then method.tau=0.5
            child = node[part] = {"name": child}
        if not isinstance(child, dict):
            raise ConfigError(f"override {text!r}: {part} is not a group of settings")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value cannot be read: {error}") from None
