"""dalorra_core.calibration.split: parts that never move, rows that are known again."""

import hashlib

import torch

from dalorra_core.calibration.split import DIGEST_BYTES, digests, overlap, parts, row_digest
from dalorra_core.data.examples import Choice, ChoiceExample, TextExample


def test_parts_are_a_quarter_a_quarter_and_a_half() -> None:
    n = 20_000
    shares = torch.bincount(parts([f"row-{i}" for i in range(n)]), minlength=3) / n
    five_se = 5 * (0.25 / n) ** 0.5
    torch.testing.assert_close(shares, torch.tensor([0.25, 0.25, 0.5]), rtol=0, atol=five_se)


def test_a_part_follows_from_the_id_alone() -> None:
    """Recorded: a row that moved to another part would void every stored certificate."""
    assert parts(["a", "b", "c", "d", "e", "f"]).tolist() == [2, 0, 0, 0, 0, 0]
    ids = [f"clinc150-validation-{i:05}" for i in range(400)]
    together = parts(ids)
    assert together.tolist() == [int(parts([row_id])[0]) for row_id in ids]


def test_a_digest_is_of_the_question_and_not_of_id_or_label() -> None:
    row = TextExample("1", "hello", "greeting")
    assert row_digest(row) == row_digest(TextExample("2", "hello", "other"))
    assert row_digest(row) == hashlib.sha256(b'"hello"').digest()[:DIGEST_BYTES]
    assert row_digest(row) != row_digest(TextExample("1", "hello ", "greeting"))


def test_a_digest_of_a_question_has_all_of_it() -> None:
    choices = (Choice("A", "x"), Choice("B", "y"))
    question = ChoiceExample("1", "q", "c", choices, "A")
    others = [
        ChoiceExample("1", "p", "c", choices, "A"),
        ChoiceExample("1", "q", None, choices, "A"),
        ChoiceExample("1", "q", "c", choices[::-1], "A"),
    ]
    found = {row_digest(example) for example in (question, *others)}
    assert len(found) == 4
    assert row_digest(question) == row_digest(ChoiceExample("2", "q", "c", choices, "B"))


def test_rows_seen_before_are_named() -> None:
    stored = digests([TextExample("a", "one"), TextExample("b", "two")])
    assert (stored.shape, stored.dtype) == ((2, DIGEST_BYTES), torch.uint8)
    rows = [TextExample("x", "two"), TextExample("a", "three"), TextExample("y", "one")]
    assert overlap(rows, stored) == ["x", "y"]
