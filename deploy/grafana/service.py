"""The dashboard *Service*: does it answer, how fast, and what is the engine busy with?"""

from typing import Any

from grafana_foundation_sdk.builders import dashboard

from deploy.grafana.layout import add_section, chosen_by, new_board, or_all
from deploy.grafana.panels import Heading, Steps, lines, number, rows_table

__all__ = ["service_dashboard"]

CHOSEN = 'instance=~"$instance"'
RATE = "[$__rate_interval]"


def service_dashboard() -> dashboard.Dashboard:
    """Return the dashboard, not yet built."""
    instances = chosen_by("instance", "Instance", "label_values(dalorra_build_info, instance)")
    board = new_board("Service", "dalorra-service", "now-1h").with_variable(
        or_all(instances).multi(multi=True)
    )
    add_section(board, "Now", 4, *((4, panel) for panel in _now()))
    add_section(board, "Traffic and errors", 8, *((6, panel) for panel in _traffic()))
    add_section(board, "Latency", 8, *((8, panel) for panel in _latency()))
    add_section(board, "Queue", 7, *((6, panel) for panel in _queue()))
    add_section(board, "Batches", 7, *((6, panel) for panel in _batches()))
    add_section(board, "Adapters", 7, *zip((9, 5, 5, 5), _adapters(), strict=True))
    return board


def _metric(name: str, *matchers: str) -> str:
    return f"dalorra_{name}{{{', '.join((CHOSEN, *matchers))}}}"


def _rate(name: str, by: str = "") -> str:
    return f"sum by ({by}) (rate({_metric(name)}{RATE}))"


def _quantile(share: float, histogram: str, by: str = "") -> str:
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share}, {_rate(f'{histogram}_bucket', labels)})"


def _mean(histogram: str, by: str = "") -> str:
    return f"{_rate(f'{histogram}_sum', by)} / {_rate(f'{histogram}_count', by)}"


def _failed(window: str) -> str:
    # before its first failure a server has no series of one
    return f"sum(dalorra:http_errors:ratio{window}) or vector(0)"


def _now() -> tuple[Any, ...]:
    ready = Heading("Adapters that can answer", "Over all instances.", "short", 0)
    traffic = Heading("Requests", "Probes and /metrics left out.", "reqps", 1)
    errors = Heading("Failed requests", "Share of 5xx, last five minutes.", "percentunit", 2)
    latency = Heading("Request time, 99 % below", "Network left out.", "s")
    waiting = Heading("Rows waiting", "For the engine.", "short", 0)
    probes = Heading("Self-test", "Golden probes, recomputed at load and every few minutes.")
    passed = {"0": "failed", "1": "passed"}
    return (
        number(ready, {"adapters": f"sum({_metric('adapter_loaded')})"}, Steps(1, 0.5)),
        number(traffic, {"requests": _rate("http_requests_total")}),
        number(errors, {"5xx": _failed("5m")}, Steps(0.001, 0.01)),
        number(latency, {"99 %": _quantile(0.99, "http_request_duration_seconds")}),
        number(waiting, {"rows": f"sum({_metric('queue_depth')})"}),
        number(probes, {"worst": f"min({_metric('selftest_ok')})"}, Steps(1, 0.5), passed),
    )


def _traffic() -> tuple[Any, ...]:
    requests = Heading("Requests by status", "Probes and /metrics left out.", "reqps")
    answers = Heading("Answered rows by decision", "A request may hold many rows.", "cps")
    refused = Heading("Refused, and given up", "By the server; by the client.", "reqps")
    errors = Heading("Share of 5xx", "What the burn-rate alerts read.", "percentunit")
    return (
        lines(requests, {"{{route}} {{status}}": _rate("http_requests_total", "route, status")}),
        lines(answers, {"{{decision}}": _rate("predictions_total", "decision")}, stacked=True),
        lines(
            refused,
            {
                "{{reason}}": _rate("rejections_total", "reason"),
                "client left, {{phase}}": _rate("cancelled_total", "phase"),
            },
        ),
        lines(
            errors,
            {
                "5 minutes": _failed("5m"),
                "1 hour": _failed("1h"),
                "6 hours": _failed("6h"),
            },
        ),
    )


def _latency() -> tuple[Any, ...]:
    request = Heading("Time of a request", "Network left out.", "s")
    stages = Heading(
        "Time by stage, 95 % below",
        "queue is per row, tokenize and serialize per request, forward and uq per batch.",
        "s",
    )
    busy = Heading(
        "Seconds of work per second",
        "forward near 100 % per instance: the engine is saturated.",
        "percentunit",
    )
    shares = {"half below": 0.5, "95 % below": 0.95, "99 % below": 0.99}
    work = _metric("stage_duration_seconds_sum", 'stage!="queue"')
    return (
        lines(
            request,
            {name: _quantile(q, "http_request_duration_seconds") for name, q in shares.items()},
        ),
        lines(stages, {"{{stage}}": _quantile(0.95, "stage_duration_seconds", "stage")}),
        lines(busy, {"{{stage}}": f"sum by (stage) (rate({work}{RATE}))"}, stacked=True),
    )


def _queue() -> tuple[Any, ...]:
    depth = Heading("Rows waiting", "For the engine.", "short")
    tokens = Heading("Tokens waiting", "Times samples: scale on this one.", "short")
    inside = Heading("Requests being answered", "At the moment of the scrape.", "short")
    waited = Heading("Time in the queue, 99 % below", "Over all instances.", "s")
    route = f"sum by (route) ({_metric('http_requests_in_progress')})"
    return (
        lines(depth, {"{{instance}}, {{priority}}": _metric("queue_depth")}),
        lines(tokens, {"{{instance}}, {{priority}}": _metric("queue_tokens")}),
        lines(inside, {"{{route}}": route}),
        lines(waited, {"99 %": "dalorra:queue_wait_seconds:p99"}),
    )


def _batches() -> tuple[Any, ...]:
    rows = Heading("Rows of a batch", "Many: the engine is well used.", "short")
    tokens = Heading("Tokens of a batch", "Times samples, with the padding there is.", "short")
    padding = Heading("Padding", "Share of a batch that is computed for nothing.", "percentunit")
    released = Heading(
        "Why batches were released", "full: the queue was deep enough; timeout: it waited.", "cps"
    )
    reasons = _rate("batch_released_total", "reason")
    return (
        lines(rows, _mean_and_high("batch_rows")),
        lines(tokens, _mean_and_high("batch_tokens")),
        lines(padding, _mean_and_high("batch_padding_ratio")),
        lines(released, {"{{reason}}": reasons}, stacked=True),
    )


def _mean_and_high(histogram: str) -> dict[str, str]:
    return {"mean": _mean(histogram), "95 % below": _quantile(0.95, histogram)}


def _adapters() -> tuple[Any, ...]:
    loaded = Heading("Loaded adapters", "Number of instances that hold each.", decimals=0)
    residency = Heading("Instances that can answer", "By adapter.", "short", 0)
    probes = Heading("Self-test difference", "Largest, from the stored golden probabilities.")
    effort = Heading("Effort per answer", "Posterior samples, and tokens of the prompt.", "short")
    columns = ("adapter", "revision", "base", "mask_set")
    info = f"sum by ({', '.join(columns)}) ({_metric('adapter_info')})"
    worst = f"max by (adapter) ({_metric('selftest_max_abs_error')})"
    return (
        rows_table(loaded, {"instances": info}, columns),
        lines(residency, {"{{adapter}}": f"sum by (adapter) ({_metric('adapter_loaded')})"}),
        lines(probes, {"{{adapter}}": worst}),
        lines(
            effort,
            {
                "samples, {{adapter}}": _mean("posterior_samples", "adapter"),
                "tokens, {{adapter}}": _mean("input_tokens", "adapter"),
            },
        ),
    )
