import re

import pytest

from server.auth.table import (
    PUBLIC_PATHS,
    SCOPES,
    is_public,
    needed_scopes,
    route_template,
)


def test_no_path_is_public_and_guarded() -> None:
    assert not PUBLIC_PATHS & SCOPES.keys()
    for path in PUBLIC_PATHS:
        assert is_public(path)
        assert needed_scopes(path) == frozenset()


@pytest.mark.parametrize("template", SCOPES)
def test_each_template_needs_its_one_scope(template: str) -> None:
    path = re.sub(r"\{\w+\}", "x.y-z", template)
    assert needed_scopes(path) == {SCOPES[template]}
    assert route_template(path) == (None if template == "/metrics" else template)
    assert not is_public(path)


def test_templates_of_different_scopes_part_before_their_first_parameter() -> None:
    # so that no path can fit two of them
    for one, scope in SCOPES.items():
        for other, other_scope in SCOPES.items():
            if scope == other_scope or "{" not in one + other:
                continue
            literal, other_literal = one.partition("{")[0], other.partition("{")[0]
            assert not literal.startswith(other_literal)
            assert not other_literal.startswith(literal)


@pytest.mark.parametrize(
    "path",
    [
        *("", "/", "//v1/classify", "/v1//classify", "/v1/classify/", "/V1/classify"),
        *("/v1/./classify", "/v1/x/../classify", "/v1/classify\n", "/metrics\n", "/metrics/"),
        *("/v1/adapters/", "/v1/adapters/a/b/c", "/v1/models/a/risk-coverage\n"),
        *("/health/live/", "/docs/", "/docs/oauth2-redirect", "/v1/models/{model_id}/"),
        *("http://host/v1/classify", "/v1/classify?x", "/v1/classify;x", "*", "/\x00/metrics"),
    ],
)
def test_another_spelling_is_on_no_list(path: str) -> None:
    assert not is_public(path)
    assert needed_scopes(path) == frozenset()
    assert route_template(path) == "unmatched"


def test_a_template_is_no_path_of_its_own() -> None:
    # the braces are the value of the parameter here
    assert route_template("/v1/models/{model_id}") == "/v1/models/{model_id}"
    assert needed_scopes("/v1/models/{model_id}/risk-coverage") == {"infer"}
