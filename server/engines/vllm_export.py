"""An export as the vLLM engine uses it: what it must say, and how vLLM knows its adapters."""

from dataclasses import dataclass
from pathlib import Path

from dalorra_core.artifact.calibration_record import MeasuredWith
from dalorra_core.artifact.export_record import ExportRecord, read_export
from dalorra_core.artifact.store import Artifact
from dalorra_core.errors import ConfigError
from dalorra_core.methods import METHODS
from server.engines.cards import Answering
from server.ports import Sampling

__all__ = ["Sample", "VllmExport", "answering_of_export", "read_vllm_export"]

_SHA_CHARS = 12
_HERE = "."


@dataclass(frozen=True, slots=True)
class Sample:
    """One exported adapter.

    Attributes:
        name: By which vLLM knows it; made of its content, so that two exports never share one.
        place: Where it lies in the export.
        path: Where vLLM finds it.
    """

    name: str
    place: str
    path: str


@dataclass(frozen=True, slots=True)
class VllmExport:
    """An export that belongs to an artifact.

    Attributes:
        record: What is beside its adapters.
        samples: Its adapters, in order.
        point_method: Whether they give one answer only, without an epistemic part.
        label_mass: Whether decisions depend on the label mass, which costs a second question.
    """

    record: ExportRecord
    samples: tuple[Sample, ...]
    point_method: bool
    label_mass: bool

    @property
    def how_to_start(self) -> str:
        """What vLLM must be started with, for whoever has to."""
        m, c = len(self.samples), len(self.record.labels.labels)
        given = " ".join(f"{sample.name}=EXPORT/{sample.place}" for sample in self.samples)
        return (
            f"Start vLLM with --enable-lora --max-loras {m} --max-cpu-loras {m} --max-lora-rank "
            f"{self.record.r} --max-logprobs {c} --logprobs-mode processed_logprobs, and either "
            "with VLLM_ALLOW_RUNTIME_LORA_UPDATING=true in its environment or with --lora-modules "
            f"{given}, where EXPORT is the exported directory as vLLM sees it (docs/vllm.md)"
        )


def read_vllm_export(directory: Path, there: str | None, artifact: Artifact) -> VllmExport:
    """Return an export whose every tensor was checked, and which is one of the artifact.

    Args:
        directory: From ``dalorra export --engine vllm``.
        there: Where vLLM finds that directory; None for the same path.
        artifact: What was exported.

    Raises:
        ArtifactError: It cannot be read, or its tensors were changed.
        ConfigError: It cannot be served with the artifact; says what to do.
    """
    record = read_export(directory)
    method = METHODS[artifact.manifest.method.name]
    point = not method.stochastic or method.one_answer(artifact.manifest.method)
    _check_source(record, artifact)
    _check_functions(record, artifact, point_method=point)
    root = (there or str(directory.absolute())).rstrip("/")
    samples = tuple(
        Sample(
            name=f"{record.source.name}-{m:03d}-{adapter.sha256[:_SHA_CHARS]}",
            place=adapter.path,
            path=root if adapter.path == _HERE else f"{root}/{adapter.path}",
        )
        for m, adapter in enumerate(record.adapters)
    )
    return VllmExport(record, samples, point, _needs_mass(artifact))


def answering_of_export(
    export: VllmExport, artifact: Artifact, dtype: str, memory_bytes: int
) -> Answering:
    """Return how an exported adapter is answered: with its own samples, and no others.

    Args:
        export: What vLLM holds.
        artifact: What was exported.
        dtype: Precision of the base model in vLLM.
        memory_bytes: What this engine itself keeps.
    """
    manifest, record, point = artifact.manifest, export.record, export.point_method
    stored = manifest.predictive
    num_functions = METHODS[manifest.method.name].num_functions(manifest.method)
    m = 1 if point else len(export.samples)
    sampling = Sampling(
        num_samples=m,
        seed=stored.seed if record.seed is None else record.seed,
        estimator="monte_carlo",
        design=record.design or stored.design,
    )
    return Answering(
        sampling=sampling,
        here=MeasuredWith(
            adapter_sha256=artifact.sha256,
            num_samples=m,
            design=sampling.design,
            seed=0 if num_functions is not None else sampling.seed,
            estimator="mean_mask" if point else "monte_carlo",
            temperature=_temperature_of(artifact),
            dtype=dtype,
            engine="vllm",
        ),
        point_method=point,
        mask_set=None if point else record.mask_set,
        memory_bytes=memory_bytes,
        designs=(sampling.design,),
        fixed_functions=None if point else num_functions,
        max_num_samples=m,
        fixed_sampling=None
        if point
        else f"adapter {manifest.name} is served by vLLM, which holds these exported samples only",
    )


def _needs_mass(artifact: Artifact) -> bool:
    """Whether a policy limits the label mass, or the combined score is made of it."""
    manifest = artifact.manifest
    limits = [limit for policy in manifest.policies for limit in (policy.accept, policy.abstain)]
    if any(limit is not None and limit.score == "label_mass" for limit in limits):
        return True
    stored = manifest.calibration and manifest.calibration.combined
    return stored is not None and "log_label_mass" in stored.weights


def _temperature_of(artifact: Artifact) -> float:
    """Return the temperature that the artifact was calibrated to; 1 before that."""
    found = artifact.manifest.calibration
    return 1.0 if found is None else found.temperature.value


def _check_source(record: ExportRecord, artifact: Artifact) -> None:
    manifest = artifact.manifest
    if record.engine != "vllm":
        raise ConfigError(
            f"vllm_export must be an export for vllm, got one for {record.engine}: "
            f"{_again(manifest.name)}"
        )
    if record.source.adapter_sha256 != artifact.sha256:
        raise ConfigError(
            f"vllm_export must be an export of {manifest.name} with sha256 {artifact.sha256}, got "
            f"one of {record.source.name} with {record.source.adapter_sha256}: "
            f"{_again(manifest.name)}"
        )
    pairs = {
        "base": (record.base, manifest.base),
        "labels": (record.labels.labels, manifest.labels.labels),
        "label tokens": (record.labels.token_ids, manifest.labels.token_ids),
        "prompt": (record.prompt, manifest.prompt),
    }
    differ = [name for name, (exported, own) in pairs.items() if exported != own]
    if differ:
        raise ConfigError(
            f"vllm_export has another {' and '.join(differ)} than {manifest.name} has now: "
            f"{_again(manifest.name)}"
        )


def _check_functions(record: ExportRecord, artifact: Artifact, *, point_method: bool) -> None:
    name = artifact.manifest.name
    served = record.mask == "samples" or (record.mask == "mean" and point_method)
    if not served or record.mask_set is None or not record.adapters:
        raise ConfigError(
            f"vllm_export must hold what is served of {name}, got mask {record.mask}: "
            f"{_again(name)}"
        )
    if record.golden is None and artifact.manifest.golden:
        raise ConfigError(
            f"vllm_export must hold golden probes, because {name} does, got none: {_again(name)}"
        )


def _again(name: str) -> str:
    return f"export it again with dalorra export .../{name} -o DIR --mask samples:M --engine vllm"
