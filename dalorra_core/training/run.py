"""One training run from configuration to artifact."""

import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import JsonValue

from dalorra_core import __version__
from dalorra_core.adapters.inject import TargetSpec, find_targets
from dalorra_core.adapters.state import label_rows_only
from dalorra_core.artifact.calibration_record import ChosenOn, Limit, Policy
from dalorra_core.artifact.manifest import (
    BaseRef,
    GoldenProbe,
    LabelsRef,
    Manifest,
    ModuleRef,
    PromptRef,
)
from dalorra_core.artifact.store import load_artifact, pack_tensors, save_artifact
from dalorra_core.base_models.loading import load_tokenizer, pick_device, pick_dtype
from dalorra_core.calibration.policy import choose_thresholds
from dalorra_core.data.examples import ChoiceExample, Example
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.shared_base import SharedBase, identify
from dalorra_core.predictive.stem import kept_stem_states
from dalorra_core.training.evaluation import evaluate, json_number
from dalorra_core.training.existing import check_is_fitted, load_trained
from dalorra_core.training.loop import TrainingResult
from dalorra_core.training.members import fit_after_training, train_members
from dalorra_core.training.prepare import (
    TrainingData,
    prepare_training_data,
    rows_digest,
)
from dalorra_core.training.settings import TrainConfig

__all__ = ["TARGET_SELECTIVE_RISK", "run_training"]

TARGET_SELECTIVE_RISK = 0.02
"""Error rate among accepted rows that the default policy is chosen for."""

_NUM_GOLDEN = 4


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
            memory already; None loads it.
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
    identity = identify(config.base) if base is None else base.identity
    tokenizer = load_tokenizer(identity.directory) if base is None else base.tokenizer
    data = prepare_training_data(config.data, tokenizer)  # before the slow part
    if base is None:
        run = config.run
        base = SharedBase.load(
            identity, device=run.device, dtype=run.precision, attention=run.attention
        )
    label_model, specs = _build(config, base, data)
    METHODS[config.method.name].shapes(specs, config.adapter.r, config.method)  # or says why not
    origin: dict[str, JsonValue] = {}
    run_dir.mkdir(parents=True, exist_ok=True)
    accelerator = _accelerator(config, run_dir)
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
        )
    else:
        stored, result = load_trained(from_adapter, config, identity, data, specs)
        origin = {"from_adapter": {"name": stored.manifest.name, "sha256": stored.sha256}}
    accelerator.end_training()
    if accelerator.is_main_process:
        result = fit_after_training(label_model, data, config, result, report)
        manifest = _manifest(config, base, data, specs, result, origin)
        staged = run_dir / "artifact"  # nobody sees an adapter without its policy and probes
        save_artifact(staged, manifest, pack_tensors(result.state.params), overwrite=True)
        del label_model
        updated = _finish(staged, config, base, data, report)
        tensors = pack_tensors(load_artifact(staged).tensors)
        save_artifact(output, updated, tensors, overwrite=overwrite)
        shutil.rmtree(staged)
    return output


def _accelerator(config: TrainConfig, run_dir: Path) -> Accelerator:
    device = pick_device(config.run.device)
    bf16 = pick_dtype(config.run.precision, device) is torch.bfloat16
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        # On a CPU the frozen weights are loaded in bfloat16 and need no autocast.
        mixed_precision="bf16" if bf16 and device.type == "cuda" else "no",
        gradient_accumulation_steps=config.optim.gradient_accumulation,
        log_with="tensorboard" if config.run.tensorboard else None,
        project_dir=str(run_dir) if config.run.tensorboard else None,
        step_scheduler_with_optimizer=False,
    )
    if config.run.tensorboard:
        accelerator.init_trackers("tensorboard")
    return accelerator


def _build(
    config: TrainConfig, base: SharedBase, data: TrainingData
) -> tuple[LabelModel, tuple[TargetSpec, ...]]:
    found = find_targets(base.trunk.model, config.adapter.target_modules, config.adapter.layers)
    specs = label_rows_only(found, len(data.label_set.labels))
    return LabelModel(base.trunk, specs, data.label_set), specs


def _manifest(
    config: TrainConfig,
    base: SharedBase,
    data: TrainingData,
    specs: tuple[TargetSpec, ...],
    result: TrainingResult,
    origin: dict[str, JsonValue],
) -> Manifest:
    return Manifest(
        name=config.name,
        method=config.method,
        base=BaseRef(
            id=Path(config.base).name if Path(config.base).is_dir() else config.base,
            fingerprint=base.identity.fingerprint,
            tokenizer_sha256=base.identity.tokenizer_sha256,
        ),
        modules=tuple(
            ModuleRef(name=s.name, d_in=s.d_in, d_out=s.d_out, layer=s.layer) for s in specs
        ),
        r=config.adapter.r,
        lora_alpha=config.adapter.lora_alpha,
        labels=LabelsRef(
            labels=data.label_set.labels,
            token_ids=data.label_set.token_ids,
            out_of_scope_label=config.data.out_of_scope_label,
            union=data.union,
        ),
        prompt=PromptRef(
            kind=data.template.kind,
            name=data.template.name,
            template=data.template.template,
            sha256=data.template.sha256,
            max_tokens=config.data.max_tokens,
            append_eos=config.data.append_eos,
        ),
        predictive=config.predictive,
        provenance=_provenance(config, data, result) | origin,
        files={},
    )


def _provenance(
    config: TrainConfig, data: TrainingData, result: TrainingResult
) -> dict[str, JsonValue]:
    settings = config.model_dump(mode="json")
    settings["data"]["source"] = Path(config.data.source).name  # a name, not a place on a disk
    settings["data"]["root"] = Path(config.data.root).name
    settings["base"] = Path(config.base).name if Path(config.base).is_dir() else config.base
    return {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "dalorra": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": pick_device(config.run.device).type,
        "config": settings,
        "data": {
            "train": rows_digest(data.train),
            "validation": rows_digest(data.validation),
        },
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "resumed_at": result.resumed_at,
    }


def _finish(
    staged: Path,
    config: TrainConfig,
    base: SharedBase,
    data: TrainingData,
    report: Any,
) -> Manifest:
    """Answer the held-out rows as the server would; return the manifest with policy and probes."""
    predictor = _served(staged, config, base, "auto")
    manifest = predictor.manifest
    provenance = dict(manifest.provenance)
    policies: tuple[Policy, ...] = ()
    if data.validation:
        report(f"answering {len(data.validation)} held-out rows with the stored adapter")
        log_probs = predictor.predict(data.validation, label_mass=False).log_probs
        labels = torch.tensor([row.label for row in data.validation])
        metrics = evaluate(log_probs, labels).metrics
        provenance["validation"] = {name: json_number(e.value) for name, e in metrics.items()}
        policies = (default_policy(predictor, log_probs, labels, data.validation_name),)
        report("  ".join(f"{name} {e.value:.4f}" for name, e in metrics.items()))
    if predictor.dtype is not torch.float32:  # probes are stored in the precision of every device
        predictor = _served(staged, config, base, "float32")
    golden = _golden_probes(predictor, data.examples)
    return manifest.model_copy(
        update={"policies": policies, "golden": golden, "provenance": provenance}
    )


def _served(staged: Path, config: TrainConfig, base: SharedBase, dtype: str) -> Predictor:
    """Return a predictor as a server would have it, on the base in memory where that is the one."""
    if config.run.attention == "sdpa" and base.dtype is pick_dtype(dtype, base.device):
        return Predictor.on(base, load_artifact(staged), verify_golden=False)
    return Predictor.load(
        staged,
        base=str(base.identity.directory),
        device=config.run.device,
        dtype=dtype,
        verify_golden=False,
    )


def default_policy(
    predictor: Predictor, log_probs: torch.Tensor, labels: torch.Tensor, split: str | None
) -> Policy:
    """Return the policy ``default`` chosen on these held-out answers."""
    plan = predictor.default_plan
    chosen = choose_thresholds(summarise(log_probs), labels, TARGET_SELECTIVE_RISK)
    accept = chosen.min_confidence
    return Policy(
        name="default",
        accept=None if accept is None else Limit(score="confidence", threshold=accept),
        abstain=Limit(score="predictive_entropy", threshold=chosen.abstain_threshold),
        target_selective_risk=TARGET_SELECTIVE_RISK,
        chosen_on=ChosenOn(
            split=split or "",
            n=len(labels),
            n_out_of_scope=int((labels < 0).sum()),
            num_samples=predictor.num_functions(plan),
            seed=plan.seed,
            estimator="mean_mask" if predictor.point_method else plan.estimator,
            dtype=str(predictor.dtype).removeprefix("torch."),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            selective_risk=chosen.selective_risk,
            coverage=chosen.coverage,
        ),
    )


def _golden_probes(predictor: Predictor, examples: list[Example]) -> tuple[GoldenProbe, ...]:
    """Store the default predictive's answers to a few training questions, spread over the file."""
    step = max(1, len(examples) // _NUM_GOLDEN)
    probes = []
    for example in examples[::step][:_NUM_GOLDEN]:
        row = predictor.encode(example, truncate="end")
        probs = predictor.predict([row], label_mass=False).log_probs.double().exp().mean(0)[0]
        probes.append(
            GoldenProbe(
                id=example.id,
                row=_row_json(example),
                probs=tuple(round(float(p), 7) for p in probs),
            )
        )
    return tuple(probes)


def _row_json(example: Example) -> dict[str, JsonValue]:
    if isinstance(example, ChoiceExample):
        return {
            "question": example.question,
            "context": example.context,
            "choices": [{"label": c.label, "text": c.text} for c in example.choices],
        }
    return {"text": example.text}
