"""Hostile bytes in other shapes of requests, in headers, and in what an operator hands over."""

import json
from functools import partial
from pathlib import Path

from pydantic import BaseModel

from dalorra_core.artifact.keys import TrustedKeys, make_key_pair
from dalorra_core.artifact.signing import sign_artifact, verify_signature
from dalorra_core.artifact.store import SIGNATURE_FILE, load_artifact, pack_tensors, save_artifact
from dalorra_core.errors import ArtifactError, ConfigError
from server.adapters.saved import SavedState, SavedStateError
from server.auth.keys import KeyFileError, parse_keys
from server.errors import ApiError
from server.routes import kserve, predict
from server.schemas import AliasRequest, LoadRequest, PinRequest
from server.schemas.examples import INFER_EXAMPLES, PREDICT_EXAMPLES
from server.schemas.kserve import InferRequest
from server.settings import Settings
from server.tracing import incoming_context, parse_traceparent
from tests.hostile.mutate import mutate_bytes, mutate_json
from tests.hostile.targets import Outcome, Target, check_document, check_refusal, dumped
from tests.support.tiny_manifest import tiny_manifest, tiny_params

__all__ = ["door_targets"]

_SETTINGS = Settings.model_validate({"feedback_url": "off"})
_LOADS = ({"source": "rev-a", "name": "topics", "pin": True, "activate": False}, {"source": "x"})
_ALIASES = (
    {"targets": [{"model": "topics:3f9a00112233", "weight": 0.5}, {"model": "other"}]},
    {"targets": [{"model": "topics"}], "shadow": {"model": "other", "share": 0.1}},
)
_INFERS = (
    *(example["value"] for example in INFER_EXAMPLES.values()),
    {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["a"]}]},
)
_PREDICTS = (
    *(example["value"] for example in PREDICT_EXAMPLES.values()),
    {"inputs": ["a", "b"], "truncate": True, "truncation_direction": "Left", "model": "topics"},
)
_KEYS = {
    "version": 1,
    "keys": [
        {
            "id": "caller-1",
            "sha256": "0" * 64,
            "scopes": ["infer", "feedback"],
            "rate_limit": "600/minute",
            "created": "2026-01-01T00:00:00Z",
            "expires": "2030-01-01T00:00:00Z",
        }
    ],
}
_SAVED = {
    "version": 1,
    "adapters": [
        {
            "name": "topics",
            "source": "rev-a",
            "revision": "3f9a00112233",
            "pinned": True,
            "current": True,
        }
    ],
    "aliases": [
        {
            "name": "topics@prod",
            "targets": [{"model": "topics:3f9a00112233", "weight": 1.0}],
            "shadow": {"model": "other", "weight": 0.5},
        }
    ],
}
_TRACEPARENTS = (
    b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    b"cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-more",
)


def door_targets(folder: Path) -> tuple[Target, ...]:
    """Return the targets of this file; ``folder`` is theirs to write in."""
    trust = _Trust(folder / "signed")
    saved = partial(_check_saved, folder / "adapters.json")
    return (
        Target("predict", dumped(_PREDICTS), mutate_json, _check_predict),
        Target("infer", dumped(_INFERS), mutate_json, _check_infer),
        _document("load", _LOADS, LoadRequest),
        _document("alias", _ALIASES, AliasRequest),
        _document("pin", ({"pinned": True},), PinRequest),
        Target("traceparent", _TRACEPARENTS, mutate_bytes, _check_traceparent),
        Target("api_keys", dumped((_KEYS,)), mutate_json, _check_api_keys),
        Target("saved_adapters", dumped((_SAVED,)), mutate_json, saved),
        Target("trusted_keys", (trust.public,), mutate_bytes, trust.keys),
        Target("signature", (trust.signature,), mutate_json, trust.signed),
    )


def _document(name: str, seeds: tuple[object, ...], schema: type[BaseModel]) -> Target:
    return Target(name, dumped(seeds), mutate_json, partial(check_document, schema))


def _check_predict(body: bytes) -> Outcome:
    try:
        request = predict._parse(body, _SETTINGS, asked=None)
    except ApiError as error:
        return check_refusal(error)
    assert 1 <= len(request.questions()) <= _SETTINGS.max_rows
    return "taken"


def _check_infer(body: bytes) -> Outcome:
    asked: list[InferRequest] = []
    try:
        request = kserve._parse(body, _SETTINGS, model="topics", asked=asked)
    except ApiError as error:
        return check_refusal(error)
    assert 1 <= len(request.questions()) <= _SETTINGS.max_rows
    return "taken"


def _check_traceparent(value: bytes) -> Outcome:
    found = incoming_context({"type": "http", "headers": [(b"traceparent", value)]})
    text = value.decode("latin-1").strip(" \t")
    assert found == parse_traceparent(text)
    if found is None:
        return "refused"
    assert found.trace_id == text.split("-")[1]
    assert int(found.trace_id, 16) > 0
    assert len(found.trace_id) == 32
    return "taken"


def _check_api_keys(content: bytes) -> Outcome:
    try:
        keys = parse_keys(content)
    except KeyFileError as error:
        assert len(str(error)) < 10_000, len(str(error))  # noqa: PT017 - not the point of a test
        return "refused"
    assert len({key.sha256 for key in keys}) == len(keys)
    assert all(key.scopes for key in keys)
    return "taken"


def _check_saved(path: Path, content: bytes) -> Outcome:
    path.write_bytes(content)
    try:
        state = SavedState.read(path)
    except SavedStateError:
        return "refused"
    assert state is not None
    for saved in state.aliases:
        alias = saved.alias()
        assert alias.pick("some request") in alias.models
        assert all(target.weight > 0 for target in alias.targets)
    state.write(path)
    assert SavedState.read(path) == state
    return "taken"


class _Trust:
    """A signed adapter whose signature file an attacker may write, and the keys to trust."""

    def __init__(self, directory: Path) -> None:
        private, self.public = make_key_pair()
        save_artifact(directory, tiny_manifest(), pack_tensors(tiny_params()))
        sign_artifact(directory, private)
        self._directory = directory
        self._digest = load_artifact(directory).manifest_sha256
        self._trusted = TrustedKeys.parse(self.public)
        self.signature = (directory / SIGNATURE_FILE).read_bytes()
        self._signed = {
            (one["key_id"], one["signed_at"], one["signature"], one["manifest_sha256"])
            for one in json.loads(self.signature)["signatures"]
        }

    def keys(self, content: bytes) -> Outcome:
        """Read trusted keys; what comes out is the one key that was put in."""
        try:
            found = TrustedKeys.parse(content)
        except ConfigError:
            return "refused"
        assert found.key_ids
        return "taken"

    def signed(self, content: bytes) -> Outcome:
        """Verify with a signature file: only one that has our signature in it is believed."""
        (self._directory / SIGNATURE_FILE).write_bytes(content)
        try:
            key_id = verify_signature(self._directory, self._digest, self._trusted)
        except ArtifactError:
            return "refused"
        assert key_id in self._trusted.key_ids
        believed = {
            (one["key_id"], one["signed_at"], one["signature"], one["manifest_sha256"])
            for one in json.loads(content)["signatures"]
        }
        assert believed & self._signed, "a forged signature was believed"
        return "taken"
