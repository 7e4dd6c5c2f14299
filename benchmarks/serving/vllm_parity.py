"""Compare a real vLLM with the local engine, sample by sample, on the shipped adapter.

Exports the adapter, answers some questions in this process, starts vLLM with the flags of
docs/vllm.md, lets the vLLM engine answer the same, and writes how far they are apart. The exit
status is 1 where a probability differs by more than 1e-4 in float32.

    python -m benchmarks.serving.vllm_parity --python .venv-vllm/bin/python --output parity.json

``make test-vllm`` makes that environment: vLLM brings a torch of its own, and is in none of ours.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.hardware import describe_hardware
from benchmarks.output import publish
from benchmarks.serving.process import free_port, serving
from dalorra_core.artifact.export_record import ExportRecord, read_export
from dalorra_core.base_models.resolve import resolve_base_model
from dalorra_core.predictive.parity import PARITY_LIMIT
from server.engines.local import LocalEngine
from server.engines.vllm import VllmEngine, VllmPlace
from server.ports import BatchKey, BatchRow, BatchScores, Engine, RowScores, Sampling, TextQuestion

__all__ = ["Answered", "Parity", "compare", "main"]

ROOT = Path(__file__).parents[2]
START_S = 900.0
TEXTS = (
    "transfer 100 dollars from checking to savings",
    "i need help with my account",
    "explain the plot of hamlet",
    "what is my balance",
    "set an alarm for six in the morning please",
    "how do you say good evening in italian",
    "is it going to rain in lisbon this weekend",
    "what should i name my boat",
    "book me a table for two at eight",
    "my card was stolen while i was travelling, and i would like to have it blocked at once",
    "tell me a joke",
    "hello",
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class Answered:
    """What one engine answered, and how long a batch of all questions took it.

    Attributes:
        rows: In the order of the questions.
        batch_s: Median over the repeats, in seconds.
        sampling: As its card says.
    """

    rows: tuple[RowScores, ...]
    batch_s: float
    sampling: Sampling


@dataclass(frozen=True)
class Parity:
    """How far two engines are apart.

    Attributes:
        rows: Questions.
        num_samples: M.
        probabilities: Largest difference of a probability of one sample.
        mean_probabilities: Largest difference of a probability.
        mutual_information: Largest difference, nats.
        label_mass: Largest relative difference; None where vLLM was not asked for it.
        local_s: Median time of the batch in this process.
        vllm_s: Median time of the batch in vLLM.
        limit: The largest difference of a probability that is accepted.
        hardware: What both ran on.
    """

    rows: int
    num_samples: int
    probabilities: float
    mean_probabilities: float
    mutual_information: float
    label_mass: float | None
    local_s: float
    vllm_s: float
    limit: float
    hardware: str

    @property
    def holds(self) -> bool:
        """Whether both give the same probabilities (NaN does not)."""
        return self.probabilities <= self.limit and self.mean_probabilities <= self.limit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 when it holds."""
    chosen = _options().parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        export = _exported(chosen.adapter, folder / "export", chosen.samples, chosen.design)
        record = read_export(export)
        here = LocalEngine([chosen.adapter], device="cpu", dtype="float32")
        local = _answered(here, record, chosen.repeats)
        with _vllm(chosen.python, record, folder / "vllm.log", chosen.url) as url:
            place = VllmPlace(url=url, export=export, timeout_s=300.0, start_s=START_S)
            there = _answered(VllmEngine(chosen.adapter, place), record, chosen.repeats)
    found = compare(local, there)
    publish(asdict(found), chosen.output)
    return 0 if found.holds else 1


def compare(local: Answered, there: Answered) -> Parity:
    """Return how far the answers of two engines are apart."""
    pairs = list(zip(local.rows, there.rows, strict=True))
    masses = [
        abs(other.label_mass - one.label_mass) / one.label_mass
        for one, other in pairs
        if one.label_mass and other.label_mass is not None
    ]
    return Parity(
        rows=len(pairs),
        num_samples=there.sampling.num_samples,
        probabilities=max(
            _largest(mine, its)
            for one, other in pairs
            for mine, its in zip(one.samples, other.samples, strict=True)
        ),
        mean_probabilities=max(_largest(one.probs, other.probs) for one, other in pairs),
        mutual_information=max(
            abs((one.mutual_information or 0.0) - (other.mutual_information or 0.0))
            for one, other in pairs
        ),
        label_mass=max(masses) if masses else None,
        local_s=local.batch_s,
        vllm_s=there.batch_s,
        limit=PARITY_LIMIT[torch.float32],
        hardware=describe_hardware(),
    )


def _largest(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _answered(engine: Engine, record: ExportRecord, repeats: int) -> Answered:
    """Load an engine, ask it every question with the exported samples, and close it."""
    try:
        (card,) = engine.load()
        own = card.defaults
        sampling = Sampling(
            num_samples=record.num_samples or own.num_samples,
            seed=own.seed if record.seed is None else record.seed,
            design=record.design or own.design,
        )
        key = BatchKey(card.key, sampling)
        rows = [BatchRow(key, engine.encode(card.key, TextQuestion(t), "end")) for t in TEXTS]
        batches: list[BatchScores] = []
        times: list[float] = []
        for _ in range(repeats):
            began_s = time.monotonic()
            batches.append(engine.run_batch(rows, lambda _place: True))
            times.append(time.monotonic() - began_s)
        found = tuple(row for row in batches[-1].rows if row is not None)
        return Answered(found, sorted(times)[repeats // 2], sampling)
    finally:
        engine.close()


def _exported(adapter: Path, output: Path, samples: int, design: str) -> Path:
    command = [
        *(sys.executable, "-c", "from server.cli import main; main()"),
        *("export", str(adapter), "-o", str(output), "--mask", f"samples:{samples}"),
        *("--design", design, "--engine", "vllm", "--device", "cpu", "--no-verify"),
    ]
    subprocess.run(command, check=True, cwd=ROOT)  # noqa: S603 - a command of the benchmark's own
    return output


@contextmanager
def _vllm(python: Path | None, record: ExportRecord, log: Path, url: str | None) -> Iterator[str]:
    """Run a real vLLM with the flags that the export needs; or use one that runs already."""
    if url is not None:
        yield url
        return
    m, c = len(record.adapters), len(record.labels.labels)
    command = [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(resolve_base_model(record.base.id)), "--dtype", "float32"),
        *("--enable-lora", "--max-loras", str(m), "--max-cpu-loras", str(m)),
        *("--max-lora-rank", str(record.r), "--max-logprobs", str(c)),
        *("--logprobs-mode", "processed_logprobs"),
        *("--max-model-len", str(record.prompt.max_tokens + 1), "--host", "127.0.0.1"),
    ]
    port = free_port()
    with serving(
        command, log, environment=ENVIRONMENT, port=port, timeout_s=START_S, ready="/health"
    ):
        yield f"http://127.0.0.1:{port}"


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--adapter", type=Path, default=ROOT / "adapters" / "clinc150")
    parser.add_argument("--samples", type=int, default=4, help="M")
    parser.add_argument("--design", default="stratified", help="iid, stratified or antithetic")
    parser.add_argument("--repeats", type=int, default=5, help="batches that are timed")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--python", type=Path, help="Python of an environment with vLLM")
    where.add_argument("--url", help="a vLLM that runs already, on this machine")
    return parser


if __name__ == "__main__":
    sys.exit(main())
