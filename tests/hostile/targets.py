"""What hostile bytes are given to, and what may come of it.

``Target.check`` returns ``taken`` or ``refused`` and raises for everything else: an exception that
the code under attack does not promise, or a value that is not sound.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Literal

from pydantic import BaseModel

from server.errors import ApiError, problem_response
from server.feedback import BadPredictionIdError, PredictionSigner
from server.parsing import parse_document, parse_request
from server.schemas import EvaluateRequest, FeedbackRequest
from server.schemas.examples import CLASSIFY_EXAMPLES
from server.settings import Settings
from tests.hostile.mutate import Mutator, mutate_bytes, mutate_json
from tests.support.feedback import make_claim

__all__ = [
    "Check",
    "Outcome",
    "Target",
    "check_document",
    "check_refusal",
    "dumped",
    "request_targets",
]

Outcome = Literal["taken", "refused"]
Check = Callable[[bytes], Outcome]


@dataclass(frozen=True)
class Target:
    """One door that takes bytes from outside.

    Attributes:
        name: Also the folder of its corpus.
        seeds: Valid documents to start from.
        mutate: Spoils one of them.
        check: Tries the result.
    """

    name: str
    seeds: Sequence[bytes]
    mutate: Mutator
    check: Check

    def case(self, number: int, seed: int) -> bytes:
        """Return the document of a case; equal numbers and seeds give equal bytes."""
        digest = hashlib.sha256(f"{self.name}|{seed}|{number}".encode()).digest()
        draw = Random(int.from_bytes(digest[:8], "big"))
        document = draw.choice(self.seeds)
        for _ in range(draw.choice((1, 1, 1, 1, 2))):
            document = self.mutate(document, draw)
        return document


def request_targets() -> tuple[Target, ...]:
    """Return what a client can reach."""
    return (
        Target("classify", dumped(_CLASSIFY), mutate_json, _check_classify),
        Target(
            "feedback", dumped(_FEEDBACK), mutate_json, partial(check_document, FeedbackRequest)
        ),
        Target(
            "evaluate", dumped(_EVALUATE), mutate_json, partial(check_document, EvaluateRequest)
        ),
        Target("prediction_id", (_ID.encode(),), mutate_bytes, _check_prediction_id),
    )


def dumped(documents: Sequence[object]) -> tuple[bytes, ...]:
    """Return documents as JSON."""
    return tuple(json.dumps(document, ensure_ascii=False).encode() for document in documents)


_CLASSIFY: Sequence[object] = (
    *(example["value"] for example in CLASSIFY_EXAMPLES.values()),
    {"input": "a text", "model": "topics:3f9a00112233", "top_k": 3, "truncate": "end"},
    {"input": ["a", "b"], "num_samples": 4, "seed": 7, "include": ["samples", "timings"]},
    {"input": [{"id": "1", "text": "a"}], "estimator": "mean_mask", "metadata": {"a": 1, "b": "c"}},
    {"input": {"question": "q", "choices": ["a", "b"], "context": "c"}, "policy": {"name": "x"}},
    {"input": {"question": "q", "choices": [{"label": c, "text": "t"} for c in "AB"]}},
    {"input": "a", "policy": {"max_risk": 0.05}},
    {"input": "a", "policy": {"min_confidence": 0.9, "abstain": {"min_label_mass": 0.1}}},
)
_FEEDBACK = (
    {"prediction_id": "p" * 250, "label": "billing", "source": "audit"},
    {"prediction_id": "p", "label": None},
)
_EVALUATE = (
    {"model": "topics", "policy": {"name": "default"}, "out_of_scope_share": 0.1, "delta": 0.1},
    {"model": "topics", "policy": {"min_confidence": 0.9}},
)
_SETTINGS = Settings.model_validate({"feedback_url": "off"})
_SIGNER = PredictionSigner(["k" * 40])
_CLAIM = make_claim(nonce="n" * 16)
_ID = _SIGNER.sign(_CLAIM)


def check_refusal(error: ApiError) -> Outcome:
    """Check that a refusal can be sent, is a client's fault and stays small.

    Raises:
        AssertionError: Otherwise.
    """
    assert 400 <= error.status < 500, error
    response = problem_response(error, instance="/", request_id="r", type_base="urn:x:")
    body = json.loads(bytes(response.body))
    assert body["status"] == error.status
    assert len(response.body) < 32_768, len(response.body)
    assert len(error.detail) < 4096, len(error.detail)
    return "refused"


def _check_classify(body: bytes) -> Outcome:
    try:
        request = parse_request(body, _SETTINGS)
    except ApiError as error:
        return check_refusal(error)
    questions = request.questions()
    assert 1 <= len(questions) == len(request.ids()) <= _SETTINGS.max_rows
    assert all(request.pointer(place).startswith("#/input") for place in range(len(questions)))
    request.model_dump_json()  # lone surrogates would not survive it
    return "taken"


def check_document(schema: type[BaseModel], body: bytes) -> Outcome:
    """Parse a body as a document of a schema; see ``check_refusal``."""
    try:
        parse_document(body, schema).model_dump_json()
    except ApiError as error:
        return check_refusal(error)
    return "taken"


def _check_prediction_id(text: bytes) -> Outcome:
    try:
        found = _SIGNER.verify(text.decode("utf-8", "surrogatepass"))
    except (BadPredictionIdError, UnicodeDecodeError):
        return "refused"
    assert found.digest == _CLAIM.digest, "a forged id was taken"
    return "taken"
