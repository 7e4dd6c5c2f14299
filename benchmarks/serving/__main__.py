"""Everything that tries to break a server, one after the other, and one table of it all.

python -m benchmarks.serving --adapter adapters/clinc150 --minutes 20 --results DIRECTORY
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.serving import fuzz, hot_swap, overload, soak, targets
from benchmarks.serving.report import Verdict, table


def main() -> int:
    """Run all programs and return 0 if every verdict is a pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", default="adapters/clinc150")
    parser.add_argument("--minutes", type=float, default=20.0, help="of the soak")
    parser.add_argument("--overload-seconds", type=float, default=120.0)
    parser.add_argument("--cycles", type=int, default=50, help="of the hot swap")
    parser.add_argument("--cases", type=int, default=100_000, help="of the fuzzer")
    parser.add_argument("--seed", type=int, default=1, help="of the fuzzer's cases")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/serving"))
    options = parser.parse_args()
    adapter = ["--adapter", options.adapter]
    parts = {
        "targets": (targets.main, adapter),
        "overload": (overload.main, [*adapter, "--seconds", str(options.overload_seconds)]),
        "hot-swap": (hot_swap.main, ["--cycles", str(options.cycles)]),
        "fuzz": (fuzz.main, ["--cases", str(options.cases), "--seed", str(options.seed)]),
        "soak": (soak.main, [*adapter, "--minutes", str(options.minutes)]),
    }
    verdicts: list[Verdict] = []
    for name, (program, arguments) in parts.items():
        output = options.results / f"{name}.json"
        output.unlink(missing_ok=True)
        try:
            program([*arguments, "--output", str(output)])
            found = json.loads(output.read_text(encoding="utf-8"))["verdicts"]
        except (RuntimeError, OSError) as error:
            sys.stderr.write(f"{name}: {error}\n")
            verdicts.append(Verdict(f"{name}: ran to its end", 0.0, "= 1", passed=False))
            continue
        verdicts += [Verdict(**{**one, "name": f"{name}: {one['name']}"}) for one in found]
    sys.stdout.write(table(verdicts))
    return 0 if all(verdict.passed for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
