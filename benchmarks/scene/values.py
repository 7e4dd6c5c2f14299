"""The values of the drift scene: what is played, what was seen, and whether it was right."""

from dataclasses import dataclass, field
from typing import Any

from deploy.prometheus.rule_settings import RuleSettings

__all__ = ["DRIFT_ALERTS", "WATCHED", "Observation", "Report", "SceneError", "Script", "check"]

DRIFT_ALERTS = ("DalorraConfidencePsiHigh", "DalorraConfidenceKsHigh")
"""What must fire and clear."""

QUIET_IN_SCOPE = (*DRIFT_ALERTS, "DalorraAbstainRatioHigh", "DalorraMutualInformationHigh")
WATCHED = {
    "rows": "dalorra:drift:rows",
    "psi": "dalorra:confidence:psi",
    "ks": "dalorra:confidence:ks",
    "abstained": 'dalorra:decision:share{decision="abstain"}',
    "not_accepted": "dalorra:abstain:ratio",
    "median_confidence": "dalorra:confidence:median",
    "median_mutual_information": "dalorra:mutual_information:median",
}


class SceneError(Exception):
    """The scene did not go as it must."""


@dataclass(frozen=True)
class Script:
    """What is played.

    Attributes:
        in_scope: Texts the adapter was made for.
        shifted: Texts it was not made for.
        window_s: Window of the rules, in seconds.
        for_s: How long drift must last before an alert fires.
        min_rows: Fewest rows in the window that may fire.
        scrape_s: Interval of scrapes and of rule evaluations.
        rows_per_request: Texts per request.
        rows_per_s: Most rows sent in a second.
        hold_s: Least time of shifted traffic.
        patience_s: Longest wait for the alerts to fire, and to clear.
    """

    in_scope: tuple[str, ...]
    shifted: tuple[str, ...]
    window_s: int = 60
    for_s: int = 10
    min_rows: int = 200
    scrape_s: float = 1.0
    rows_per_request: int = 8
    rows_per_s: float = 100.0
    hold_s: float = 60.0
    patience_s: float = 300.0

    def rules(self) -> RuleSettings:
        """Return the shipped rules at this script's windows."""
        return RuleSettings(
            interval=f"{round(self.scrape_s * 1000)}ms",
            drift_window=f"{self.window_s}s",
            drift_for=f"{self.for_s}s",
            min_rows=self.min_rows,
        )


@dataclass(frozen=True)
class Observation:
    """What Prometheus said at one moment; ``values`` are those of ``WATCHED``."""

    at_s: float
    phase: str
    values: dict[str, float | None]
    alerts: dict[str, str]

    def line(self) -> str:
        """Return the values in one line."""
        shown = ((k, "-" if v is None else f"{v:.3g}") for k, v in self.values.items())
        return ", ".join(f"{name} {value}" for name, value in shown)


@dataclass
class Report:
    """Everything that was seen, oldest first; ``life`` has one entry per change of an alert."""

    observations: list[Observation] = field(default_factory=list)
    life: list[dict[str, Any]] = field(default_factory=list)

    def last(self, phase: str) -> Observation:
        """Return the last observation of a phase."""
        return [seen for seen in self.observations if seen.phase == phase][-1]

    def peak(self, name: str) -> float:
        """Return the largest value that was seen."""
        return max(seen.values[name] or 0.0 for seen in self.observations)

    def states(self, alert: str) -> list[str]:
        """Return the states an alert went through."""
        return [entry["state"] for entry in self.life if entry["alert"] == alert]


def check(report: Report, script: Script) -> None:
    """Check that the drift was seen, and only while it was there.

    Raises:
        SceneError: With what is wrong.
    """
    limits = script.rules()
    before, after = report.last("in scope"), report.last("back in scope")
    faults: list[str] = []
    for name, limit in (("psi", limits.psi), ("ks", limits.ks)):
        for seen in (before, after):
            value = seen.values[name]
            if value is None or value > limit:
                faults.append(f"{name} is {value} {seen.phase}, expected at most {limit}")
        if report.peak(name) <= limit:
            faults.append(f"{name} rose to {report.peak(name)} only, expected above {limit}")
    usual, most = before.values["not_accepted"] or 0.0, report.peak("not_accepted")
    if most < usual + limits.rise:
        faults.append(f"the share that is not accepted rose from {usual} to {most} only")
    faults += [f"{name} was active in scope" for name in QUIET_IN_SCOPE if name in before.alerts]
    for alert in DRIFT_ALERTS:
        # near its limit an alert may wait and give up again, but it fires once
        states = report.states(alert)
        if states.count("firing") != 1 or "pending" not in states or states[-1] != "resolved":
            faults.append(f"{alert} went through {states}")
    if faults:
        raise SceneError("; ".join(faults))
