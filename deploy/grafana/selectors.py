"""PromQL for the adapter and revision that are chosen at the top of a dashboard."""

__all__ = ["metric", "quantile", "rule"]

CHOSEN = 'adapter="$adapter", revision=~"$revision"'


def rule(name: str, *matchers: str) -> str:
    """Return a recording rule of the chosen adapter; ``name`` without its prefix."""
    return f"dalorra:{name}{{{', '.join((CHOSEN, *matchers))}}}"


def metric(name: str, *matchers: str) -> str:
    """Return a metric of the chosen adapter; ``name`` without its prefix."""
    return f"dalorra_{name}{{{', '.join((CHOSEN, *matchers))}}}"


def quantile(share: float, histogram: str) -> str:
    """Return the value that this share of the answers lies below, over the chosen window."""
    rate = f"rate({metric(f'{histogram}_bucket')}[$window])"
    return f"histogram_quantile({share}, sum by (revision, le) ({rate}))"
