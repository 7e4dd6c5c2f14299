"""Parts of a run that need no model."""

from dalorra_core.bench.runs import _repeats
from dalorra_core.data.collate import EncodedExample


def test_rows_that_ask_the_same_are_one_group() -> None:
    def row(name: str, *tokens: int, allowed: tuple[int, ...] | None = None) -> EncodedExample:
        return EncodedExample(name, tokens, 0, allowed, truncated=False)

    rows = [
        row("a", 1, 2),
        row("b", 3),
        row("c", 1, 2),
        row("d", 1, 2, allowed=(0, 1)),
        row("e", 3),
        row("f", 1, 2),
    ]
    assert _repeats(rows).tolist() == [0, 1, 0, 3, 1, 0]
