"""From trained parameters to an artifact: manifest, default policy, golden probes.

The stored adapter answers the held-out rows as a server would; nobody sees it without its policy.
"""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from dalorra_core import __version__
from dalorra_core.adapters.inject import TargetSpec
from dalorra_core.artifact.calibration_record import ChosenOn, Limit, Policy
from dalorra_core.artifact.manifest import (
    BaseRef,
    GoldenProbe,
    LabelsRef,
    Manifest,
    ModuleRef,
    PromptRef,
)
from dalorra_core.artifact.store import load_artifact
from dalorra_core.base_models.loading import pick_device, pick_dtype
from dalorra_core.calibration.policy import choose_thresholds
from dalorra_core.data.examples import ChoiceExample, Example
from dalorra_core.metrics.uncertainty import summarise
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.shared_base import SharedBase
from dalorra_core.training.evaluation import evaluate, json_number
from dalorra_core.training.loop import TrainingResult
from dalorra_core.training.prepare import TrainingData, rows_digest
from dalorra_core.training.settings import TrainConfig

__all__ = [
    "TARGET_SELECTIVE_RISK",
    "default_policy",
    "finished",
    "golden_probes",
    "manifest_of",
]

TARGET_SELECTIVE_RISK = 0.02
"""Error rate among accepted rows that the default policy is chosen for."""

_NUM_GOLDEN = 4


def manifest_of(
    config: TrainConfig,
    base: SharedBase,
    data: TrainingData,
    specs: tuple[TargetSpec, ...],
    result: TrainingResult,
    origin: dict[str, JsonValue],
) -> Manifest:
    """Return the manifest of a trained adapter, still without policy and probes.

    Args:
        config: The run.
        base: Its base model.
        data: Its rows, labels and prompt.
        specs: Its adapted modules.
        result: What training left.
        origin: What the provenance says of where the parameters come from, besides.
    """
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
    if config.adapter.start is not None:
        settings["adapter"]["start"] = Path(config.adapter.start).name
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


def finished(
    staged: Path,
    config: TrainConfig,
    base: SharedBase,
    data: TrainingData,
    report: Any,
) -> Manifest:
    """Answer the held-out rows as the server would; return the manifest with policy and probes.

    Args:
        staged: The stored adapter.
        config: The run.
        base: Its base model.
        data: Its rows.
        report: Called with lines for the user.
    """
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
    golden = golden_probes(predictor, data.examples)
    return manifest.model_copy(
        update={"policies": policies, "golden": golden, "provenance": provenance}
    )


def _served(staged: Path, config: TrainConfig, base: SharedBase, dtype: str) -> Predictor:
    """Return a predictor as a server would have it, on the base in memory where that is the one."""
    if config.run.attention != "sdpa" or base.dtype is not pick_dtype(dtype, base.device):
        base = SharedBase.load(
            base.identity, device=config.run.device, dtype=dtype, sharded=base.trunk.sharded
        )
    return Predictor.on(base, load_artifact(staged), verify_golden=False)


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


def golden_probes(predictor: Predictor, examples: Sequence[Example]) -> tuple[GoldenProbe, ...]:
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
