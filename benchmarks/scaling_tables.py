"""Write the tables of docs/scaling.md from the results of the check and of the plan.

Run it after either has changed: ``python -m benchmarks.scaling_tables``. A test fails while the
page differs. Only what stands between the markers is rewritten.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CHECK", "PAGE", "PLAN", "main", "stored", "tables", "with_tables"]

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
RESULTS = Path(__file__).parent / "results"
CHECK = RESULTS / "queue-simulation.json"
PLAN = RESULTS / "scaling-plan.json"
_MISSING = "No check is stored yet.\n"


def begin(name: str) -> str:
    """Return the line above a table."""
    return f"<!-- {name}: written by benchmarks/scaling_tables.py, do not edit -->"


def end(name: str) -> str:
    """Return the line below a table."""
    return f"<!-- end of {name} -->"


def tables(check: dict[str, Any] | None, plan: dict[str, Any]) -> dict[str, str]:
    """Return every table of the page as Markdown, by name; ``check`` is None before the first."""
    return {
        "check": _MISSING if check is None else _check(check),
        "replicas": _replicas(check, plan["replicas"]),
        "gpus": _gpus(plan["cells"]),
        "adapters": _adapters(plan["adapters"]),
        "bottlenecks": _bottlenecks(plan["bottlenecks"]),
        "vllm": _vllm(plan["vllm"]),
    }


def with_tables(page: str, found: dict[str, str]) -> str:
    """Return a page with the text between each pair of markers replaced.

    Raises:
        ValueError: A pair is not there exactly once, in order.
    """
    for name, table in found.items():
        before, first, rest = page.partition(begin(name))
        _, last, after = rest.partition(end(name))
        if not first or not last or first in rest or last in after:
            raise ValueError(f"the page must hold {begin(name)!r} and then its end, each once")
        page = f"{before}{first}\n\n{table}\n{last}{after}"
    return page


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _check(check: dict[str, Any]) -> str:
    rows: list[list[str]] = []
    for load in check["loads"]:
        for who in ("predicted", "measured"):
            found = load[who]
            rows.append(
                [
                    f"{load['load']:g}",
                    who,
                    f"{found['requests']:.0f}",
                    f"{found['answered_per_s']:.2f}",
                    *(f"{1000 * found[f'p{q}_s']:.0f}" for q in (50, 95, 99)),
                    f"{100 * found['shed']:.1f} %",
                    *(
                        [f"{found['utilisation']:.2f}", f"{found['rows_per_batch']:.2f}"]
                        if who == "predicted"
                        else ["", ""]
                    ),
                ]
            )
    header = ["load", "", "requests", "answered/s", "p50, ms", "p95, ms", "p99, ms", "shed"]
    lead = f"{check['hardware']}, {check['subject']['engine']}, M = {check['replica']['samples']}"
    return f"{lead}:\n\n" + _table([*header, "utilisation", "rows a batch"], rows)


def _replicas(check: dict[str, Any] | None, planned: dict[str, Any]) -> str:
    what = f"{_short(planned['model'])} on {planned['gpu']}, M = {planned['samples']}"
    both = [(what, planned)]
    if check is not None:
        both.append(("the server of the check", check["replicas"]))
    rows = [
        [
            what,
            f"{1000 * found['p99_s']:.0f}",
            name,
            _rate(found["one_per_s"]),
            _rate(one["two_per_s"]),
            f"{one['ratio']:.2f}",
        ]
        for what, found in both
        for name, one in found.items()
        if isinstance(one, dict)
    ]
    return _table(["replicas", "p99, ms", "balancer", "one carries/s", "two", "two / one"], rows)


def _gpus(cells: list[dict[str, Any]]) -> str:
    rows = [
        [
            _short(one["model"]),
            one["gpu"],
            str(one["samples"]),
            str(one["gpus_per_replica"]),
            f"{1000 * one['alone_s']:.1f}",
            f"{1000 * one['p99_s']:.0f}",
            _rate(one["saturated_per_s"]),
            _rate(one["carries_per_s"]),
            f"{one['carries_per_s'] / one['saturated_per_s']:.2f}",
            *(f"{count:,}" for count in one["gpus"].values()),
            f"{one['gpu_hours_per_million']['1000']:.3g}",
        ]
        for one in cells
    ]
    header = ["model", "GPU", "M", "GPUs a replica", "alone, ms", "p99, ms"]
    header += ["at most/s", "carries/s", "share"]
    rates = [f"GPUs for {rate}/s" for rate in cells[0]["gpus"]]
    return _table([*header, *rates, "GPU-hours a million, at 1000/s"], rows)


def _adapters(found: list[dict[str, Any]]) -> str:
    rows = [
        [
            _short(one["model"]),
            one["gpu"],
            str(one["gpus"]),
            f"{one['room_bytes'] / 1e9:.1f}",
            *(
                text
                for name in ("gates", "noise")
                for text in (
                    f"{one['adapter_bytes'][name] / 1e6:.1f}",
                    f"{one['adapters'][name]:,}",
                )
            ),
        ]
        for one in found
    ]
    header = ["model", "GPU", "GPUs", "room, GB", "with gates, MB", "adapters"]
    return _table([*header, "with dense noise, MB", "adapters"], rows)


def _bottlenecks(found: list[dict[str, Any]]) -> str:
    names = {
        "weights_per_s": "weight reads",
        "arithmetic_per_s": "arithmetic",
        "event_loop_per_s": "event loop",
    }
    rows: list[list[str]] = []
    for one in found:
        order = sorted(names, key=lambda name, one=one: one[name])
        limits = [f"{names[name]} {_rate(one[name])}" for name in order]
        rows.append([_short(one["model"]), one["gpu"], str(one["samples"]), *limits])
    return _table(["model", "GPU", "M", "first", "second", "third"], rows)


def _vllm(found: list[dict[str, Any]]) -> str:
    rows = [
        [
            f"{one['below']} of {one['layers']}",
            str(one["samples"]),
            f"{one['layers_alone']:.2f}",
            f"{one['crossover']:.2f}",
            f"{one['crossover_label_mass']:.2f}",
        ]
        for one in found
    ]
    header = ["layers below the adapter", "M", "by the layers alone", "crossover"]
    return _table([*header, "with label mass"], rows)


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.3g}"  # noqa: PLR2004 - three digits


def _short(model: str) -> str:
    return model.partition(" ")[0]


def stored() -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return the results that are stored: of the check, if there was one, and of the plan."""
    check = json.loads(CHECK.read_text(encoding="utf-8")) if CHECK.exists() else None
    return check, json.loads(PLAN.read_text(encoding="utf-8"))


def main() -> int:
    """Rewrite the page in place and say whether it changed."""
    check, plan = stored()
    old = PAGE.read_text(encoding="utf-8")
    new = with_tables(old, tables(check, plan))
    PAGE.write_text(new, encoding="utf-8")
    sys.stdout.write("changed\n" if new != old else "unchanged\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
