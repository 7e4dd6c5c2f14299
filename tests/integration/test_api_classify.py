"""What a good request gets."""

import asyncio
import math
from dataclasses import replace
from typing import Any

import pytest

from tests.support.api import Api, async_test, running, same_answer, until
from tests.support.fake_engine import (
    QUIZ,
    TOPICS,
    TOPICS_ENSEMBLE,
    TOPICS_POINT,
    FakeEngine,
)

REVISION = {"adapter": "topics", "revision": "3f9a00112233"}
QUESTION = {"question": "which is a mammal", "choices": ["trout", "whale", "lizard"]}


@async_test
async def test_the_whole_answer_to_one_text() -> None:
    async with running() as api:
        response = await api.classify({"input": "a sure thing"})
        assert response.status_code == 200
        body = response.json()
        assert body.keys() == {
            *("id", "object", "created", "model", "data", "policy", "prediction_sets"),
            *("sampling", "usage"),
        }
        assert body["id"].startswith("classify-")
        assert (body["object"], body["model"]) == ("list", "topics:3f9a00112233")
        assert body["sampling"] == {
            "num_samples": 4,
            "seed": 0,
            "mask_set": "ms_4_0",
            "estimator": "monte_carlo",
            "design": "iid",
        }
        assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
        assert body["policy"] == {
            "name": "default",
            "thresholds": {
                "accept": [{"score": "confidence", "threshold": 0.8, "passes": "at_least"}],
                "abstain": [{"score": "predictive_entropy", "threshold": 1.0, "passes": "at_most"}],
                "by_label": None,
            },
            "target_selective_risk": 0.05,
            "chosen_on": {
                "split": "validation",
                "n": 3000,
                "n_out_of_scope": 100,
                "num_samples": 4,
            },
            "guarantee": None,
            "abstain_guarantee": None,
            "void": None,
            "combined_with": None,
        }
        assert body["prediction_sets"] is None
        (row,) = body["data"]
        assert row.keys() == {
            *("index", "id", "prediction_id", "label", "labels", "probs", "num_classes"),
            *("confidence", "label_mass", "combined_score", "uncertainty", "prediction_set"),
            *("decision", "reasons", "calibrated", "truncated"),
        }
        assert (row["combined_score"], row["prediction_set"]) == (None, None)
        assert (row["index"], row["id"], row["num_classes"]) == (0, None, 3)
        assert row["labels"] == ["billing", "fraud", "other"]
        assert sum(row["probs"]) == pytest.approx(1)
        assert row["confidence"] == max(row["probs"])
        assert row["label"] == row["labels"][row["probs"].index(row["confidence"])]
        assert row["label_mass"] == 0.9
        assert (row["decision"], row["reasons"]) == ("accept", [])
        assert (row["calibrated"], row["truncated"]) == (True, False)
        unsure = row["uncertainty"]
        assert unsure["unit"] == "nats"
        assert unsure["normalized_entropy"] == pytest.approx(
            unsure["predictive_entropy"] / math.log(3)
        )
        assert unsure["mutual_information"] == pytest.approx(
            unsure["predictive_entropy"] - unsure["expected_entropy"]
        )
        api.check_idle()


@async_test
async def test_headers_of_an_answer() -> None:
    async with running() as api:
        response = await api.classify({"input": ["one two", "three"]}, X_Request_Id="abc-1._Z")
        assert response.headers["x-request-id"] == "abc-1._Z"
        assert response.headers["x-model-revision"] == "3f9a00112233"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["content-type"] == "application/json"
        assert response.headers["x-compute-tokens"] == str((4 + 3) * 4)
        stages = [part.split(";dur=") for part in response.headers["server-timing"].split(", ")]
        assert [name for name, _ in stages] == ["queue", "tokenize", "forward", "uq"]
        assert all(float(duration) >= 0 for _, duration in stages)


@pytest.mark.parametrize("bad", ["", "a" * 129, "a b", "a\tb", "ü"])
@async_test
async def test_an_invalid_request_id_is_replaced(bad: str) -> None:
    async with running() as api:
        response = await api.client.get("/version", headers={b"x-request-id": bad.encode()})
        assert response.status_code == 200
        assert len(response.headers["x-request-id"]) == 32


@async_test
async def test_the_alias_gives_the_same_answer() -> None:
    async with running() as api:
        first = await api.classify({"input": "hello"})
        second = await api.client.post("/classify", json={"input": "hello"})
        assert same_answer(first) == same_answer(second)


@async_test
async def test_every_decision_is_a_200() -> None:
    async with running() as api:
        body = (await api.classify({"input": ["a sure thing", "unclear", "lost words"]})).json()
        decisions = [(row["decision"], row["reasons"]) for row in body["data"]]
        assert decisions == [
            ("accept", []),
            ("review", ["low_confidence"]),
            ("abstain", ["high_entropy"]),
        ]


@async_test
async def test_lists_keep_their_order_and_ids() -> None:
    async with running() as api:
        texts = ["three words here", "one", "two words"]
        items = [{"id": f"t{n}", "text": text} for n, text in enumerate(texts)]
        items.append({"text": "no id"})
        alone = [(await api.classify({"input": t})).json()["data"][0]["probs"] for t in texts]
        body = (await api.classify({"input": items})).json()
        assert [row["id"] for row in body["data"]] == ["t0", "t1", "t2", None]
        assert [row["index"] for row in body["data"]] == [0, 1, 2, 3]
        assert [row["probs"] for row in body["data"][:3]] == alone


@async_test
async def test_top_k_adds_and_takes_nothing_away() -> None:
    async with running() as api:
        (row,) = (await api.classify({"input": "x", "top_k": 2})).json()["data"]
        ranked = sorted(zip(row["probs"], row["labels"], strict=True), reverse=True)
        assert [(best["prob"], best["label"]) for best in row["top"]] == ranked[:2]
        assert len(row["probs"]) == 3
        (row,) = (await api.classify({"input": "x", "top_k": 99})).json()["data"]
        assert len(row["top"]) == 3


@async_test
async def test_samples_and_timings_on_request() -> None:
    async with running() as api:
        asked = {"input": "x", "include": ["samples", "timings"], "num_samples": 3}
        body = (await api.classify(asked)).json()
        (row,) = body["data"]
        means = [sum(column) / 3 for column in zip(*row["samples"], strict=True)]
        assert means == pytest.approx(row["probs"])
        assert body["timings"].keys() == {"queue_s", "tokenize_s", "forward_s", "uq_s"}
        assert body["timings"]["forward_s"] == 0.002


@async_test
async def test_metadata_comes_back() -> None:
    async with running() as api:
        sent = {"tenant": "acme", "try": 2, "share": 0.5, "retry": True, "note": None}
        body = (await api.classify({"input": "x", "metadata": sent})).json()
        assert body["metadata"] == sent


@async_test
async def test_an_answer_does_not_depend_on_what_shares_its_batch() -> None:
    async with running() as api:
        alone = same_answer(await api.classify({"input": "same text"}))[0]
        api.engine.gate.clear()
        blocker = asyncio.create_task(api.classify({"input": "blocker"}))
        await until(api.engine.entered.is_set)
        bodies = [{"input": "same text"}, {"input": ["y", "z"]}, {"input": "same text"}]
        tasks = [asyncio.create_task(api.classify(body)) for body in bodies]
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 4)
        api.engine.gate.set()
        answers = [same_answer(await task) for task in tasks]
        await blocker
        assert api.engine.batches[-1] == ["same text", "y", "z", "same text"]
        assert answers[0][0] == answers[2][0] == alone


@async_test
async def test_requests_share_a_batch_whatever_their_seed_but_not_with_other_samples() -> None:
    async with running() as api:
        api.engine.gate.clear()
        blocker = asyncio.create_task(api.classify({"input": "blocker"}))
        await until(api.engine.entered.is_set)
        bodies: list[dict[str, Any]] = [
            {"input": "a"},
            {"input": "b", "num_samples": 2},
            {"input": "c", "seed": 1},
        ]
        tasks = [asyncio.create_task(api.classify(body)) for body in bodies]
        await until(lambda: api.service.lifecycle.batcher.num_waiting == 3)
        api.engine.gate.set()
        await asyncio.gather(blocker, *tasks)
        assert api.engine.batches[1:] == [["a", "c"], ["b"]]


@pytest.mark.parametrize(
    ("override", "mask_set"),
    [
        ({"num_samples": 8}, "ms_8_0"),
        ({"seed": 3}, "ms_4_3"),
        ({"estimator": "mean_mask"}, None),
        ({"design": "stratified"}, "ms_4_0_stratified"),
    ],
)
@async_test
async def test_an_override_is_not_calibrated_and_not_in_the_drift_metrics(
    override: dict[str, Any], mask_set: str | None
) -> None:
    async with running() as api:
        body = (await api.classify({"input": "a sure thing", **override})).json()
        assert not body["data"][0]["calibrated"]
        assert body["sampling"]["mask_set"] == mask_set
        scores = ("confidence", "entropy", "mutual_information", "label_mass")
        counts = [await api.metric(f"{name}_ratio_count", **REVISION) for name in scores]
        assert counts == [0, 0, 0, 0]
        assert await api.metric("posterior_samples_count", adapter="topics") == 1
        await api.classify({"input": "a sure thing"})
        counts = [await api.metric(f"{name}_ratio_count", **REVISION) for name in scores]
        assert counts == [1, 1, 1, 1]


@async_test
async def test_the_defaults_said_aloud_are_no_override() -> None:
    async with running() as api:
        asked = {"input": "x", "num_samples": 4, "seed": 0, "estimator": "monte_carlo"}
        asked |= {"design": "iid"}
        body = (await api.classify(asked)).json()
        assert body["data"][0]["calibrated"]
        assert await api.metric("confidence_ratio_count", **REVISION) == 1


@async_test
async def test_a_design_is_sampled_shown_and_may_be_the_adapters_own() -> None:
    own = replace(TOPICS, defaults=replace(TOPICS.defaults, design="stratified"))
    async with running(FakeEngine(own)) as api:
        default = (await api.classify({"input": "a sure thing"})).json()
        assert default["sampling"]["design"] == "stratified"
        assert default["data"][0]["calibrated"]
        other = (await api.classify({"input": "x", "design": "antithetic"})).json()
        assert other["sampling"]["design"] == "antithetic"
        assert not other["data"][0]["calibrated"]
        one_pass = {"input": "x", "estimator": "mean_mask"}
        assert (await api.classify({**one_pass, "design": "stratified"})).status_code == 200
        card = (await api.client.get("/v1/models/topics")).json()
        assert card["sampling"]["design"] == "stratified"


@async_test
async def test_mean_mask_has_no_epistemic_scores() -> None:
    async with running() as api:
        body = (await api.classify({"input": "x", "estimator": "mean_mask"})).json()
        unsure = body["data"][0]["uncertainty"]
        for name in ("mutual_information", "expected_entropy", "confidence_std"):
            assert unsure[name] is None
        assert unsure["predictive_entropy"] > 0
        assert body["sampling"] == {
            "num_samples": 1,
            "seed": None,
            "mask_set": None,
            "estimator": "mean_mask",
            "design": "iid",
        }


@async_test
async def test_a_point_method_has_no_epistemic_scores() -> None:
    async with running(FakeEngine(TOPICS_POINT)) as api:
        body = (await api.classify({"input": "a sure thing"})).json()
        assert body["data"][0]["uncertainty"]["mutual_information"] is None
        assert body["data"][0]["calibrated"]
        assert body["data"][0]["decision"] == "accept"
        assert (body["sampling"]["num_samples"], body["sampling"]["seed"]) == (1, None)


@async_test
async def test_an_ensemble_answers_with_all_of_its_members() -> None:
    async with running(FakeEngine(TOPICS_ENSEMBLE)) as api:
        bodies = [{}, {"num_samples": 3}, {"seed": 9}]
        answers = [(await api.classify({"input": "x", **body})).json() for body in bodies]
        for body in answers:
            assert body["sampling"] == {
                "num_samples": 3,
                "seed": None,
                "mask_set": "ms_3_0",
                "estimator": "monte_carlo",
                "design": "iid",
            }
            assert body["data"][0]["calibrated"]
            assert body["data"][0]["uncertainty"]["mutual_information"] > 0
        assert len({tuple(body["data"][0]["probs"]) for body in answers}) == 1
        card = (await api.client.get("/v1/models/topics-ensemble")).json()
        assert (card["sampling"]["num_samples"], card["limits"]["max_num_samples"]) == (3, 3)
        assert card["sampling"]["seed"] is None


@async_test
async def test_choices_given_as_strings_get_letters() -> None:
    async with running(FakeEngine(QUIZ)) as api:
        body = (await api.classify({"input": QUESTION})).json()
        (row,) = body["data"]
        assert row["labels"] == ["A", "B", "C"]
        assert (len(row["probs"]), row["num_classes"]) == (3, 3)
        assert (row["decision"], row["reasons"]) == ("review", ["adapter_uncalibrated"])
        assert not row["calibrated"]
        assert body["policy"] is None


@async_test
async def test_choices_keep_the_order_of_the_question() -> None:
    async with running(FakeEngine(QUIZ)) as api:
        choices = [{"label": "C", "text": "trout"}, {"label": "A", "text": "whale"}]
        asked = {"id": "q7", "question": "which", "context": "a passage", "choices": choices}
        (row,) = (await api.classify({"input": [asked]})).json()["data"]
        assert (row["id"], row["labels"]) == ("q7", ["C", "A"])


@async_test
async def test_truncation_is_visible_and_never_accepted() -> None:
    async with running() as api:
        long = "sure " * 100
        for side in ("start", "end"):
            body = (await api.classify({"input": [long, "a sure thing"], "truncate": side})).json()
            cut, whole = body["data"]
            assert (cut["truncated"], cut["decision"]) == (True, "review")
            assert "truncated" in cut["reasons"]
            assert (whole["truncated"], whole["decision"]) == (False, "accept")


@async_test
async def test_one_of_several_adapters_is_chosen_by_name_or_revision() -> None:
    async with running(FakeEngine(TOPICS, QUIZ)) as api:
        for model in ("topics", "topics:3f9a00112233"):
            response = await api.classify({"input": "x", "model": model})
            assert response.json()["model"] == "topics:3f9a00112233"
        assert (await api.classify({"input": QUESTION, "model": "quiz"})).status_code == 200


@async_test
async def test_a_policy_is_chosen_by_name() -> None:
    async with running() as api:
        body = (await api.classify({"input": "x", "policy": {"name": "default"}})).json()
        assert body["policy"]["name"] == "default"


@async_test
async def test_predictions_are_counted() -> None:
    async with running() as api:
        texts = ["a sure thing", "lost words"]
        rows = (await api.classify({"input": texts})).json()["data"]
        for row in rows:
            labels = {"label": row["label"], "decision": row["decision"]}
            assert await api.metric("predictions_total", **REVISION, **labels) == 1
        reason = "high_entropy"
        assert await api.metric("decision_reasons_total", **REVISION, reason=reason) == 1
        total = sum(row["confidence"] for row in rows)
        assert await api.metric("confidence_ratio_sum", **REVISION) == pytest.approx(total)
        information = sum(row["uncertainty"]["mutual_information"] for row in rows)
        assert await api.metric("mutual_information_ratio_sum", **REVISION) == pytest.approx(
            information / math.log(3)
        )
        assert await api.metric("input_tokens_sum", adapter="topics") == 5 + 4
        served = {"method": "POST", "route": "/v1/classify", "status": "200"}
        assert await api.metric("http_requests_total", **served) == 1
        assert await api.metric("stage_duration_seconds_count", stage="serialize") == 1


def test_api_support_counts_an_idle_server_as_idle() -> None:
    @async_test
    async def check() -> None:
        async with running() as api:
            assert isinstance(api, Api)
            await api.check_healthy()

    check()


@async_test
async def test_a_lone_request_does_not_wait_for_company() -> None:
    async with running(batch_wait_ms=1000) as api:
        assert (await api.classify({"input": ["a", "b"]})).status_code == 200
        registry = api.service.telemetry.registry  # counted just after the answer
        name, why = "dalorra_batch_released_total", {"reason": "alone"}
        await until(lambda: registry.get_sample_value(name, why) == 1)
