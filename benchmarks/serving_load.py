"""Closed-loop load on a running server: requests per second, p50 and p99, for each client count.

Every client sends its next request when the last answer came. One row a request, texts of a JSONL
file in an order that is shuffled once, so that a short block has rows of all kinds (files are often
sorted by label) and no cache anywhere could answer. The deterministic pass (``mean_mask``) and
the Monte-Carlo predictive alternate in blocks within one run; their ratio is of medians.

    dalorra serve adapters/clinc150 &
    python benchmarks/serving_load.py --texts data/clinc150/test.jsonl --output results.json
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from hardware import describe_hardware


async def client(
    http: httpx.AsyncClient, texts: list[str], body: dict[str, Any], deadline_s: float
) -> list[float]:
    """Send requests until the deadline and return their latencies in seconds."""
    latencies, i = [], 0
    while time.perf_counter() < deadline_s:
        began_s = time.perf_counter()
        answer = await http.post("/v1/classify", json={**body, "input": texts[i % len(texts)]})
        answer.raise_for_status()
        latencies.append(time.perf_counter() - began_s)
        i += 1
    return latencies


async def block(
    url: str, texts: list[str], clients: int, body: dict[str, Any], seconds: float
) -> dict[str, float]:
    """Run one block of load and summarise it."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        began_s = time.perf_counter()
        shares = [texts[k::clients] for k in range(clients)]
        deadline_s = began_s + seconds
        runs = await asyncio.gather(*(client(http, s, body, deadline_s) for s in shares))
        elapsed_s = time.perf_counter() - began_s
    latencies = sorted(x for run in runs for x in run)
    return {
        "requests": len(latencies),
        "requests_per_s": len(latencies) / elapsed_s,
        "p50_s": statistics.median(latencies),
        "p99_s": latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
    }


async def main() -> None:
    """Parse the arguments, run all blocks, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--texts", type=Path, required=True, help="JSONL file with a text field")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--num-samples", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=15.0, help="length of one block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = options.texts.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(row)["text"] for row in rows if row.strip()]
    random.Random(0).shuffle(texts)  # noqa: S311  an order, not a secret
    policy = {"min_confidence": 0.9}  # an adapter's own may need what one pass does not have
    bodies: dict[str, dict[str, Any]] = {
        f"monte_carlo M={options.num_samples}": {
            "num_samples": options.num_samples,
            "policy": policy,
        },
        "mean_mask": {"estimator": "mean_mask", "policy": policy},
    }
    await block(options.url, texts, 2, bodies["mean_mask"], 2.0)  # warm-up, not counted
    blocks: dict[str, list[dict[str, float]]] = {}
    for repeat in range(options.repeats):
        for clients in options.clients:
            for name, body in bodies.items():
                key = f"{clients} client(s), {name}"
                found = await block(options.url, texts, clients, body, options.seconds)
                blocks.setdefault(key, []).append(found)
                sys.stderr.write(f"{repeat + 1}/{options.repeats} {key}: {found}\n")
    report: dict[str, Any] = {
        "hardware": describe_hardware(),
        "torch": torch.__version__,
        "seconds_per_block": options.seconds,
        "medians": {
            key: {name: statistics.median(b[name] for b in runs) for name in runs[0]}
            for key, runs in blocks.items()
        },
        "blocks": blocks,
    }
    report["ratio_monte_carlo_to_mean_mask_p50"] = {
        str(clients): report["medians"][f"{clients} client(s), {next(iter(bodies))}"]["p50_s"]
        / report["medians"][f"{clients} client(s), mean_mask"]["p50_s"]
        for clients in options.clients
    }
    text = json.dumps(report, indent=1)
    sys.stdout.write(text + "\n")
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
