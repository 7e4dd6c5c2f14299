import threading

import pytest

from server.auth.rate import Allowance, KeyRates, parse_rate


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("text", "amount", "window_s"),
    [
        ("600/minute", 600, 60),
        ("10/second", 10, 1),
        ("5 per 2 hours", 5, 7200),
        ("1/day", 1, 86400),
    ],
)
def test_rates_as_people_write_them(text: str, amount: int, window_s: int) -> None:
    rate = parse_rate(text)
    assert (rate.amount, rate.get_expiry()) == (amount, window_s)


@pytest.mark.parametrize("text", ["", "often", "10", "-1/minute", "0/minute", "1000001/second"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(ValueError, match="must"):
        parse_rate(text)


def test_the_window_moves() -> None:
    clock = Clock()
    rates = KeyRates(clock)
    rate = parse_rate("3/minute")
    for second, remaining in ((0, 2), (10, 1), (20, 0)):
        clock.now_s = 1000.0 + second
        taken = rates.take("a", rate)
        assert (taken.allowed, taken.remaining) == (True, remaining)
    clock.now_s = 1030.0
    refused = rates.take("a", rate)
    assert refused == Allowance(allowed=False, limit=3, window_s=60, remaining=0, reset_s=30.0)
    assert rates.take("b", rate).allowed, "one key's window is not another's"


def test_retry_after_is_true_to_the_second() -> None:
    clock = Clock()
    rates = KeyRates(clock)
    rate = parse_rate("2/minute")
    rates.take("a", rate)
    clock.now_s += 0.4
    rates.take("a", rate)
    refused = rates.take("a", rate)
    assert refused.headers == {
        "RateLimit-Policy": '"key";q=2;w=60',
        "RateLimit": '"key";r=0;t=60',
        "Retry-After": "60",
    }
    clock.now_s = 1000.0 + 59.9
    assert not rates.take("a", rate).allowed
    clock.now_s = 1000.4 + int(refused.headers["Retry-After"])
    assert rates.take("a", rate).allowed


def test_refused_requests_do_not_lengthen_the_wait() -> None:
    clock = Clock()
    rates = KeyRates(clock)
    rate = parse_rate("1/minute")
    rates.take("a", rate)
    for _ in range(59):
        clock.now_s += 1
        assert not rates.take("a", rate).allowed
    clock.now_s += 1
    allowed = rates.take("a", rate)
    assert allowed.allowed
    assert "Retry-After" not in allowed.headers


def test_no_thread_is_started() -> None:
    before = threading.active_count()
    rates = KeyRates()
    for _ in range(100):
        rates.take("a", parse_rate("50/second"))
    assert threading.active_count() == before
