import math

import pytest

from server.batching import Admission, AdmissionLimits, QueueFullError


def make(
    requests: int = 2, rows: int = 10, tokens: int = 100, cap_s: int = 60, share: float = 1.0
) -> Admission:
    return Admission(AdmissionLimits(requests, rows, tokens, cap_s, share))


def inside(admission: Admission) -> tuple[int, int, int]:
    return admission.num_requests, admission.num_rows, admission.num_tokens


def test_leaving_gives_everything_back() -> None:
    admission = make()
    with admission.enter() as permit:
        permit.reserve_rows(3)
        permit.reserve_tokens(40)
        assert inside(admission) == (1, 3, 40)
    assert inside(admission) == (0, 0, 0)


def test_an_error_inside_gives_everything_back() -> None:
    admission = make()

    def fail_inside() -> None:
        with admission.enter() as permit:
            permit.reserve_rows(3)
            permit.reserve_tokens(1 // 0)

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert inside(admission) == (0, 0, 0)


def test_requests_beyond_the_limit_are_refused() -> None:
    admission = make(requests=1)
    with admission.enter(), pytest.raises(QueueFullError, match="at most 1 requests") as caught:
        admission.enter()
    assert (caught.value.resource, caught.value.limit) == ("requests", 1)
    with admission.enter():
        assert admission.num_requests == 1


def test_rows_beyond_the_limit_are_refused_and_not_counted() -> None:
    admission = make(rows=10)
    with admission.enter() as first, admission.enter() as second:
        first.reserve_rows(8)
        with pytest.raises(QueueFullError, match="rows"):
            second.reserve_rows(3)
        assert admission.num_rows == 8
        second.reserve_rows(2)
    assert inside(admission) == (0, 0, 0)


def test_tokens_beyond_the_limit_are_refused_and_not_counted() -> None:
    admission = make(tokens=100)
    with admission.enter() as first, admission.enter() as second:
        first.reserve_rows(1)
        second.reserve_rows(1)
        first.reserve_tokens(60)
        with pytest.raises(QueueFullError, match="tokens"):
            second.reserve_tokens(41)
        second.reserve_tokens(40)
    assert inside(admission) == (0, 0, 0)


@pytest.mark.parametrize("resource", ["rows", "tokens"])
def test_a_full_queue_refuses_before_anything_is_spent(resource: str) -> None:
    admission = make(rows=10, tokens=100)
    with admission.enter() as permit:
        if resource == "rows":
            permit.reserve_rows(10)
        else:
            permit.reserve_rows(1)
            permit.reserve_tokens(100)
        with pytest.raises(QueueFullError) as caught:
            admission.enter()
    assert caught.value.resource == resource


def test_a_request_larger_than_the_queue_may_enter_an_empty_server() -> None:
    admission = make(rows=10, tokens=100)
    with admission.enter() as permit:
        permit.reserve_rows(50)
        permit.reserve_tokens(5000)
        assert inside(admission) == (1, 50, 5000)


def test_retry_after_is_the_time_the_work_inside_takes() -> None:
    admission = make(tokens=10_000)
    assert admission.retry_after_s() == 1
    admission.observe_speed(1000, 10.0)  # 100 tokens a second
    with admission.enter() as permit:
        assert admission.retry_after_s() == 1
        permit.reserve_rows(2)
        permit.reserve_tokens(950)
        assert admission.retry_after_s() == 10


def test_retry_after_follows_the_speed_and_is_capped() -> None:
    admission = make(tokens=10_000, cap_s=20)
    admission.observe_speed(400, 1.0)
    admission.observe_speed(0, 1.0)
    with admission.enter() as permit:
        permit.reserve_rows(2)
        permit.reserve_tokens(3000)
        assert admission.retry_after_s() == 10  # 0.75 * 400 tokens a second
        admission.observe_speed(0, 0.0)
        admission.observe_speed(0, 1.0)
        admission.observe_speed(0, 1.0)
        admission.observe_speed(0, 1.0)
        assert admission.retry_after_s() == 20


def test_work_of_priority_batch_holds_its_share_at_most_and_interactive_work_finds_room() -> None:
    admission = make(requests=4, rows=10, tokens=100, share=0.5)
    with admission.enter("batch") as first, admission.enter("batch") as second:
        with pytest.raises(QueueFullError, match="at most 2 requests of priority batch") as caught:
            admission.enter("batch")
        assert (caught.value.resource, caught.value.limit) == ("requests", 2)
        first.reserve_rows(4)
        with pytest.raises(QueueFullError, match="at most 5 rows of priority batch"):
            second.reserve_rows(2)
        second.reserve_rows(1)
        first.reserve_tokens(30)
        with pytest.raises(QueueFullError, match="at most 50 tokens of priority batch"):
            second.reserve_tokens(21)
        with admission.enter() as urgent:
            urgent.reserve_rows(5)
            urgent.reserve_tokens(70)
            assert inside(admission) == (3, 10, 100)
    assert inside(admission) == (0, 0, 0)


def test_interactive_work_may_fill_every_bound() -> None:
    admission = make(requests=4, rows=10, share=0.5)
    with admission.enter() as first, admission.enter("batch") as second:
        first.reserve_rows(10)
        with pytest.raises(QueueFullError, match="at most 10 rows at a time"):
            second.reserve_rows(1)


def test_a_batch_request_larger_than_its_share_may_enter_an_empty_server_only() -> None:
    admission = make(requests=4, rows=10, share=0.5)
    with admission.enter("batch") as permit:
        permit.reserve_rows(9)
        assert admission.num_rows == 9
    with admission.enter() as urgent, admission.enter("batch") as permit:
        urgent.reserve_rows(1)
        with pytest.raises(QueueFullError, match="at most 5 rows of priority batch"):
            permit.reserve_rows(9)


def test_retry_after_takes_rows_and_requests_that_are_not_counted_yet_for_average_ones() -> None:
    admission = make(requests=9, rows=100, tokens=10_000, cap_s=1000)
    admission.observe_speed(100, 1.0)
    with admission.enter() as known:
        known.reserve_rows(2)
        known.reserve_tokens(600)  # 300 tokens a row
    assert admission.retry_after_s() == 1
    with admission.enter() as rows_known, admission.enter():
        rows_known.reserve_rows(2)
        assert admission.retry_after_s() == 12  # 2 rows, and one request of 2 rows
        rows_known.reserve_tokens(100)  # now 237.5 tokens a row
        assert admission.retry_after_s() == math.ceil((100 + 2 * 237.5) / 100)
    assert admission.retry_after_s() == 1


def test_a_request_that_leaves_before_it_was_counted_leaves_nothing_behind() -> None:
    admission = make(requests=9, rows=100, tokens=10_000, cap_s=1000)
    admission.observe_speed(100, 1.0)
    with admission.enter() as first, admission.enter():
        first.reserve_rows(3)
    with admission.enter() as known:
        known.reserve_rows(1)
        known.reserve_tokens(500)
        assert admission.retry_after_s() == 5


def test_whoever_would_wait_for_most_of_its_deadline_is_refused() -> None:
    admission = make(requests=9, rows=99, tokens=9999)
    admission.observe_speed(100, duration_s=1.0)
    with admission.enter("interactive", 10.0) as first:
        first.reserve_rows(1)
        first.reserve_tokens(400)  # 4 s
        with admission.enter("interactive", 8.0):
            pass
        with pytest.raises(QueueFullError, match="more than half of the deadline") as caught:
            admission.enter("interactive", 7.9)
        assert (caught.value.resource, caught.value.limit) == ("seconds", 3.95)
        assert caught.value.retry_after_s == 4
    with admission.enter("interactive", 0.001):  # an empty server lets everyone try
        pass


def test_only_interactive_work_is_ahead_of_an_interactive_request() -> None:
    admission = make(requests=9, rows=99, tokens=9999)
    admission.observe_speed(100, duration_s=1.0)
    with admission.enter("batch", 60.0) as slow:
        slow.reserve_rows(1)
        slow.reserve_tokens(2000)
        with admission.enter("interactive", 1.0):
            pass
        with pytest.raises(QueueFullError):
            admission.enter("batch", 30.0)


def test_one_slow_batch_refuses_nobody() -> None:
    admission = make(requests=9, rows=99, tokens=9999)
    admission.observe_speed(1000, duration_s=1.0)
    admission.observe_speed(1, duration_s=1.0)  # a single short row says little about a full queue
    with admission.enter() as first:
        first.reserve_rows(1)
        first.reserve_tokens(3000)
        with admission.enter("interactive", 7.0):
            pass


def test_before_the_first_batch_nobody_knows_how_long_it_takes() -> None:
    admission = make(requests=9, rows=99, tokens=9999)
    with admission.enter() as first:
        first.reserve_rows(1)
        first.reserve_tokens(9000)
        with admission.enter("interactive", 0.001):
            pass
