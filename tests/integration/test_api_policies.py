"""Policies over the API: forms, receipts, locks, and what-if questions."""

import asyncio
import json
import threading
from dataclasses import asdict, replace
from typing import Any

import pytest

from server.ports import AdapterCard, Limit, PlanCard, PolicyEvaluation
from server.schemas.examples import EVALUATE_EXAMPLES
from tests.integration.test_api_bad_input import JSON, check_problem
from tests.support.api import Api, async_test, running
from tests.support.fake_engine import (
    CALIBRATION,
    GUARANTEE,
    POLICY,
    QUIZ,
    TOPICS,
    TOPICS_CERTIFIED,
    TOPICS_POINT,
    FakeEngine,
)

SURE, UNCLEAR, LOST = "a sure thing", "unclear", "lost words"
TEXTS = [SURE, UNCLEAR, LOST]
OVERRIDES = [
    {"num_samples": 8},
    {"seed": 3},
    {"estimator": "mean_mask"},
    {"design": "stratified"},
]
RISK_5 = TOPICS_CERTIFIED.policies[0]


def certified(**changes: Any) -> FakeEngine:
    return FakeEngine(replace(TOPICS_CERTIFIED, **changes))


async def decided(api: Api, policy: Any = None, **fields: Any) -> tuple[dict[str, Any], list[str]]:
    """Classify the three texts; return the answer and the decisions."""
    asked = {"input": TEXTS, **fields} | ({"policy": policy} if policy else {})
    response = await api.classify(asked)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body, [row["decision"] for row in body["data"]]


# -- receipts -----------------------------------------------------------------------------------


@async_test
async def test_a_certified_policy_comes_with_its_receipt() -> None:
    async with running(certified()) as api:
        body, decisions = await decided(api)
        assert decisions == ["accept", "review", "abstain"]
        receipt = body["policy"]
        assert (receipt["name"], receipt["void"], receipt["combined_with"]) == (
            "risk_0.05",
            None,
            None,
        )
        assert receipt["guarantee"] == asdict(GUARANTEE)
        assert receipt["abstain_guarantee"] == {"max_in_scope_share": 0.02, "delta": 0.1, "n": 1400}
        assert body["prediction_sets"] == {
            "kind": "aps",
            "alpha": 0.1,
            "n": 1400,
            "empirical_coverage": 0.912,
            "mean_size": 1.7,
        }
        for row in body["data"]:
            assert row["calibrated"]
            assert row["prediction_set"][0] == row["label"]
            assert 0 < row["combined_score"] <= row["confidence"]
        assert body["data"][0]["prediction_set"] == [body["data"][0]["label"]]
        assert len(body["data"][2]["prediction_set"]) > 1


@async_test
async def test_the_id_of_an_answer_says_what_was_promised() -> None:
    async with running(certified()) as api:
        body, _ = await decided(api)
        row = body["data"][0]
        claim = api.service.signer.verify(row["prediction_id"])
        assert (claim.adapter, claim.revision) == ("topics", "3f9a00112233")
        assert (claim.label, claim.decision) == (row["label"], "accept")
        assert claim.confidence == pytest.approx(row["confidence"], abs=1e-9)
        assert (claim.policy, claim.target_risk) == ("risk_0.05", 0.05)
        assert (claim.num_samples, claim.seed, claim.estimator) == (4, 0, "monte_carlo")
        assert claim.default_sampling
        assert claim.issued_at == pytest.approx(body["created"], abs=5)
        ids = {row["prediction_id"] for row in body["data"]}
        again, _ = await decided(api)
        assert len(ids | {row["prediction_id"] for row in again["data"]}) == 6
        other, _ = await decided(api, {"min_confidence": 0.5}, seed=7)
        claim = api.service.signer.verify(other["data"][0]["prediction_id"])
        assert (claim.policy, claim.target_risk, claim.seed) == ("inline", None, 7)
        assert not claim.default_sampling


@pytest.mark.parametrize("override", OVERRIDES)
@async_test
async def test_another_sampling_has_no_promises(override: dict[str, Any]) -> None:
    async with running(certified()) as api:
        body, decisions = await decided(api, **override)
        assert decisions == ["accept", "review", "abstain"]
        receipt = body["policy"]
        assert (receipt["guarantee"], receipt["abstain_guarantee"]) == (None, None)
        (name,) = override
        assert f"changes the sampling: {name} {override[name]} instead of" in receipt["void"]
        assert body["prediction_sets"] is None
        for row in body["data"]:
            assert not row["calibrated"]
            assert row["prediction_set"] is None
            claim = api.service.signer.verify(row["prediction_id"])
            assert (claim.target_risk, claim.default_sampling) == (None, False)


@pytest.mark.parametrize(
    "asked",
    [
        {"num_samples": "auto"},
        {"num_samples": "auto", "design": "iid", "seed": 0},
        {"num_samples": 4, "design": "iid", "seed": 0, "estimator": "monte_carlo"},
    ],
)
@async_test
async def test_the_adapters_own_sampling_keeps_its_promises_when_it_is_asked_for(
    asked: dict[str, Any],
) -> None:
    async with running(certified()) as api:
        body, _ = await decided(api, **asked)
        left_out, _ = await decided(api)
        assert body["sampling"] == left_out["sampling"]
        assert body["sampling"]["num_samples"] == 4
        assert body["policy"] == left_out["policy"]
        assert body["policy"]["guarantee"] is not None
        assert all(row["calibrated"] for row in body["data"])


@async_test
async def test_the_card_shows_the_plan_with_its_evidence() -> None:
    plan = PlanCard(
        date="2026-11-30T00:00:00+00:00",
        estimator="monte_carlo",
        num_samples=4,
        design="stratified",
        peer_num_samples=10,
        mean_error=1e-4,
        peer_mean_error=2e-4,
        information_error=3e-5,
        peer_information_error=4e-5,
        n=64,
        reference=512,
    )
    calibration = replace(CALIBRATION, plan=plan)
    async with running(certified(calibration=calibration)) as api:
        card = (await api.client.get("/v1/models/topics")).json()
        assert card["calibration"]["plan"] == asdict(plan)
    async with running(certified()) as api:
        assert (await api.client.get("/v1/models/topics")).json()["calibration"]["plan"] is None


@async_test
async def test_a_policy_without_promises_has_none_to_lose() -> None:
    async with running() as api:
        body, _ = await decided(api, seed=3)
        assert (body["policy"]["guarantee"], body["policy"]["void"]) == (None, None)


@async_test
async def test_a_void_certificate_says_why_and_the_limits_stay() -> None:
    why = "measured with dtype float32 (here: bfloat16)"
    void = replace(RISK_5, guarantee=None, abstain_guarantee=None, void=why)
    engine = certified(policies=(void,), calibration=replace(CALIBRATION, void=why))
    async with running(engine) as api:
        body, decisions = await decided(api)
        assert decisions == ["accept", "review", "abstain"]
        assert (body["policy"]["guarantee"], body["policy"]["void"]) == (None, why)
        assert body["prediction_sets"] is None
        assert {row["prediction_set"] for row in body["data"]} == {None}
        assert {row["calibrated"] for row in body["data"]} == {False}
        problem = check_problem(
            await api.classify({"input": "x", "policy": {"max_risk": 0.05}}), 422, "not_certified"
        )
        assert f"stored certificates do not hold here: {why}" in problem["detail"]
        card = (await api.client.get("/v1/models/topics")).json()
        assert card["calibration"]["void"] == card["policies"][0]["void"] == why
        curve = (await api.client.get("/v1/models/topics/risk-coverage")).json()
        assert curve["void"] == why


@async_test
async def test_thresholds_by_label_are_summed_up_in_the_answer_and_complete_in_the_card() -> None:
    async with running(certified()) as api:
        texts = [f"a sure thing {n}" for n in range(4)]
        body, _ = await decided(api, {"name": "risk_0.05_per_label"}, input=texts)
        assert body["policy"]["thresholds"]["by_label"] == {
            "num_labels": 2,
            "num_never_accepted": 1,
            "lowest": 0.9,
            "highest": 0.9,
        }
        assert body["policy"]["guarantee"]["per_label"]
        by_label = {"billing": 0.9, "fraud": None}
        found = {row["label"]: (row["decision"], row["reasons"]) for row in body["data"]}
        assert found == {
            "billing": ("accept", []),
            "fraud": ("review", ["no_certified_threshold"]),
        }
        card = (await api.client.get("/v1/models/topics")).json()
        assert [policy["accept_by_label"] for policy in card["policies"]] == [
            *(None, None, by_label, None)
        ]


@async_test
async def test_a_target_that_was_not_certified_accepts_nothing() -> None:
    async with running(certified()) as api:
        body, decisions = await decided(api, {"name": "nothing"})
        assert decisions == ["review", "review", "abstain"]
        assert body["data"][0]["reasons"] == ["no_certified_threshold"]
        assert body["policy"]["thresholds"]["accept"] is None


@async_test
async def test_the_card_shows_calibration() -> None:
    async with running(FakeEngine(TOPICS_CERTIFIED, QUIZ)) as api:
        card = (await api.client.get("/v1/models/topics")).json()
        assert card["calibration"] == {
            "date": "2026-11-01T00:00:00Z",
            "n": 3000,
            "n_out_of_scope": 200,
            "temperature": 1.3,
            "prediction_sets": [asdict(rule) for rule in CALIBRATION.prediction_sets],
            "uncertified": [asdict(target) for target in CALIBRATION.uncertified],
            "void": None,
            "plan": None,
        }
        assert (card["dtype"], card["out_of_scope_label"]) == ("float32", "oos")
        assert card["locked_policy"] is None
        assert card["policies"][1]["guarantee"]["target_risk"] == 0.1
        assert (await api.client.get("/v1/models/quiz")).json()["calibration"] is None


# -- target risks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_risk", "name"),
    [(0.05, "risk_0.05"), (0.07, "risk_0.05"), (0.1, "risk_0.1"), (0.99, "risk_0.1")],
)
@async_test
async def test_a_target_risk_takes_the_loosest_certified_policy_within_it(
    max_risk: float, name: str
) -> None:
    async with running(certified()) as api:
        body, _ = await decided(api, {"max_risk": max_risk})
        assert body["policy"]["name"] == name
        assert body["policy"]["guarantee"]["target_risk"] <= max_risk
        assert all(row["calibrated"] for row in body["data"])


async def refused(api: Api, policy: Any, **fields: Any) -> dict[str, Any]:
    response = await api.classify({"input": "x", "policy": policy, **fields})
    problem = check_problem(response, 422, "not_certified")
    assert problem["errors"][0]["pointer"] == "#/policy/max_risk"
    assert not api.engine.batches
    return problem


@async_test
async def test_a_target_risk_that_is_not_certified_says_what_is_missing() -> None:
    async with running(certified()) as api:
        problem = await refused(api, {"max_risk": 0.02})
        assert problem["detail"] == (
            "adapter topics has no policy certified for a risk of at most 0.02; certified targets: "
            "0.05, 0.1; target 0.01 was not certified: no threshold meets this target with "
            "n = 1500; about 900 more labels would"
        )
        assert problem["errors"][0]["certified_targets"] == [0.05, 0.1]
        problem = await refused(api, {"max_risk": 0.001})
        assert "was not certified:" not in problem["detail"]


@async_test
async def test_a_certificate_per_label_does_not_answer_a_target_risk() -> None:
    async with running(certified(policies=TOPICS_CERTIFIED.policies[2:])) as api:
        assert "it has no certified policy" in (await refused(api, {"max_risk": 0.5}))["detail"]


@async_test
async def test_the_first_of_two_policies_with_one_target_is_taken() -> None:
    twin = replace(RISK_5, name="twin")
    async with running(certified(policies=(RISK_5, twin))) as api:
        assert (await decided(api, {"max_risk": 0.05}))[0]["policy"]["name"] == "risk_0.05"


@pytest.mark.parametrize("override", OVERRIDES)
@async_test
async def test_a_target_risk_needs_the_sampling_it_was_certified_with(
    override: dict[str, Any],
) -> None:
    async with running(certified()) as api:
        problem = await refused(api, {"max_risk": 0.05}, **override)
        assert "leave out num_samples, seed, estimator and design" in problem["detail"]


# -- limits of the request's own ----------------------------------------------------------------


@async_test
async def test_limits_of_the_requests_own_decide_without_a_promise() -> None:
    async with running(certified()) as api:
        limits = {"min_confidence": 0.2, "abstain": {"max_predictive_entropy": 1.09}}
        body, decisions = await decided(api, limits)
        assert decisions == ["accept", "accept", "abstain"]
        assert body["policy"] == {
            "name": "inline",
            "thresholds": {
                "accept": [{"score": "confidence", "threshold": 0.2, "passes": "at_least"}],
                "abstain": [
                    {"score": "predictive_entropy", "threshold": 1.09, "passes": "at_most"}
                ],
                "by_label": None,
            },
            "target_selective_risk": None,
            "chosen_on": {},
            "guarantee": None,
            "abstain_guarantee": None,
            "void": None,
            "combined_with": None,
        }
        assert {row["calibrated"] for row in body["data"]} == {False}
        assert body["data"][0]["prediction_set"] is not None  # the sampling is the calibrated one


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"min_confidence": 1}, "low_confidence"),
        ({"max_predictive_entropy": 0}, "high_entropy"),
        ({"max_mutual_information": 0}, "high_epistemic"),
        ({"min_label_mass": 0.95}, "low_label_mass"),
        ({"min_combined": 1}, "low_combined_score"),
    ],
)
@async_test
async def test_every_limit_is_obeyed(limit: dict[str, float], reason: str) -> None:
    async with running(certified()) as api:
        body, decisions = await decided(api, limit)
        assert set(decisions) == {"review"}
        assert {*body["data"][1]["reasons"]} == {reason}
        body, decisions = await decided(api, {"min_confidence": 0, "abstain": limit})
        assert set(decisions) == {"abstain"}
        assert {*body["data"][1]["reasons"]} == {reason}


@pytest.mark.parametrize(
    ("card", "policy", "fields", "says"),
    [
        (TOPICS_POINT, {"max_mutual_information": 1}, {}, "method has none"),
        (TOPICS, {"max_mutual_information": 1}, {"num_samples": 1}, "at least 2"),
        (TOPICS_CERTIFIED, {"name": "risk_0.1"}, {"estimator": "mean_mask"}, "limits combined"),
    ],
)
@async_test
async def test_a_score_that_the_answers_lack_is_no_silent_pass(
    card: AdapterCard, policy: Any, fields: dict[str, Any], says: str
) -> None:
    async with running(FakeEngine(card)) as api:
        response = await api.classify({"input": "x", "policy": policy, **fields})
        assert says in check_problem(response, 422, "policy_not_applicable")["detail"]


# -- locks --------------------------------------------------------------------------------------


@async_test
async def test_a_locked_policy_decides_when_none_is_asked_for_and_keeps_its_promise() -> None:
    async with running(certified(), locked_policy="risk_0.1") as api:
        asked: tuple[Any, ...] = (None, {"name": "risk_0.1"}, {"max_risk": 0.1})
        for policy in asked:
            body, _ = await decided(api, policy)
            assert body["policy"]["name"] == "risk_0.1"
            assert body["policy"]["guarantee"]["target_risk"] == 0.1
            assert body["policy"]["combined_with"] is None
            assert all(row["calibrated"] for row in body["data"])
        assert (await api.client.get("/v1/models/topics")).json()["locked_policy"] == "risk_0.1"


@async_test
async def test_an_inline_policy_cannot_loosen_a_locked_one() -> None:
    async with running(certified(), locked_policy="risk_0.05") as api:
        locked, decisions = await decided(api)
        body, same = await decided(api, {"min_confidence": 0})
        assert same == decisions == ["accept", "review", "abstain"]
        assert body["data"][1]["reasons"] == locked["data"][1]["reasons"]
        assert (body["policy"]["name"], body["policy"]["combined_with"]) == ("inline", "risk_0.05")
        assert (body["policy"]["guarantee"], body["policy"]["void"]) == (None, None)
        assert {row["calibrated"] for row in body["data"]} == {False}
        body, stricter = await decided(api, {"min_confidence": 1})
        assert stricter == ["review", "review", "abstain"]
        claim = api.service.signer.verify(body["data"][0]["prediction_id"])
        assert (claim.policy, claim.target_risk) == ("inline", None)


@async_test
async def test_another_named_policy_is_combined_and_loses_its_promise() -> None:
    async with running(certified(), locked_policy="nothing") as api:
        body, decisions = await decided(api, {"name": "risk_0.05"})
        assert decisions == ["review", "review", "abstain"]
        assert body["policy"]["guarantee"] is None
        assert body["policy"]["void"] == "the locked policy nothing was applied as well"
        assert body["policy"]["combined_with"] == "nothing"


@pytest.mark.parametrize("override", OVERRIDES)
@async_test
async def test_a_lock_refuses_another_sampling(override: dict[str, Any]) -> None:
    async with running(certified(), locked_policy="risk_0.05") as api:
        response = await api.classify({"input": "x", **override})
        problem = check_problem(response, 422, "policy_locked")
        (name,) = override
        assert problem["errors"] == [{"pointer": f"#/{name}"}]
        assert f"{name} {override[name]} instead of" in problem["detail"]
        assert not api.engine.batches
        defaults = {"num_samples": 4, "seed": 0, "estimator": "monte_carlo"}
        await decided(api, **defaults)


@async_test
async def test_a_lock_on_an_adapter_without_policies_reviews_everything() -> None:
    engine = FakeEngine(replace(TOPICS, policies=()), replace(TOPICS_CERTIFIED, name="certified"))
    async with running(engine, locked_policy="risk_0.05") as api:
        body, decisions = await decided(api, model="topics")
        assert set(decisions) == {"review"}
        assert body["policy"] is None
        body, decisions = await decided(api, {"min_confidence": 0}, model="topics")
        assert set(decisions) == {"review"}
        assert body["data"][0]["reasons"] == ["adapter_uncalibrated"]
        assert body["policy"]["combined_with"] is None
        response = await api.classify({"input": "x", "model": "topics", "seed": 9})
        check_problem(response, 422, "policy_locked")


@async_test
async def test_a_lock_on_a_policy_that_is_not_there_stops_the_start() -> None:
    async with running(FakeEngine(TOPICS, QUIZ), locked_policy="strict") as api:
        assert api.service.lifecycle.phase == "failed"
        assert str(api.service.lifecycle.failure) == (
            "locked_policy is 'strict', but adapter topics has no policy of that name; it has: "
            "default"
        )
        check_problem(await api.classify({"input": "x"}), 503, "not_ready")


# -- what if ------------------------------------------------------------------------------------


async def curve(api: Api, model: str = "topics", **query: Any) -> dict[str, Any]:
    response = await api.client.get(f"/v1/models/{model}/risk-coverage", params=query)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


@async_test
async def test_the_risk_coverage_curve_of_the_first_policys_score() -> None:
    async with running(certified()) as api:
        body = await curve(api)
        assert body["object"] == "risk_coverage"
        assert (body["model"], body["score"]) == ("topics:3f9a00112233", "confidence")
        assert (body["passes"], body["delta"], body["void"]) == ("at_least", 0.1, None)
        assert body["out_of_scope_share"] == 0.2  # what the first certificate assumes
        points = body["points"]
        assert [p["threshold"] for p in points] == sorted(
            (p["threshold"] for p in points), reverse=True
        )
        assert [p["n_accepted"] for p in points] == sorted(p["n_accepted"] for p in points)
        assert points[-1]["coverage"] == pytest.approx(1)
        assert points[-1]["n_accepted"] == 150
        # at a share of 0.2 all accepted: 0.8 of (6 + 20) / 120 errors, and every outside question
        assert points[-1]["selective_risk"] == pytest.approx(0.8 * 26 / 120 + 0.2)
        assert all(p["selective_risk"] <= p["risk_upper_bound"] for p in points)


@async_test
async def test_the_curve_of_another_score_and_share() -> None:
    async with running(FakeEngine(TOPICS_CERTIFIED, QUIZ)) as api:
        body = await curve(
            *(api, "topics:3f9a00112233"),
            score="predictive_entropy",
            out_of_scope_share=0,
            delta=0.5,
        )
        assert (body["score"], body["passes"]) == ("predictive_entropy", "at_most")
        assert (body["out_of_scope_share"], body["delta"]) == (0, 0.5)
        thresholds = [point["threshold"] for point in body["points"]]
        assert thresholds == sorted(thresholds)
        assert body["points"][-1]["selective_risk"] == pytest.approx(26 / 120)
        route = {"method": "GET", "route": "/v1/models/{model_id}/risk-coverage", "status": "200"}
        assert await api.metric("http_requests_total", **route) == 1


@async_test
async def test_the_curve_of_an_adapter_whose_policies_accept_nothing() -> None:
    engine = certified(policies=(replace(POLICY, accept=None),))
    async with running(engine) as api:
        body = await curve(api)
        assert (body["score"], body["out_of_scope_share"]) == ("confidence", 0)


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"score": "accuracy"}, "query parameter score: Input should be 'confidence'"),
        ({"scor": "confidence"}, "query parameter scor: Extra inputs are not permitted"),
        ({"out_of_scope_share": "1"}, "out_of_scope_share: Input should be less than 1"),
        ({"out_of_scope_share": "-0.1"}, "greater than or equal to 0"),
        ({"out_of_scope_share": "nan"}, "finite number"),
        ({"delta": "0"}, "delta: Input should be greater than 0"),
        ({"delta": "many"}, "valid number"),
        ({"delta": ["0.1", "0.2"]}, "query parameter delta is given twice"),
    ],
)
@async_test
async def test_a_bad_query(query: dict[str, Any], says: str) -> None:
    async with running(certified()) as api:
        response = await api.client.get("/v1/models/topics/risk-coverage", params=query)
        assert says in check_problem(response, 422, "invalid_request")["detail"]


@async_test
async def test_a_query_of_thousands_of_faults_has_a_short_answer() -> None:
    async with running(certified()) as api:
        query = {f"x{number}": "1" for number in range(3000)}
        response = await api.client.get("/v1/models/topics/risk-coverage", params=query)
        detail = check_problem(response, 422, "invalid_request")["detail"]
        assert "query parameter x0" in detail
        assert len(detail) < 3000


@async_test
async def test_what_if_of_an_adapter_that_is_not_calibrated_or_not_there() -> None:
    async with running() as api:
        response = await api.client.get("/v1/models/topics/risk-coverage")
        problem = check_problem(response, 422, "not_calibrated")
        assert problem["detail"] == "the adapter stores no calibration rows"
        check_problem(
            await api.client.get("/v1/models/topix/risk-coverage"), 404, "model_not_found"
        )
        asked = {"policy": {"name": "default"}}
        check_problem(await evaluate(api, asked), 422, "not_calibrated")
        response = await evaluate(api, {**asked, "model": "topix"})
        check_problem(response, 404, "model_not_found")


@async_test
async def test_what_if_of_a_score_or_a_share_that_the_stored_rows_cannot_answer() -> None:
    without = replace(CALIBRATION, has_combined=False, n_out_of_scope=0)
    async with running(certified(calibration=without)) as api:
        path = "/v1/models/topics/risk-coverage"
        response = await api.client.get(path, params={"score": "combined", "out_of_scope_share": 0})
        assert "score combined" in check_problem(response, 422, "not_calibrated")["detail"]
        problem = check_problem(await api.client.get(path), 422, "invalid_request")
        assert problem["errors"][0]["pointer"] == "#/out_of_scope_share"
        response = await evaluate(api, {"policy": {"min_confidence": 0.5}})
        check_problem(response, 422, "invalid_request")


async def evaluate(api: Api, body: Any) -> Any:
    return await api.client.post("/v1/policies/evaluate", json=body)


@async_test
async def test_what_a_policy_would_do() -> None:
    async with running(certified(), locked_policy="nothing") as api:
        asked = {"policy": {"name": "risk_0.05"}, "out_of_scope_share": 0.5, "delta": 0.05}
        response = await evaluate(api, asked)
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["object"] == "policy_evaluation"
        assert (body["model"], body["delta"], body["out_of_scope_share"]) == (
            *("topics:3f9a00112233", 0.05, 0.5),
        )
        assert body["policy"]["guarantee"] == asdict(GUARANTEE)
        assert (body["n"], body["n_out_of_scope"]) == (150, 30)
        assert body["accept"] + body["review"] + body["abstain"] == pytest.approx(1)
        assert body["accept"] == pytest.approx(0.5 * body["in_scope_coverage"])
        assert body["out_of_scope_accepted"] == 0
        assert 0 < body["selective_risk"] < body["risk_upper_bound"]
        assert body["void"] is None
        assert not api.engine.batches


@async_test
async def test_every_documented_question_about_a_policy_works() -> None:
    async with running(certified(policies=(POLICY,))) as api:
        document = (await api.client.get("/openapi.json")).json()
        content = document["paths"]["/v1/policies/evaluate"]["post"]["requestBody"]["content"]
        examples = content["application/json"]["examples"]
        assert examples.keys() == EVALUATE_EXAMPLES.keys()
        for name, example in examples.items():
            response = await evaluate(api, example["value"])
            assert response.status_code == 200, (name, response.text)


@async_test
async def test_what_limits_and_target_risks_would_do() -> None:
    async with running(certified()) as api:
        everything = (await evaluate(api, {"policy": {"min_confidence": 0}})).json()
        assert (everything["accept"], everything["out_of_scope_share"]) == (1, 0.2)
        nothing = (await evaluate(api, {"policy": {"name": "nothing"}})).json()
        assert (nothing["accept"], nothing["selective_risk"]) == (0, None)
        assert nothing["risk_upper_bound"] == 1
        risk = (await evaluate(api, {"policy": {"max_risk": 0.1}})).json()
        assert risk["policy"]["name"] == "risk_0.1"


@pytest.mark.parametrize(
    ("body", "code", "pointer"),
    [
        ({}, "invalid_request", "#/policy"),
        ({"policy": None}, "invalid_request", "#/policy"),
        ({"policy": {"name": "x"}}, "unknown_policy", "#/policy/name"),
        ({"policy": {"max_risk": 0.02}}, "not_certified", "#/policy/max_risk"),
        ({"policy": {"name": "nothing"}, "shares": 0.1}, "invalid_request", "#/shares"),
        (
            {"policy": {"name": "nothing"}, "out_of_scope_share": 1},
            *("invalid_request", "#/out_of_scope_share"),
        ),
        (
            {"policy": {"name": "nothing"}, "out_of_scope_share": "0.1"},
            *("invalid_request", "#/out_of_scope_share"),
        ),
        ({"policy": {"name": "nothing"}, "delta": 0}, "invalid_request", "#/delta"),
        ({"policy": {"min_confidence": 2}}, "invalid_request", "#/policy/min_confidence"),
    ],
)
@async_test
async def test_a_bad_question_about_a_policy(body: Any, code: str, pointer: str) -> None:
    async with running(certified()) as api:
        problem = check_problem(await evaluate(api, body), 422, code)
        assert problem["errors"][0]["pointer"] == pointer


@async_test
async def test_a_policy_that_the_adapter_cannot_apply_is_not_evaluated() -> None:
    point = replace(TOPICS_POINT, calibration=CALIBRATION)
    async with running(FakeEngine(point)) as api:
        response = await evaluate(api, {"policy": {"max_mutual_information": 0.1}})
        check_problem(response, 422, "policy_not_applicable")


@async_test
async def test_bodies_of_policy_questions_are_checked_like_others() -> None:
    async with running(certified(), max_body_bytes=1024) as api:
        path = "/v1/policies/evaluate"
        check_problem(await api.client.post(path, content=b"{"), 415, "unsupported_media_type")
        response = await api.client.post(path, content=b"{", headers=JSON)
        check_problem(response, 400, "malformed_json")
        long = json.dumps({"policy": {"name": "x" * 2000}}).encode()
        response = await api.client.post(path, content=long, headers=JSON)
        check_problem(response, 413, "body_too_large")


class PonderingEngine(FakeEngine):
    """Answers no what-if question before it is told to."""

    def __init__(self, *cards: AdapterCard) -> None:
        super().__init__(*cards)
        self.answer_now = threading.Event()

    def evaluate_policy(self, *arguments: Any, **named: Any) -> PolicyEvaluation:
        self.answer_now.wait(10)
        return super().evaluate_policy(*arguments, **named)


@async_test
async def test_what_if_questions_hold_up_no_answers_and_have_a_deadline() -> None:
    engine = PonderingEngine(TOPICS_CERTIFIED)
    async with running(engine, request_timeout_s=1.0, encode_threads=1) as api:
        asked = [
            asyncio.ensure_future(evaluate(api, {"policy": {"name": "risk_0.05"}}))
            for _ in range(8)
        ]
        try:
            await asyncio.sleep(0.05)
            answer = await api.classify({"input": TEXTS}, X_Request_Timeout_Ms="9000")
            assert answer.status_code == 200, answer.text
            for response in await asyncio.gather(*asked):
                check_problem(response, 504, "deadline_exceeded")
        finally:
            engine.answer_now.set()
        assert (await evaluate(api, {"policy": {"name": "risk_0.05"}})).status_code == 200


@async_test
async def test_what_if_while_loading_is_a_503() -> None:
    engine = certified()
    engine.load_gate.clear()
    async with running(engine, wait=False) as api:
        response = await api.client.get("/v1/models/topics/risk-coverage")
        check_problem(response, 503, "not_ready")
        check_problem(await evaluate(api, {"policy": {"name": "x"}}), 503, "not_ready")


def test_the_limits_of_the_made_up_policies_are_as_the_tests_assume() -> None:
    assert RISK_5.accept == (Limit("confidence", 0.8),)
    assert [policy.name for policy in TOPICS_CERTIFIED.policies] == [
        *("risk_0.05", "risk_0.1", "risk_0.05_per_label", "nothing")
    ]
