"""Drift, seen: in-scope traffic, a shift out of scope, and back, watched by a real Prometheus.

    python -m benchmarks.drift_scene adapters/clinc150 --in-scope data/clinc150/test.jsonl \
        --shifted data/banking77/test.jsonl --out benchmarks/results/drift-scene-clinc150.json

Starts ``dalorra serve`` and Prometheus with the shipped rules rendered at short windows. Sends
in-scope rows until the window is full, then rows the adapter was not made for (``--shifted``, and
those of ``--in-scope`` with the out-of-scope label) until the drift alerts fire, then in-scope rows
until they have cleared. Prints the life of every alert; fails when drift was not seen or stayed.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.hardware import describe_hardware
from benchmarks.scene.play import play, serve_command
from benchmarks.scene.values import WATCHED, Report, Script, check

__all__ = ["main"]


def _texts(files: Sequence[Path], outside: str, *, wanted: Callable[[str], bool]) -> list[str]:
    rows = [
        json.loads(line)
        for file in files
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    return [row["text"] for row in rows if wanted(row.get("label", outside))]


def main() -> None:
    """Play the scene of the command line, print and write what was seen."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--base", help="base model; the adapter's own if left out")
    parser.add_argument("--in-scope", type=Path, nargs="+", required=True)
    parser.add_argument("--shifted", type=Path, nargs="*", default=[])
    parser.add_argument("--out-of-scope-label", default="oos")
    for name in ("window-s", "for-s", "min-rows", "rows-per-request"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Script, name.replace("-", "_")))
    for name in ("scrape-s", "rows-per-s", "hold-s", "patience-s"):
        parser.add_argument(
            f"--{name}", type=float, default=getattr(Script, name.replace("-", "_"))
        )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = vars(parser.parse_args())
    outside, base = options.pop("out_of_scope_label"), options.pop("base")
    files, shifted_files = options.pop("in_scope"), options.pop("shifted")
    adapter, out, seed = options.pop("adapter"), options.pop("out"), options.pop("seed")
    in_scope = _texts(files, outside, wanted=lambda label: label != outside)
    shifted = _texts(files, outside, wanted=lambda label: label == outside)
    shifted += _texts(shifted_files, outside, wanted=lambda _label: True)
    for texts in (in_scope, shifted):
        random.Random(seed).shuffle(texts)  # noqa: S311 - files are sorted by label
    script = Script(tuple(in_scope), tuple(shifted), **options)
    report = play(serve_command(adapter, *(("--base", base) if base else ())), script)
    if out is not None:
        _write(out, adapter, script, report)
    check(report, script)


def _write(out: Path, adapter: Path, script: Script, report: Report) -> None:
    played = asdict(script) | {
        "in_scope": f"{len(script.in_scope)} texts",
        "shifted": f"{len(script.shifted)} texts",
    }
    content = {
        "adapter": adapter.name,
        "hardware": describe_hardware(),
        "script": played,
        "peaks": {name: report.peak(name) for name in WATCHED},
        "ends": {
            phase: report.last(phase).values for phase in ("in scope", "shifted", "back in scope")
        },
        "life": report.life,
        "observations": [asdict(seen) for seen in report.observations],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
