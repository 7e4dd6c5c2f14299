"""Aliases: which target answers, and how often."""

import math
from collections import Counter

from server.adapters import Alias, ShadowTarget, Target

N = 4000


def ids(count: int = N) -> list[str]:
    return [f"request-{n}" for n in range(count)]


def test_targets_answer_by_their_weights() -> None:
    alias = Alias("triage@prod", (Target("a:1", 3.0), Target("b:2", 1.0)))
    counts = Counter(alias.pick(request_id) for request_id in ids())
    bound = 5 * math.sqrt(N * 0.75 * 0.25)  # five standard errors
    assert abs(counts["a:1"] - 0.75 * N) < bound
    assert counts["a:1"] + counts["b:2"] == N


def test_the_same_request_id_has_the_same_target() -> None:
    alias = Alias("triage@prod", (Target("a:1"), Target("b:2")))
    assert [alias.pick(i) for i in ids(50)] == [alias.pick(i) for i in ids(50)]


def test_a_growing_canary_keeps_those_it_had() -> None:
    """Whoever is on the canary at 10 % stays on it at 30 %: nobody flips back and forth."""
    small = Alias("triage@prod", (Target("new:2", 1.0), Target("old:1", 9.0)))
    large = Alias("triage@prod", (Target("new:2", 3.0), Target("old:1", 7.0)))
    first = {i for i in ids() if small.pick(i) == "new:2"}
    assert first
    assert all(large.pick(i) == "new:2" for i in first)


def test_a_shadow_gets_its_share_whichever_target_answers() -> None:
    shadow = ShadowTarget("c:3", 0.2)
    alias = Alias("triage@prod", (Target("a:1"), Target("b:2")), shadow)
    shadowed = [i for i in ids() if alias.shadowed_by(i) == "c:3"]
    assert abs(len(shadowed) - 0.2 * N) < 5 * math.sqrt(N * 0.2 * 0.8)
    on_a = sum(alias.pick(i) == "a:1" for i in shadowed)
    # drawn apart from the target, else a shadow would only ever see one of them
    assert abs(on_a - len(shadowed) / 2) < 5 * math.sqrt(len(shadowed) / 4)


def test_without_a_shadow_nobody_answers_besides() -> None:
    alias = Alias("triage@prod", (Target("a:1"),))
    assert alias.shadowed_by("any") is None
    assert alias.models == ("a:1",)


def test_a_full_share_shadows_every_request() -> None:
    alias = Alias("triage@prod", (Target("a:1"),), ShadowTarget("b:2", 1.0))
    assert all(alias.shadowed_by(i) == "b:2" for i in ids(200))
    assert alias.models == ("a:1", "b:2")


def test_a_weight_of_almost_nothing_still_leaves_an_answer_to_every_id() -> None:
    alias = Alias("triage@prod", (Target("a:1", 1e-300), Target("b:2", 5e-324)))
    assert {alias.pick(i) for i in ids(100)} <= {"a:1", "b:2"}
