"""What may differ between two installations of the rules: windows, waiting times and limits."""

from dataclasses import dataclass

__all__ = ["RuleSettings"]


@dataclass(frozen=True)
class RuleSettings:
    """One value for every number in the rules; the defaults are what is shipped.

    Attributes:
        interval: How often the rules are evaluated.
        drift_window: Traffic that is compared with the reference.
        drift_for: How long drift must last before its alert fires.
        min_rows: Fewest rows in the window that may fire a drift alert. Without any drift the
            99th percentile of PSI is 0.25 at 100 rows and 0.12 at 200.
        psi: Limit of the population stability index of the confidence.
        ks: Limit of the Kolmogorov-Smirnov distance of the confidence.
        factor: How many times its reference the abstention rate or the median mutual information
            may be.
        rise: The abstention rate must also be this much above its reference.
        label_shift: Total variation of the predicted labels above what chance alone explains.
        feedback_window: Feedback that the recent risk and the calibration error are taken from.
        feedback_for: How long a risk must stay above its target.
        min_labels: Fewest labelled answers that may fire an alert on risk.
        ece: Limit of the expected calibration error; needs five times ``min_labels``.
        deadline_s: The server's ``request_timeout_s``; waiting for half of it is too long.
        objective: Share of requests that shall not fail with 5xx.
        min_requests: Fewest requests in the long window that may fire a burn-rate alert.
        runbook: Where docs/operations.md can be read; each alert adds its anchor.
    """

    interval: str = "30s"
    drift_window: str = "1h"
    drift_for: str = "30m"
    min_rows: int = 500
    psi: float = 0.2
    ks: float = 0.15
    factor: float = 2.0
    rise: float = 0.05
    label_shift: float = 0.15
    feedback_window: str = "1d"
    feedback_for: str = "1h"
    min_labels: int = 100
    ece: float = 0.1
    deadline_s: float = 30.0
    objective: float = 0.999
    min_requests: int = 100
    runbook: str = "docs/operations.md"
