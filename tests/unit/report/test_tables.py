"""Tables of a bench: numbers by hand, marks only where they are earned, labels kept plain."""

import math
from dataclasses import replace

import torch

from dalorra_core.metrics.scored import METRICS, ScoredRows
from dalorra_core.report.tables import (
    TABLE_METRICS,
    Cell,
    RunResult,
    column_scores,
    difference_markdown,
    metric_table,
    results_markdown,
    table_markdown,
)

ROWS, RESAMPLES = 60, 200


def run(
    method: str, seed: int, right: int, column: str = "trec", *, rows: bool = True
) -> RunResult:
    """A run that answers the first ``right`` rows correctly, always 90 % sure."""
    labels = torch.zeros(ROWS, dtype=torch.int64)
    first = torch.where(torch.arange(ROWS) < right, 0.9, 0.1)
    log_probs = torch.stack([first, 1 - first], dim=1).log()
    found = ScoredRows(labels, log_probs, {}, tuple(map(str, range(ROWS))))
    accuracy = right / ROWS
    nll = -(accuracy * math.log(0.9) + (1 - accuracy) * math.log(0.1))
    values = {"accuracy": accuracy, "nll": nll, "ece": abs(accuracy - 0.9), "aurc": None}
    return RunResult(method, column, seed, values, {"ece": 0.021}, found if rows else None)


def three_seeds(method: str, *right: int, column: str = "trec") -> list[RunResult]:
    return [run(method, seed, count, column) for seed, count in enumerate(right, 1)]


def table_of(results: list[RunResult], metric: str = "accuracy") -> str:
    scores = column_scores(results, metric, num_resamples=RESAMPLES)
    return table_markdown(metric_table(results, metric, scores))


def row_of(text: str, method: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {method} |"))


def test_mean_and_deviation_by_hand_in_the_order_given() -> None:
    results = three_seeds("Z", 54, 51, 48) + three_seeds("A", 51, 51, 51)
    text = table_of(results)
    assert text.splitlines()[:5] == [
        "### Accuracy (%, higher is better)",
        "",
        "|  | trec |",
        "| --- | ---: |",
        "| Z | 85.00 ± 5.00 |",
    ]
    assert row_of(text, "A") == "| A | 85.00 ± 0.00 |"
    assert "Mean over 3 seeds, ± sample standard deviation." in text


def test_marks_need_a_paired_test_and_not_a_larger_mean() -> None:
    clear = three_seeds("a", 58, 58, 57) + three_seeds("b", 40, 41, 40) + three_seeds("c", 9, 8, 9)
    text = table_of(clear)
    assert row_of(text, "a") == "| a | **96.11 ± 0.96** |"
    assert row_of(text, "b") == "| b | <ins>67.22 ± 0.96</ins> |"
    assert row_of(text, "c") == "| c | 14.44 ± 0.96 |"
    assert "Bold: the best mean, and better than every other method" in text
    lower = table_of(clear, "nll")
    assert "**" in row_of(lower, "a")
    close = three_seeds("a", 54, 50, 52) + three_seeds("b", 50, 53, 51) + three_seeds("c", 9, 8, 9)
    text = table_of(close)
    assert row_of(text, "a") == "| a | 86.67 ± 3.33 |"
    assert row_of(text, "b") == "| b | <ins>85.56 ± 2.55</ins> |"  # above c, whatever a is
    text = table_of(close[:6])
    assert "**" not in text
    assert "<ins>" not in text
    assert "Nothing is marked: no paired test supports a best method." in text


def test_two_seeds_mark_nothing() -> None:
    text = table_of(three_seeds("a", 58, 58) + three_seeds("b", 9, 9))
    assert "**" not in text
    assert "fewer than 3 seeds" in text
    one = table_of(three_seeds("a", 58))
    assert row_of(one, "a") == "| a | 96.67 |"
    assert "Mean over 1 seed. " in one


def test_results_without_rows_are_shown_and_never_marked() -> None:
    good = [run("a", seed, 58, rows=False) for seed in range(3)]
    text = table_of(good + three_seeds("b", 9, 9, 9))
    assert row_of(text, "a") == "| a | 96.67 ± 0.00 |"
    assert "**" not in text


def test_ece_stands_beside_its_noise_floor_and_gaps_are_shown() -> None:
    results = [
        *three_seeds("a", 54, 51, 48),
        *three_seeds("b", 54, 54),
        run("a", 1, 30, "trec | ood"),
    ]
    text = table_of(results, "ece")
    assert "|  | trec | trec \\| ood |" in text
    assert row_of(text, "a") == "| a | 5.00 ± 5.00 (2.10) | 40.00 (2.10) [1 seed] |"
    assert row_of(text, "b") == "| b | 0.00 ± 0.00 (2.10) [2 seeds] | - |"
    assert "perfectly calibrated models" in text
    table = metric_table(results, "ece", {})
    assert table.cells["a", "trec | ood"] == Cell(abs(30 / ROWS - 0.9), None, 1, 0.021)


def test_differences_with_interval_and_adjusted_p_value() -> None:
    results = (
        three_seeds("MLE", 40, 41, 40)
        + three_seeds("a", 58, 59, 58)
        + three_seeds("b", 41, 40, 42)
        + three_seeds("c", 50, 50)
        + [run("d", 9, 50)]
    )
    scores = column_scores(results, "accuracy", num_resamples=RESAMPLES)
    text = difference_markdown("accuracy", scores, "MLE")
    assert text.startswith("### Accuracy (%, higher is better): difference to MLE\n")
    a, b, c = (row_of(text, method) for method in "abc")
    assert a.startswith("| a | **+30.00 [+")
    # Two of three comparisons have no smaller p-value: 3 * 2 / (R + 1).
    assert a.endswith("p 0.030** |")
    assert b.startswith("| b | +1.11 [-")
    assert c.endswith("† |")
    assert "fewer than 3 common seeds" in text
    assert "| MLE |" not in text
    assert "| d |" not in text  # no seed in common
    assert difference_markdown("accuracy", scores, "none") == ""
    few = column_scores(results[:9], "accuracy", num_resamples=RESAMPLES)
    assert "†" not in difference_markdown("accuracy", few, "MLE")


def test_an_undefined_difference_is_said_to_be() -> None:
    """Four wrong rows: some resample holds none, so no interval of an AUROC of errors."""
    confidence = torch.linspace(0.1, 0.9, ROWS)
    results = [
        replace(
            one,
            metrics={"auroc_error_confidence": 0.5},
            rows=replace(one.rows, scores={"confidence": confidence}),
        )
        for one in three_seeds("a", 57, 57, 57) + three_seeds("b", 57, 57, 57)
        if one.rows is not None
    ]
    scores = column_scores(results, "auroc_error_confidence", num_resamples=RESAMPLES)
    text = difference_markdown("auroc_error_confidence", scores, "a")
    assert row_of(text, "b") == "| b | +0.00 [undefined] |"
    heading = "### AUROC of finding errors by confidence (%, higher is better): difference to a"
    assert text.startswith(heading)


def test_all_tables_in_one_text() -> None:
    results = three_seeds("a", 58, 58, 57) + three_seeds("b", 40, 41, 40)
    text = results_markdown(results, reference="b", num_resamples=RESAMPLES)
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [
        "### Accuracy (%, higher is better)",
        "### Accuracy (%, higher is better): difference to b",
        "### ECE (%, lower is better)",
        "### ECE (%, lower is better): difference to b",
        "### NLL (nats, lower is better)",
        "### NLL (nats, lower is better): difference to b",
    ]
    assert "difference" not in results_markdown(results, num_resamples=RESAMPLES)
    assert row_of(text, "a")
    assert "| a | **0.1" in text.replace("**0.16", "**0.1")


def test_detection_tells_another_task_from_the_runs_own() -> None:
    """Own rows are surer than the other task's in method a, and not in b."""
    results: list[RunResult] = []
    for one in three_seeds("a", 50, 50, 50) + three_seeds("b", 50, 50, 50):
        assert one.rows is not None
        rise = torch.linspace(0.0, 0.4, ROWS)
        own = replace(one.rows, scores={"confidence": rise + (0.5 if one.method == "a" else 0.0)})
        other = replace(one.rows, scores={"confidence": rise}, ids=("x",) * ROWS)
        value = {"accuracy": 0.1, "auroc_oos_confidence": 1.0 if one.method == "a" else 0.5}
        results.append(replace(one, metrics=value, rows=other, in_rows=own))
    found = column_scores(results, "auroc_oos_confidence", num_resamples=RESAMPLES)["trec"]
    assert found["a"].observed.tolist() == [1.0] * 3
    assert found["b"].observed.tolist() == [0.5] * 3
    assert found["a"].draw.num_rows == 2 * ROWS
    own_rows = column_scores(results, "accuracy", num_resamples=RESAMPLES)["trec"]
    assert own_rows["a"].draw.num_rows == ROWS
    text = table_of(results, "auroc_oos_confidence")
    assert row_of(text, "a") == "| a | **100.00 ± 0.00** |"


def test_methods_that_answered_other_rows_are_shown_and_not_compared() -> None:
    results = [one for m, k in (("x", 20), ("a", 58), ("b", 40)) for one in three_seeds(m, k, k, k)]
    for place in (0, 1, 2):
        rows = results[place].rows
        assert rows is not None
        other = replace(rows, ids=tuple(map(str, range(1, ROWS + 1))))
        results[place] = replace(results[place], rows=other)
    assert set(column_scores(results, "accuracy", num_resamples=RESAMPLES)["trec"]) == {"a", "b"}
    text = table_of(results)
    assert row_of(text, "x") == "| x | 33.33 ± 0.00 |"
    assert row_of(text, "a") == "| a | **96.67 ± 0.00** |"
    assert "In no test, since scored on other rows than most: x on trec." in text
    assert "In no test" not in table_of(results[3:])


def test_equal_methods_share_a_mark() -> None:
    results = [one for m, k in (("a", 58), ("b", 40)) for one in three_seeds(m, k, k, k)]
    twins = [*results, *three_seeds("a+T", 58, 58, 58)]
    text = table_of(twins)
    assert row_of(text, "a").endswith("**96.67 ± 0.00** |")
    assert row_of(text, "a+T").endswith("**96.67 ± 0.00** |")
    assert "share a mark" in text
    assert "share a mark" not in table_of(results)


def test_every_metric_has_a_table_and_each_calibration_error_its_floor() -> None:
    assert set(TABLE_METRICS) == set(METRICS)
    assert len(TABLE_METRICS) == len(METRICS)
    results = [
        replace(
            one,
            metrics={"adaptive_ece": 0.05, "classwise_ece": 0.06, "augrc": 0.07},
            noise_floors={"adaptive_ece": 0.031, "classwise_ece": 0.012},
        )
        for one in three_seeds("a", 50, 50, 50)
    ]
    text = results_markdown(results, num_resamples=RESAMPLES)
    assert "| a | 5.00 ± 0.00 (3.10) |" in text
    assert "| a | 6.00 ± 0.00 (1.20) |" in text
    assert "| a | 7.00 ± 0.00 |" in text
    assert text.count("perfectly calibrated models") == 2


def test_a_label_cannot_break_the_table() -> None:
    text = table_of([run("**x** | <b>\n`y`", 1, 50)])
    assert "| \\*\\*x\\*\\* \\| \\<b\\> \\`y\\` | 83.33 |" in text
