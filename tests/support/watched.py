"""A server worth watching: the real app on a real socket, a calibrated fake adapter, traffic.

The traffic has every decision, wrong and right answers with feedback, a failed batch, a refused
request, and rows of different lengths, so that no metric of the server stays without a value.
"""

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import uvicorn

from server.app import create_app
from server.ports import AdapterCard, ReferenceProfile, RowScores, ScoreReference
from server.settings import Settings
from server.telemetry.edges import DRIFT_EDGES
from tests.support.fake_engine import TOPICS_CERTIFIED, FakeEngine, score

__all__ = ["WATCHED", "Traffic", "watched_server"]

KINDS = {
    "sure": "a sure thing about money",
    "unclear": "hm",
    "lost": "lost in many more words here",
}
IN_SCOPE = {"sure": 80, "unclear": 15, "lost": 5}
NUM_ROWS = 600


def _text(draw: random.Random, mix: dict[str, int]) -> str:
    (kind,) = draw.choices(list(mix), list(mix.values()))
    return f"{KINDS[kind]} {draw.randrange(10**6)}"


def _values(rows: list[RowScores]) -> dict[str, list[float]]:
    """Return the scores that drift is measured on, in the unit of their histograms."""
    per_nat = [row.normalized_entropy / row.predictive_entropy for row in rows]
    information = [row.mutual_information or 0.0 for row in rows]
    return {
        "confidence": [row.confidence for row in rows],
        "predictive_entropy": [row.normalized_entropy for row in rows],
        "mutual_information": [a * b for a, b in zip(information, per_nat, strict=True)],
        "label_mass": [row.label_mass or 0.0 for row in rows],
    }


def _reference(card: AdapterCard) -> ReferenceProfile:
    """Return the profile of in-scope traffic, on the server's own edges."""
    draw = random.Random(1)
    texts = [_text(draw, IN_SCOPE) for _ in range(NUM_ROWS)]
    rows = [score(text, card.labels, card.defaults, card) for text in texts]
    values = _values(rows)
    confidence = sorted(values["confidence"])
    edges = tuple(confidence[NUM_ROWS * tenth // 10] for tenth in range(1, 10))
    return ReferenceProfile(
        n=NUM_ROWS,
        scores={
            name: ScoreReference(ends, tuple(_share(values[name], end) for end in ends))
            for name, ends in DRIFT_EDGES.items()
        },
        confidence_bin_edges=edges,
        confidence_bin_shares=(0.1,) * 10,
        labels={label: sum(row.label == label for row in rows) / NUM_ROWS for label in card.labels},
        decisions={"accept": 0.8, "review": 0.15, "abstain": 0.05},
    )


def _share(values: list[float], end: float) -> float:
    return sum(value <= end for value in values) / len(values)


def _watched() -> AdapterCard:
    calibration = TOPICS_CERTIFIED.calibration
    assert calibration is not None
    reference = _reference(TOPICS_CERTIFIED)
    return replace(TOPICS_CERTIFIED, calibration=replace(calibration, reference=reference))


WATCHED = _watched()


@contextlib.contextmanager
def watched_server(folder: Path) -> Iterator[str]:
    """Serve ``WATCHED`` from a thread and yield its address, without a slash at the end."""
    engine = FakeEngine(WATCHED)
    engine.fault = _fail_on_boom
    settings = Settings(port=0, state_dir=folder, max_rows=16)
    config = uvicorn.Config(
        create_app(lambda: engine, settings), port=0, log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server does not start"
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        _wait_ready(url)
        yield url
    finally:
        server.should_exit = True
        thread.join(20)


def _fail_on_boom(texts: list[str]) -> None:
    if any("boom" in text for text in texts):
        raise ValueError("boom")


def _wait_ready(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        while client.get("/health/ready").status_code != 200:
            time.sleep(0.02)


class Traffic:
    """Asks, and says how right the answers were.

    Args:
        url: Of the server.
        seed: Of the texts.
    """

    def __init__(self, url: str, seed: int = 0) -> None:
        self._client = httpx.Client(base_url=url, timeout=20)
        self._draw = random.Random(seed)

    def send(self, mix: dict[str, int] = IN_SCOPE, num_requests: int = 1) -> None:
        """Ask some questions of a mix and give feedback on each answer."""
        for _ in range(num_requests):
            texts = [_text(self._draw, mix) for _ in range(self._draw.randint(1, 12))]
            answer = self._client.post("/v1/classify", json={"input": texts})
            assert answer.status_code == 200, answer.text
            for row in answer.json()["data"]:
                self._give_feedback(row)

    def send_troubles(self) -> None:
        """Send one request that fails, one that is refused and a label that nobody asked for."""
        assert self._client.post("/v1/classify", json={"input": "boom"}).status_code == 500
        too_many = {"input": ["one too many"] * 17}
        assert self._client.post("/v1/classify", json=too_many).status_code == 413
        forged = {"prediction_id": "forged", "label": "other"}
        assert self._client.post("/v1/feedback", json=forged).status_code == 404

    def metrics(self) -> str:
        """Return what Prometheus would read."""
        return self._client.get("/metrics").text

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def _give_feedback(self, row: dict) -> None:
        right = self._draw.random() < row["confidence"]
        others = [label for label in row["labels"] if label != row["label"]]
        label = row["label"] if right else self._draw.choice(others)
        body = {"prediction_id": row["prediction_id"], "label": label}
        answer = self._client.post("/v1/feedback", json=body)
        assert answer.status_code == 202, answer.text
