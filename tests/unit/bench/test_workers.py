"""Which devices a bench works on."""

import pytest
import torch

from dalorra_core.bench.workers import devices_of
from dalorra_core.errors import ConfigError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", ("cuda", ("cuda:0", "cuda:1"))),
        ("cuda", ("cuda", ("cuda:0", "cuda:1"))),
        ("cuda:1", ("cuda", ("cuda:1",))),
        ("cuda:1,cuda:0", ("cuda", ("cuda:1", "cuda:0"))),
        ("cpu", ("cpu", ("cpu",))),
    ],
)
def test_auto_and_cuda_are_all_gpus(asked: str, expected: object) -> None:
    assert devices_of(asked) == expected


@pytest.mark.usefixtures("no_gpu")
def test_auto_is_the_cpu_where_there_is_no_gpu() -> None:
    assert devices_of("auto") == ("cpu", ("cpu",))
    with pytest.raises(ConfigError, match="sees no CUDA"):
        devices_of("cuda")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("cuda:2", "some of cuda:0, cuda:1, each once, got 'cuda:2'"),
        ("cuda:x", "got 'cuda:x'"),
        ("cuda:0,cuda", "got 'cuda:0,cuda'"),
        ("cuda:0,cuda:0", "each once"),
        ("cuda:0,cpu", "some of cuda:0, cuda:1"),
        ("cpu,cuda:0", "some of cuda:0, cuda:1"),
        ("tpu", "auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("", "got ''"),
    ],
)
def test_other_devices_are_refused(asked: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        devices_of(asked)
