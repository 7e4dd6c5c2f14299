"""Hostile input: it is taken and sound, or refused as promised; nothing else ever comes out.

The cases of ``python -m benchmarks.serving.fuzz`` in small; what that program finds is kept in
``corpus/`` and tried here again.
"""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hostile.every_target import CORPUS, WEIGHTS, every_target, kept_cases
from tests.hostile.targets import Target

FOLDERS = Path(__file__).parent
QUICK = settings(
    max_examples=150,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
        HealthCheck.function_scoped_fixture,
    ],
)
NAMES = (
    *("input", "text", "model", "question", "choices", "label", "policy", "accept", "abstain"),
    *(
        "name",
        "max_risk",
        "confidence",
        "seed",
        "num_samples",
        "metadata",
        "prediction_id",
        "top_k",
    ),
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)  # lone surrogates too
    | st.sampled_from(NAMES),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return every_target(tmp_path_factory.mktemp("hostile"))


TARGET_NAMES = (
    *("classify", "feedback", "evaluate", "prediction_id"),
    *("predict", "infer", "load", "alias", "pin", "traceparent", "api_keys", "saved_adapters"),
    *("trusted_keys", "signature", "manifest", "sealed_manifest", "tensors", "prompt"),
)
JSON_NAMES = ("classify", "feedback", "evaluate", "predict", "infer", "load", "alias", "api_keys")


def test_every_target_is_tried_here(targets: dict[str, Target]) -> None:
    assert tuple(targets) == TARGET_NAMES
    assert set(WEIGHTS) <= set(targets)


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_valid_documents_are_taken(targets: dict[str, Target], name: str) -> None:
    if name == "prompt":  # its seeds are hostile from the start
        assert targets[name].check(b"transfer to my account") == "taken"
        return
    for seed in targets[name].seeds:
        assert targets[name].check(seed) == "taken", seed


@pytest.mark.parametrize("name", TARGET_NAMES)
@QUICK
@given(data=st.data())
def test_spoilt_documents_are_taken_or_refused(
    targets: dict[str, Target], name: str, data: st.DataObject
) -> None:
    target = targets[name]
    document = data.draw(st.sampled_from(target.seeds))
    draw: Random = data.draw(st.randoms(use_true_random=False))
    assert target.check(target.mutate(document, draw)) in ("taken", "refused")


@pytest.mark.parametrize("name", JSON_NAMES)
@QUICK
@given(document=VALUES)
def test_any_json_is_taken_or_refused(targets: dict[str, Target], name: str, document: Any) -> None:

    body = json.dumps(document).encode()
    assert targets[name].check(body) in ("taken", "refused")


@pytest.mark.parametrize("name", TARGET_NAMES)
def test_the_programs_first_cases_are_taken_or_refused(
    targets: dict[str, Target], name: str
) -> None:
    found = {targets[name].check(targets[name].case(number, seed=1)) for number in range(100)}
    assert found <= {"taken", "refused"}
    assert "refused" in found


@pytest.mark.parametrize("path", kept_cases(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_once_got_through_is_refused_now(targets: dict[str, Target], path: Path) -> None:
    assert targets[path.parent.name].check(path.read_bytes()) in ("taken", "refused")


def test_the_corpus_is_small_and_belongs_to_targets(targets: dict[str, Target]) -> None:
    assert kept_cases(), f"{CORPUS} is empty"
    assert {path.parent.name for path in kept_cases()} <= set(targets)
    assert all(path.stat().st_size < 16_384 for path in kept_cases())
