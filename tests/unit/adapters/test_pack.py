"""dalorra_core.adapters.pack and binding: packs are checked values, lent for one forward."""

import pytest
import torch

from dalorra_core.adapters.binding import Binding, Share
from dalorra_core.adapters.pack import ModulePack, SamplePack, fold, unfold
from dalorra_core.errors import ConfigError


def pack_of(samples: int, *, own_factors: bool = False) -> SamplePack:
    generator = torch.Generator().manual_seed(samples)
    m = samples if own_factors else 1
    module = ModulePack(
        torch.randn(m, 2, 4, generator=generator),
        torch.randn(m, 3, 2, generator=generator),
        torch.randn(samples, 2, generator=generator),
    )
    return SamplePack(samples, 2.0, {"a": module})


def test_folding_puts_sample_m_of_row_b_at_row_m_times_rows_plus_b() -> None:
    x = torch.arange(6).view(3, 2)
    folded = fold(x, 4)
    for m in range(4):
        for b in range(3):
            assert torch.equal(folded[m * 3 + b], x[b])
    assert torch.equal(unfold(folded, 4), x.expand(4, 3, 2))


@pytest.mark.parametrize("own_factors", [False, True])
def test_narrow_returns_those_samples(own_factors: bool) -> None:
    pack = pack_of(5, own_factors=own_factors)
    part = pack.narrow(1, 3)
    module, whole = part.modules["a"], pack.modules["a"]
    assert (part.num_samples, part.scaling) == (2, 2.0)
    assert module.z is not None
    assert whole.z is not None
    assert torch.equal(module.z, whole.z[1:3])
    for cut, full in ((module.lora_A, whole.lora_A), (module.lora_B, whole.lora_B)):
        assert torch.equal(cut, full[1:3] if own_factors else full)


def test_narrow_of_a_single_sample_and_without_gates() -> None:
    one = pack_of(1).narrow(0, 1).modules["a"]
    assert torch.equal(one.lora_A, pack_of(1).modules["a"].lora_A)
    plain = SamplePack(3, 1.0, {"a": ModulePack(torch.ones(3, 1, 2), torch.ones(1, 2, 1))})
    part = plain.narrow(0, 2).modules["a"]
    assert part.z is None
    assert part.lora_A.shape[0] == 2


def test_a_pack_moves_whole() -> None:
    moved = pack_of(2).to(torch.device("cpu"), torch.float64).modules["a"]
    assert moved.z is not None
    assert {moved.lora_A.dtype, moved.lora_B.dtype, moved.z.dtype} == {torch.float64}
    plain = SamplePack(1, 1.0, {"a": ModulePack(torch.ones(1, 1, 2), torch.ones(1, 2, 1))})
    assert plain.to(torch.device("cpu"), torch.float64).modules["a"].z is None


@pytest.mark.parametrize(
    ("samples", "module", "said"),
    [
        (0, ModulePack(torch.ones(1, 1, 2), torch.ones(1, 2, 1)), "at least 1, got 0"),
        (
            2,
            ModulePack(torch.ones(1, 1, 2), torch.ones(1, 2, 1), torch.ones(3, 1)),
            "module a: z holds 3 samples; allowed are 1 and 2",
        ),
        (
            2,
            ModulePack(torch.ones(3, 1, 2), torch.ones(1, 2, 1)),
            "module a: a factor holds 3 samples; allowed are 1 and 2",
        ),
        (2, ModulePack(torch.ones(1, 1, 2), torch.ones(3, 2, 1)), "a factor holds 3 samples"),
    ],
)
def test_a_pack_that_disagrees_with_its_size_is_refused(
    samples: int, module: ModulePack, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        SamplePack(samples, 1.0, {"a": module})


def test_a_pack_is_lent_for_the_block_and_taken_back() -> None:
    binding, pack = Binding(), pack_of(2)
    assert binding.lookup("a") == ()
    with binding.bind(pack):
        assert binding.lookup("a") == ((pack.modules["a"], 2, 2.0, None),)
        assert binding.lookup("b") == ()
        with pytest.raises(RuntimeError, match="already bound"), binding.bind(pack_of(3)):
            pass
        assert binding.lookup("a") == ((pack.modules["a"], 2, 2.0, None),)
    assert binding.lookup("a") == ()


def test_several_packs_are_lent_each_for_its_own_rows() -> None:
    binding, first, last = Binding(), pack_of(2), pack_of(2)
    other = SamplePack(2, 3.0, {"b": first.modules["a"]})
    with binding.bind(first, other, last, rows=(3, 1, 2)):
        assert binding.lookup("a") == (
            (first.modules["a"], 2, 2.0, Share(slice(0, 3), 6)),
            (last.modules["a"], 2, 2.0, Share(slice(4, 6), 6)),
        )
        assert binding.lookup("b") == ((first.modules["a"], 2, 3.0, Share(slice(3, 4), 6)),)
    assert binding.lookup("a") == ()


@pytest.mark.parametrize(
    ("samples", "rows", "said"),
    [
        ((2, 3), (1, 1), "equal num_samples, got"),
        ((2, 2), (1,), r"at least one row, got \(1,\)"),
        ((2, 2), (1, 0), r"at least one row, got \(1, 0\)"),
    ],
)
def test_packs_that_cannot_share_a_batch_are_refused(
    samples: tuple[int, ...], rows: tuple[int, ...], said: str
) -> None:
    binding = Binding()
    packs = [pack_of(count) for count in samples]
    with pytest.raises(ConfigError, match=said), binding.bind(*packs, rows=rows):
        pass
    assert binding.lookup("a") == ()


def test_a_failing_forward_gives_the_pack_back() -> None:
    binding = Binding()
    with pytest.raises(ZeroDivisionError), binding.bind(pack_of(2)):
        _ = 1 / 0
    assert binding.lookup("a") == ()


class _Halved:
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2

    def narrow(self, start: int, stop: int) -> "_Halved":  # noqa: ARG002  the protocol's names
        return self

    def to(self, device: torch.device, dtype: torch.dtype) -> "_Halved":  # noqa: ARG002
        return self

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return ()


def test_gates_that_all_samples_have_are_kept_once() -> None:
    factors = torch.ones(1, 1, 2), torch.ones(1, 2, 1)
    same, other = torch.tensor([[1.0], [1.0], [1.0]]), torch.tensor([[1.0], [0.0], [1.0]])
    each_row = torch.ones(3, 2, 1)
    modules = {
        "same": ModulePack(*factors, same),
        "other": ModulePack(*factors, other),
        "rows": ModulePack(*factors, each_row),
        "none": ModulePack(*factors),
        "own": ModulePack(torch.ones(3, 1, 2), factors[1], same),
        "changed": ModulePack(*factors, same, before=_Halved()),
    }
    found = SamplePack(3, 2.0, modules).condensed()
    gates = {name: m.z for name, m in found.modules.items()}
    kept = {name: None if z is None else len(z) for name, z in gates.items()}
    assert kept == {"same": 1, "other": 3, "rows": 3, "none": None, "own": 1, "changed": 1}
    assert {name for name, m in found.modules.items() if m.shared} == {"same", "none"}
    part = found.narrow(1, 3).modules["same"].z
    assert part is not None
    assert torch.equal(part, same[:1])


def test_a_shared_module_is_lent_as_one_function() -> None:
    binding, pack = Binding(), pack_of(2)
    shared = ModulePack(torch.ones(1, 1, 2), torch.ones(1, 2, 1), torch.ones(1, 1))
    with binding.bind(SamplePack(2, 2.0, {**pack.modules, "b": shared})):
        assert [loan.num_samples for loan in binding.lookup("b")] == [1]
        assert [loan.num_samples for loan in binding.lookup("a")] == [2]
