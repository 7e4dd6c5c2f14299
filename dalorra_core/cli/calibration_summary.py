"""How a calibration reads at a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from dalorra_core.artifact.calibration_record import Limit, Policy, Uncertified
from dalorra_core.calibration.calibrate import CalibrationOutcome
from dalorra_core.metrics.selective import augrc, aurc

__all__ = ["limit_text", "policy_text", "show_calibration", "show_table"]

_LABELS_SHOWN = 5


def limit_text(limit: Limit | None) -> str:
    """Return a limit in a few characters; ``never`` for none."""
    return "never" if limit is None else f"{limit.score} {limit.threshold:.6g}"


def policy_text(policy: Policy) -> str:
    """Return a policy and its receipt as one line."""
    accept = "accepts nothing" if policy.accept is None else f"accept: {limit_text(policy.accept)}"
    if policy.accept_by_label:
        certified = sum(value is not None for value in policy.accept_by_label.values())
        accept = (
            f"accept: {policy.accept and policy.accept.score} by label, {certified} of "
            f"{len(policy.accept_by_label)} labels"
        )
    abstain = f"abstain: {limit_text(policy.abstain)}" if policy.abstain else "never abstains"
    held, on = policy.guarantee, policy.chosen_on
    if held is None:
        target = policy.target_selective_risk
        receipt = "guarantee: none"
        if policy.accept is not None and target is not None:
            receipt += f"; met selective risk {target:g} on {on.n} rows of {on.split}"
    else:
        each = " for each label" if held.per_label else ""
        receipt = (
            f"guarantee: risk <= {held.target_risk:g}{each} with confidence {1 - held.delta:g} at "
            f"<= {held.out_of_scope_share:g} out of scope, n {held.n}, {held.calibrated_at[:10]}"
        )
    return f"{policy.name}: {accept}; {abstain}; {receipt}"


def show_calibration(outcome: CalibrationOutcome, name: str, revision: str) -> None:
    """Print what calibration found, on stdout."""
    c, out = outcome.calibration, Console(soft_wrap=True, highlight=False, markup=False)
    rows, t = c.rows, c.temperature
    out.print(
        f"{name} (revision {revision}) calibrated on {rows.n} rows of {rows.source}, "
        f"{rows.n_out_of_scope} out of scope: {rows.n_fit} fit, {rows.n_select} select, "
        f"{rows.n_certify} certify"
    )
    verdict = f"kept, T = {t.value:.4f}" if t.kept else f"T = {t.fitted:.4f} not kept"
    out.print(
        f"temperature: {verdict}; NLL of {t.n_held_out} other rows {t.nll_before:.4f} -> "
        f"{t.nll_after:.4f}"
    )
    held = outcome.rows.of_part("certify")
    sure = held.score("confidence")
    out.print(
        f"by confidence, {len(held)} certify rows as they are: AURC "
        f"{aurc(sure, held.correct):.4f}, AUGRC {augrc(sure, held.correct):.4f}"
    )
    for text in outcome.notes:
        out.print(f"note: {text}")
    out.print(f"certificates hold while at most {outcome.out_of_scope_share:g} is out of scope")
    show_table("policies", _policy_rows(outcome.policies))
    _show_uncertified(out, c.uncertified)
    show_table(
        "prediction sets",
        [
            {
                "kind": s.kind,
                "alpha": f"{s.alpha:g}",
                "quantile": f"{s.quantile:.4f}",
                "coverage": f"{s.empirical_coverage:.4f}",
                "mean size": f"{s.mean_size:.2f}",
                "n": str(s.n),
            }
            for s in c.prediction_sets
        ],
    )


def _policy_rows(policies: Sequence[Policy]) -> list[dict[str, str]]:
    return [
        {
            "policy": p.name,
            "accept": limit_text(p.accept) + (" (by label)" if p.accept_by_label else ""),
            "abstain": limit_text(p.abstain),
            "risk bound": "none" if p.guarantee is None else f"{p.guarantee.risk_upper_bound:.4f}",
            "risk here": _number(p.chosen_on.selective_risk),
            "coverage": _number(p.chosen_on.coverage),
            "in scope": "" if p.guarantee is None else f"{p.guarantee.in_scope_coverage:.4f}",
        }
        for p in policies
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _show_uncertified(out: Console, found: Sequence[Uncertified]) -> None:
    for item in (u for u in found if u.label is None):
        out.print(f"target {item.target_risk:g} not certified: {item.reason}")
    for target in sorted({u.target_risk for u in found if u.label is not None}):
        names = [u.label for u in found if u.label is not None and u.target_risk == target]
        more = ", ..." if len(names) > _LABELS_SHOWN else ""
        out.print(
            f"target {target:g} not certified for {len(names)} labels, which the policy "
            f"per-label-{target:g} never accepts: {', '.join(names[:_LABELS_SHOWN])}{more}"
        )


def show_table(title: str, rows: Sequence[dict[str, str]]) -> None:
    """Print rows of equal columns, on stdout, as wide as they are."""
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*row.values())
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]]
    Console(width=sum(widths) + 3 * len(widths) + 2).print(table)  # a log has no width of its own
