"""Names, revisions and aliases: what a request means, and that it never means another."""

from dataclasses import replace

import pytest

from server.adapters import AdapterRegistry, Alias, ShadowTarget, Slot, Target
from server.errors import ApiError
from tests.support.fake_engine import QUIZ, TOPICS

OLD = Slot(TOPICS)
NEW = Slot(replace(TOPICS, revision="aaaa00112233"))


@pytest.fixture
def registry() -> AdapterRegistry:
    filled = AdapterRegistry()
    filled.publish(OLD)
    filled.publish(NEW, activate=False)
    return filled


def test_a_bare_name_means_the_active_revision(registry: AdapterRegistry) -> None:
    assert registry.find("topics") is OLD
    assert registry.find(None) is OLD
    registry.publish(NEW)
    assert registry.find("topics") is NEW
    assert registry.find(OLD.id) is OLD


@pytest.mark.parametrize(
    "model", ["topic", "topics:", "topics:aaaa", "topics:AAAA00112233", "TOPICS", "", ":", "@"]
)
def test_no_other_spelling_means_an_adapter(registry: AdapterRegistry, model: str) -> None:
    with pytest.raises(ApiError) as caught:
        registry.find(model)
    assert caught.value.code == "model_not_found"


def test_an_unknown_revision_names_the_known_ones(registry: AdapterRegistry) -> None:
    with pytest.raises(ApiError) as caught:
        registry.find("topics:beef")
    assert caught.value.errors[0]["close_names"] == [OLD.id, NEW.id]


def test_an_unknown_name_names_adapters_and_aliases_that_look_like_it(
    registry: AdapterRegistry,
) -> None:
    registry.set_alias(Alias("topics@prod", (Target("topics"),)))
    with pytest.raises(ApiError) as caught:
        registry.resolve("topics@prd", "id")
    assert "topics@prod" in str(caught.value.errors[0]["close_names"])


def test_with_several_names_one_must_be_said(registry: AdapterRegistry) -> None:
    registry.publish(Slot(QUIZ))
    with pytest.raises(ApiError, match="model is required") as caught:
        registry.find(None)
    assert caught.value.status == 422


def test_without_adapters_nothing_is_found() -> None:
    with pytest.raises(ApiError, match="no adapter is loaded"):
        AdapterRegistry().find(None)


def test_a_retired_adapter_is_gone_and_its_bare_name_means_nothing(
    registry: AdapterRegistry,
) -> None:
    registry.retire(OLD)
    with pytest.raises(ApiError):
        registry.find("topics")
    assert registry.find(NEW.id) is NEW
    OLD.retired = False


def test_retiring_an_older_load_leaves_the_newer_of_the_same_revision(
    registry: AdapterRegistry,
) -> None:
    again = Slot(OLD.card)
    assert registry.publish(again) is OLD
    registry.retire(OLD)
    assert registry.find("topics") is again
    OLD.retired = False


def test_an_alias_answers_and_shadows(registry: AdapterRegistry) -> None:
    registry.set_alias(Alias("topics@prod", (Target(NEW.id),), ShadowTarget("topics", 1.0)))
    assert registry.resolve("topics@prod", "id") == (NEW, "topics")
    assert registry.resolve("topics", "id") == (OLD, None)
    assert registry.aliases_of(NEW) == ["topics@prod"]
    assert registry.aliases_of(OLD) == ["topics@prod"]  # the shadow means it by its bare name
    registry.remove_alias("topics@prod")
    with pytest.raises(ApiError) as caught:
        registry.alias("topics@prod")
    assert caught.value.code == "alias_not_found"


def test_the_active_revision_is_listed_first(registry: AdapterRegistry) -> None:
    assert registry.slots == (OLD, NEW)
    registry.publish(NEW)
    assert registry.slots == (NEW, OLD)
