"""Which rows of a data set are taken: held out, a number of them, or a number of each class.

Every choice is made row by row from a named stream, so it does not depend on the order of a file,
on the machine or on what else is chosen: a larger subset contains the smaller one, and a row that
is held out is held out in every run.
"""

from collections.abc import Sequence

from dalorra_core.data.examples import Example, TextExample, gold_label
from dalorra_core.errors import ConfigError
from dalorra_core.sampling.streams import uniforms

__all__ = ["split_held_out", "take_per_class", "take_rows"]


def split_held_out(
    examples: Sequence[Example], share: float
) -> tuple[list[Example], list[Example]]:
    """Return (rows to train on, rows held out), each in the order given.

    A row is held out by a hash of its text or question: equal ones, which public data sets have
    under different ids, fall on the same side, in this data set and in another one.

    Args:
        examples: Rows.
        share: Expected share of the rows that is held out, in [0, 1); 0 holds out none.

    Raises:
        ConfigError: ``share`` lies outside its domain.
    """
    if not 0 <= share < 1:
        raise ConfigError(f"data.held_out_share must be at least 0 and below 1, got {share}")
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        drawn = uniforms(("held-out", _content(example)), 1)[0]
        sides[int(drawn < share)].append(example)
    return sides


def take_rows(examples: Sequence[Example], count: int, *, seed: int) -> list[Example]:
    """Return ``count`` rows, each class in its share of all rows, in the order given.

    Args:
        examples: Labelled rows.
        count: Rows to take, at least 1 and at most all of them.
        seed: Picks the rows; another seed, other rows.

    Returns:
        The rows. Those of a smaller ``count`` and the same seed are among them.

    Raises:
        ConfigError: ``count`` lies outside its domain.
    """
    if not 1 <= count <= len(examples):
        raise ConfigError(
            f"data.train_rows must lie in 1..{len(examples)}, the rows there are, got {count}"
        )
    ranked = sorted(
        ((rank + 0.5) / len(places), label, place)
        for label, places in _drawn(examples, seed).items()
        for rank, place in enumerate(places)
    )
    return [examples[place] for place in sorted(place for _, _, place in ranked[:count])]


def take_per_class(examples: Sequence[Example], count: int, *, seed: int) -> list[Example]:
    """Return ``count`` rows of every class, in the order given.

    Args:
        examples: Labelled rows.
        count: Rows of each class, at least 1 and at most those of the smallest class.
        seed: Picks the rows; another seed, other rows.

    Returns:
        The rows. Those of a smaller ``count`` and the same seed are among them.

    Raises:
        ConfigError: ``count`` lies outside its domain; names the smallest class.
    """
    drawn = _drawn(examples, seed)
    size, smallest = min((len(places), label) for label, places in drawn.items())
    if not 1 <= count <= size:
        raise ConfigError(
            f"data.per_class must lie in 1..{size}, the rows of the smallest class "
            f"{smallest!r}, got {count}"
        )
    return [examples[i] for i in sorted(i for places in drawn.values() for i in places[:count])]


def _drawn(examples: Sequence[Example], seed: int) -> dict[str, list[int]]:
    """Return the places of each class's rows in the order in which they are drawn."""
    classes: dict[str, list[tuple[float, int]]] = {}
    for place, example in enumerate(examples):
        drawn = float(uniforms(("subset", seed, example.id), 1)[0])
        classes.setdefault(str(gold_label(example)), []).append((drawn, place))
    return {label: [place for _, place in sorted(found)] for label, found in classes.items()}


def _content(example: Example) -> str:
    text = example.text if isinstance(example, TextExample) else example.question
    return " ".join(text.casefold().split())
