"""Adapters as plain LoRA for other programs: what is exported, what is refused, how it is written.

The samples are those of ``Predictor.pack``, so another engine that averages over them gives the
answers of this one. What a sample is decides whether it can be exported, not the method's name.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dalorra_core import __version__
from dalorra_core.adapters.inject import LM_HEAD, lm_head_name_of, lm_head_of
from dalorra_core.adapters.pack import SamplePack
from dalorra_core.adapters.plain_lora import (
    PlainLora,
    opened,
    padded,
    plain_loras,
    why_not_plain,
    with_full_head,
)
from dalorra_core.artifact.export_record import (
    EXPORT_FILE,
    Engine,
    ExportedAdapter,
    ExportedFrom,
    ExportedGolden,
    ExportRecord,
    MaskKind,
    record_bytes,
)
from dalorra_core.artifact.peft_io import VLLM_RANKS, write_peft
from dalorra_core.artifact.placing import place_directory, scratch_directory, write_synced
from dalorra_core.errors import ConfigError
from dalorra_core.predictive.parity import Expected, check_parity, measured_parity
from dalorra_core.predictive.predictor import Predictor, SamplingPlan

__all__ = ["VLLM_HEAD_FAMILIES", "Exported", "check_output", "prepare_export", "write_export"]

VLLM_HEAD_FAMILIES = frozenset(
    {
        "apertus",
        "exaone4",
        "falcon_h1",
        "granite",
        "granitemoe",
        "jamba",
        "lfm2",
        "llama",
        "minicpm",
        "mixtral",
        "nemotron",
        "phi3",
        "phimoe",
        "qwen3",
        "qwen3_moe",
    }
)
"""``model_type`` of the models for which vLLM takes an adapter of the output projection.

Those whose classes name ``lm_head`` in ``embedding_modules``, in vLLM 0.32.0. Qwen 2, Gemma and
Mistral do not.
"""

_VLLM_MOST_TOKENS = 258_048


@dataclass(frozen=True)
class Exported:
    """An export before it is written; holds no base model.

    Attributes:
        pack: The samples as our own forward pass takes them.
        loras: The same samples as plain LoRA, ready to be written.
        record: Of all but what is known once they are written: adapters and parity.
    """

    pack: SamplePack
    loras: tuple[PlainLora, ...]
    record: ExportRecord


def prepare_export(
    predictor: Predictor, mask: MaskKind, plan: SamplingPlan, engine: Engine = "peft"
) -> Exported:
    """Return the functions of a mask as plain LoRA of a rank that vLLM has room for.

    Args:
        predictor: Adapter and base model.
        mask: ``mean``, ``ones`` or ``samples``.
        plan: Which samples; of no effect with another mask.
        engine: Who is to load them.

    Raises:
        ConfigError: The functions are more than plain LoRA, they are not as many as the plan asks
            for, or the engine takes no adapter of the output projection; says what to do instead.
    """
    pack = _pack(predictor, mask, plan)
    if engine == "vllm":
        _check_vllm_head(predictor)
    model, token_ids = predictor.model.trunk.model, predictor.manifest.labels.token_ids
    num_tokens, head = lm_head_of(model).out_features, lm_head_name_of(model)
    loras = tuple(
        padded(with_full_head(lora, token_ids, num_tokens, head), VLLM_RANKS)
        for lora in plain_loras(pack)
    )
    return Exported(pack, loras, _record(predictor, mask, plan, engine, loras[0].r))


def write_export(exported: Exported, output: Path, expected: Expected | None) -> ExportRecord:
    """Write the adapters and their record, whole or not at all, and return the record.

    With ``mean`` and ``ones`` the directory is itself the adapter; samples are ``sample-000`` and
    so on inside it.

    Args:
        exported: From ``prepare_export``.
        output: Must not be there, or be an empty directory.
        expected: Our answers, which the written adapters must give once PEFT has loaded them; None
            leaves that out.

    Raises:
        ConfigError: The output is there and not empty, or PEFT is not installed.
        ParityError: The adapters answer otherwise; nothing is written then.
    """
    target = output.resolve()
    check_output(target)
    record = exported.record
    with scratch_directory(target) as scratch:
        adapters = []
        for m, lora in enumerate(exported.loras):
            path = f"sample-{m:03d}" if record.mask == "samples" else "."
            digest = write_peft(scratch / path, lora, record.base.id)
            adapters.append(ExportedAdapter(path=path, sha256=digest))
        parity = None
        if expected is not None:
            places = [scratch / adapter.path for adapter in adapters]
            parity = measured_parity(expected, places, record.average)
            check_parity(parity)
        written = record.model_copy(update={"adapters": tuple(adapters), "parity": parity})
        write_synced(scratch / EXPORT_FILE, record_bytes(written))
        place_directory(scratch, target)
    return written


def check_output(output: Path) -> None:
    """Refuse to write over anything.

    Raises:
        ConfigError: The output is a file, or a directory with something in it.
    """
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ConfigError(f"output must be a new or an empty directory, got {output}")


def _pack(predictor: Predictor, mask: MaskKind, plan: SamplingPlan) -> SamplePack:
    """Return the functions of a mask, which are plain LoRA and as many as they should be."""
    name, gaussian = predictor.method.name, predictor.method.logit_covariance is not None
    if mask == "samples" and gaussian:
        raise ConfigError(
            f"method {name} cannot be exported as samples: they are draws of the label logits, "
            "which no adapter gives; mask must be mean, got samples"
        )
    mean = SamplingPlan(estimator="mean_mask")
    pack = predictor.pack(plan if mask == "samples" else mean)
    if mask == "ones":
        pack = opened(pack)
    reason = why_not_plain(pack)
    if reason is not None:
        raise ConfigError(f"method {name} cannot be exported as plain LoRA: {reason}")
    wanted = plan.num_samples if mask == "samples" else 1
    if pack.num_samples != wanted:
        instead = "mean" if pack.num_samples == 1 else f"samples:{pack.num_samples}"
        raise ConfigError(
            f"mask must be {instead} for method {name} with these settings, which has "
            f"{pack.num_samples} function(s), got {mask}{f':{wanted}' if mask == 'samples' else ''}"
        )
    return pack


def _check_vllm_head(predictor: Predictor) -> None:
    """Refuse an adapter of the output projection that vLLM would not load.

    Raises:
        ConfigError: Says why, and what to do.
    """
    model: Any = predictor.model.trunk.model
    family, num_tokens = model.config.model_type, lm_head_of(model).out_features
    if all(module.name != LM_HEAD for module in predictor.manifest.modules):
        return
    if family not in VLLM_HEAD_FAMILIES:
        reason = f"takes none for {family}, only for {', '.join(sorted(VLLM_HEAD_FAMILIES))}"
    elif num_tokens > _VLLM_MOST_TOKENS:
        reason = f"takes none of more than {_VLLM_MOST_TOKENS} tokens, and there are {num_tokens}"
    else:
        return
    raise ConfigError(
        f"engine must be peft for this adapter, got vllm: it adapts {LM_HEAD}, and vLLM {reason}. "
        f"Train one without {LM_HEAD} in adapter.target_modules"
    )


def _record(
    predictor: Predictor, mask: MaskKind, plan: SamplingPlan, engine: Engine, r: int
) -> ExportRecord:
    manifest, artifact, method = predictor.manifest, predictor.artifact, predictor.method
    samples = mask == "samples"
    drawn = samples and method.draws_samples(manifest.method)
    served = plan if samples else SamplingPlan(estimator="mean_mask")
    # Where logits are Gaussian, one answer is more than the function at their mean.
    one_answer = method.one_answer(manifest.method)
    same = mask != "ones" and (samples or not one_answer)
    return ExportRecord(
        engine=engine,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        source=ExportedFrom(
            name=manifest.name,
            method=method.name,
            adapter_sha256=artifact.sha256,
            revision=artifact.revision,
            manifest_sha256=artifact.manifest_sha256,
        ),
        base=manifest.base,
        mask=mask,
        mask_set=predictor.mask_set(served) if same else None,
        num_samples=plan.num_samples if samples else None,
        design=plan.design if drawn else None,
        seed=plan.seed if drawn else None,
        average="logits" if samples and one_answer else "probabilities",
        labels=manifest.labels,
        prompt=manifest.prompt,
        temperature=predictor.temperature,
        r=r,
        golden=_golden(predictor, served) if same else None,
        versions={"dalorra": __version__, "torch": torch.__version__},
    )


def _golden(predictor: Predictor, plan: SamplingPlan) -> ExportedGolden | None:
    """Return the golden probes with what a plan answers; None where the artifact has none."""
    probes = []
    for probe, row in zip(predictor.manifest.golden, predictor.golden_rows(), strict=True):
        answer = predictor.predict([row], plan, label_mass=False, calibrated=False)
        probs = answer.log_probs.double().exp().mean(0)[0].tolist()
        probes.append(probe.model_copy(update={"probs": tuple(probs)}))
    dtype = str(predictor.dtype).removeprefix("torch.")
    return ExportedGolden(dtype=dtype, probes=tuple(probes)) if probes else None
