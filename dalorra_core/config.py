"""The groups of settings of a training run, validated, each with its domain and its default.

Unknown keys are errors. Each field's description says its unit and effect; the tables of
docs/training.md are made from them. The settings of a method stand in the method's own file; the
whole run is ``training/settings.py``.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AdapterConfig",
    "DataConfig",
    "Design",
    "Estimator",
    "MethodSettings",
    "OptimConfig",
    "PredictiveConfig",
    "RunConfig",
    "Settings",
]


Design = Literal["iid", "stratified", "antithetic"]

Estimator = Literal["monte_carlo", "mean_mask", "linearised"]
"""What answers: samples of the network, the network at the posterior mean, or draws of the network
linearised in its gates there."""
"""How the M samples of a prediction are drawn together; see ``sampling/designs.py``."""


class Settings(BaseModel, frozen=True):
    """A group of settings: no unknown key, no change after it was read, no NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class MethodSettings(Settings, frozen=True):
    """What every method's settings have; ``name`` is the method's own, a literal."""

    name: str


class AdapterConfig(Settings, frozen=True):
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
    start: str | None = Field(
        default=None,
        description="Directory of a PEFT LoRA whose A and B training starts from; null: A random, "
        "B zero.",
    )

    @property
    def scaling(self) -> float:
        """lora_alpha / r; never depends on the gates."""
        return self.lora_alpha / self.r


class DataConfig(Settings, frozen=True):
    """Where rows come from and how they become prompts."""

    source: str = Field(
        description="Directory with <split>.jsonl, one .jsonl file, hub:NAME[:CONFIG] or task:NAME."
    )
    root: str = Field(
        default="data", description="Of a task: directory with one folder for each data set."
    )
    train_rows: Annotated[int, Field(ge=1)] | Literal["all"] | None = Field(
        default=None,
        description="Of a task: training rows, each class in its share; null: the task's own.",
    )
    per_class: int | None = Field(
        default=None,
        ge=1,
        description="Of a task: training rows of each class; null: the task's own.",
    )
    subset_seed: int = Field(
        default=0, ge=0, lt=2**64, description="Of a task: picks the rows of a subset."
    )
    held_out_share: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="Of a task without a split to tune on: share of its training rows held out.",
    )
    eval_drop_last: int | None = Field(
        default=None,
        ge=1,
        description="Of a task: k leaves out the last n mod k evaluation rows, as published code "
        "does; null: none.",
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
    truncate: Literal["none", "start", "end"] | None = Field(
        default=None,
        description="Side of a longer row that is cut; none refuses it before training; null: the "
        "task's own, else none.",
    )
    softmax: Literal["own_choices", "union"] = Field(
        default="own_choices",
        description="Labels that a question's probabilities are over: its own choices, or all "
        "labels of the training rows, as published.",
    )
    label_tokens: Literal["spaced", "bare"] = Field(
        default="spaced",
        description="Token of a label: the first free one of its words with a leading space, or "
        "the last one of the bare label, as published. Single letters are bare in both.",
    )
    boolq_label_inverted: bool = Field(
        default=False,
        description="Swap the tokens of True and False, as published code does by mistake.",
    )
    append_eos: bool = Field(
        default=False,
        description="End every prompt with the end-of-text token, as published code does for "
        "Llama 2 on WinoGrande and BoolQ.",
    )
    no_shuffle: bool = Field(
        default=False,
        description="Train in file order without the last incomplete batch of an epoch, as "
        "published code does.",
    )


class OptimConfig(Settings, frozen=True):
    """AdamW, its schedule and the batch."""

    lr: float = Field(default=1e-4, gt=0, description="Peak learning rate of lora_A and lora_B.")
    weight_decay: float = Field(
        default=0.0, ge=0, description="Decoupled weight decay of lora_A and lora_B."
    )
    eps: float = Field(default=1e-6, gt=0, description="AdamW epsilon.")
    steps: int = Field(default=5000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(
        default=4, ge=1, description="Examples per forward pass, of all processes together."
    )
    gradient_accumulation: int = Field(
        default=1, ge=1, description="Forward passes per optimiser step."
    )
    warmup_ratio: float = Field(
        default=0.06,
        ge=0,
        lt=1,
        description="Share of the steps with rising learning rate; then linear to 0.",
    )
    run_to_epoch_end: bool = Field(
        default=False,
        description="Go on at learning rate 0 to the end of the epoch, as published code does.",
    )


class RunConfig(Settings, frozen=True):
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
    recompute: bool = Field(
        default=False,
        description="Activation checkpointing: keep the inputs of the adapted layers only and run "
        "these again for the gradients. The same result with less memory and more work; may "
        "change when a run resumes.",
    )
    shard_base: bool = Field(
        default=False,
        description="In several processes: each holds a part of the frozen base's decoder layers, "
        "gathered one layer at a time (FSDP2), for a base that does not fit one device. Slower; "
        "the same result up to rounding; may change when a run resumes. In one process it does "
        "nothing.",
    )
    tensorboard: bool = Field(
        default=False, description="Write TensorBoard logs beside the checkpoints."
    )


class PredictiveConfig(Settings, frozen=True):
    """The default predictive stored in the artifact."""

    num_samples: int = Field(
        default=10, ge=1, le=256, description="M: posterior samples per answer."
    )
    seed: int = Field(default=0, ge=0, description="Picks the mask set.")
    estimator: Literal["monte_carlo", "linearised"] = Field(
        default="monte_carlo",
        description="What answers: M samples; or draws of the network linearised in its gates, "
        "which dalorra calibrate --plan chooses where it is nearer.",
    )
    design: Design = Field(
        default="iid",
        description="How the M samples are drawn together: iid; stratified, one of them in every "
        "M-th of each number's distribution; antithetic, pairs of opposites. The last two need a "
        "method whose samples are drawn once for all tokens.",
    )
