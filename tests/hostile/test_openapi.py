"""The OpenAPI document against the server: every route, with and without keys, in a real process.

schemathesis makes requests from the document, valid ones and spoilt ones. No answer is a 500, every
status is documented, every body matches its schema, and every error is a problem document.
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from benchmarks.serving.process import ServerProcess, serving
from server.app import create_app
from server.auth.table import ALL_SCOPES, PUBLIC_PATHS, SCOPES
from server.settings import Settings
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.integration


KEYS = {scope: f"dk_{scope:-<43}" for scope in ALL_SCOPES} | {"every": f"dk_{'every':-<43}"}
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    unsupported_method,
]
DOCUMENT = create_app(FakeEngine, Settings.model_validate({"feedback_url": "off"})).openapi()
RESULTS: Any = schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()
OPERATIONS = [result.ok() for result in RESULTS]
BY_NAME = {f"{one.method.upper()} {one.path}": one for one in OPERATIONS}
EXAMPLES = settings(
    max_examples=12,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)


def write_keys(path: Path) -> Path:
    """Write one key for each scope and one for all of them."""
    keys = [
        {
            "id": name,
            "sha256": hashlib.sha256(key.encode()).hexdigest(),
            "scopes": list(ALL_SCOPES) if name == "every" else [name],
            "created": "2026-01-01T00:00:00Z",
        }
        for name, key in KEYS.items()
    ]
    path.write_text(json.dumps({"version": 1, "keys": keys}))
    path.chmod(0o600)
    return path


def served(folder: Path, *arguments: str) -> Any:
    for name in ("extra-a", "extra-b"):
        (folder / "root" / name).mkdir(parents=True)
    command = [sys.executable, "-m", "tests.support.serve_fake", "--certified"]
    command += ["--adapter-root", str(folder / "root"), "--state-dir", str(folder / "state")]
    return serving([*command, *arguments], folder / "log")


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with served(tmp_path_factory.mktemp("open")) as server:
        yield server


@pytest.fixture(scope="module")
def locked_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("locked")
    with served(folder, "--keys-file", str(write_keys(folder / "keys.json"))) as server:
        yield server


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as found:
        yield found


def check_problem(response: Any) -> None:
    """Every answer from 400 on is a problem document that says as much as the status does."""
    if response.status_code < 400:
        return
    assert response.headers["content-type"][0].startswith("application/problem+json")
    body = response.json()
    assert body["status"] == response.status_code
    assert body["code"]
    assert body["request_id"] == response.headers["x-request-id"][0]


def attack(name: str, server: ServerProcess, session: requests.Session, **headers: str) -> None:
    """Send requests to one operation, as the document has them and spoilt; check each answer."""

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

        @EXAMPLES
        @given(case=BY_NAME[name].as_strategy(generation_mode=mode))
        def tried(case: Any) -> None:
            response = case.call(
                base_url=f"http://127.0.0.1:{server.port}", session=session, headers=headers
            )
            # A case may ask for an answer within a millisecond, and is told that there was none.
            hurried = response.status_code == 504 and "X-Request-Timeout-Ms" in (case.headers or {})
            checks = [c for c in CHECKS if not (hurried and c is not_a_server_error)]
            case.validate_response(response, checks=checks, headers=headers)
            check_problem(response)

        try:
            tried()
        except Unsatisfiable:  # without a body and parameters there is nothing to spoil
            assert mode is GenerationMode.NEGATIVE


@pytest.mark.parametrize("name", BY_NAME)
def test_an_open_server_keeps_to_its_document(
    name: str, open_server: ServerProcess, session: requests.Session
) -> None:
    attack(name, open_server, session)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_server_with_keys_keeps_to_its_document_for_a_caller_with_a_key(
    name: str, locked_server: ServerProcess, session: requests.Session
) -> None:
    attack(name, locked_server, session, Authorization=f"Bearer {KEYS['every']}")


@pytest.mark.parametrize("name", BY_NAME)
def test_a_caller_without_a_key_gets_a_documented_401_and_nothing_else(
    name: str, locked_server: ServerProcess, session: requests.Session
) -> None:
    operation = BY_NAME[name]
    url = f"http://127.0.0.1:{locked_server.port}{operation.path.replace('{', '').replace('}', '')}"
    wrong = {"none": {}, "wrong": {"Authorization": "Bearer dk_" + "x" * 43}}
    for headers in wrong.values():
        response = session.request(operation.method.upper(), url, headers=headers, timeout=30)
        if operation.path in PUBLIC_PATHS:
            assert response.status_code == 200
        else:
            assert response.status_code == 401
            assert response.json()["code"] == "unauthorized"
            assert "401" in operation.definition.raw["responses"], f"{name} does not document 401"


@pytest.mark.parametrize("name", [name for name in BY_NAME if BY_NAME[name].path in SCOPES])
def test_a_key_of_another_scope_gets_a_documented_403(
    name: str, locked_server: ServerProcess, session: requests.Session
) -> None:
    operation = BY_NAME[name]
    url = f"http://127.0.0.1:{locked_server.port}{operation.path.replace('{', '').replace('}', '')}"
    for scope in set(ALL_SCOPES) - {SCOPES[operation.path]}:
        headers = {"Authorization": f"Bearer {KEYS[scope]}"}
        response = session.request(operation.method.upper(), url, headers=headers, timeout=30)
        assert response.status_code == 403
        assert response.json()["code"] == "forbidden"
        assert "403" in operation.definition.raw["responses"], f"{name} does not document 403"


def test_the_servers_still_answer_after_all_that(
    open_server: ServerProcess, locked_server: ServerProcess, session: requests.Session
) -> None:
    headers = {"Authorization": f"Bearer {KEYS['infer']}"}
    for server in (open_server, locked_server):
        url = f"http://127.0.0.1:{server.port}/v1/classify"
        body = {"model": "topics", "input": "a sure thing"}
        assert session.post(url, json=body, headers=headers, timeout=30).status_code == 200
