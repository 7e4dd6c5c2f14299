"""The real engine with several adapters: shared batches, loads and unloads, and what fails."""

import gc
import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from dalorra_core.adapters.linear import AdaptedLinear
from dalorra_core.artifact.keys import make_key_pair
from dalorra_core.artifact.manifest import GoldenProbe, LabelsRef, ModuleRef
from dalorra_core.artifact.signing import sign_artifact
from dalorra_core.artifact.store import load_artifact, pack_tensors, save_artifact
from dalorra_core.data.examples import TextExample
from dalorra_core.errors import ConfigError, RowMemoryError
from dalorra_core.predictive.plan import PACKS_KEPT, SAMPLES_KEPT, SamplingPlan
from dalorra_core.predictive.predictor import Predictor
from dalorra_core.predictive.together import Share, predict_together
from dalorra_core.sampling.designs import DESIGNS
from server.engines.loaded import Loaded, Row
from server.engines.local import LocalEngine
from server.ports import (
    AdapterBaseMismatchError,
    AdapterCard,
    AdapterLoadError,
    AdapterSelfTestError,
    AdapterUntrustedError,
    BatchKey,
    BatchRow,
    Design,
    EncodedRow,
    EngineFatalError,
    EngineMemoryError,
    EngineStoppedError,
    RowRejectedError,
    RowScores,
    Sampling,
    TextQuestion,
)
from tests.support.tiny_artifacts import TEXTS, save_tiny_adapter, with_manifest
from tests.support.tiny_models import save_tiny_base

PATIENCE_S = 60
UNUSUAL = 13
"""A rank that no other tensor of these tests has as a dimension."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a base model and adapters that differ in everything."""
    folder = tmp_path_factory.mktemp("adapters")
    base = save_tiny_base(folder / "base")
    save_tiny_adapter(folder / "first", base)
    save_tiny_adapter(
        folder / "late",
        base,
        r=5,
        targets=("o_proj", "down_proj"),
        layers=(1, 1),
        num_labels=6,
        seed=1,
    )
    save_tiny_adapter(
        folder / "head",
        base,
        r=1,
        targets=("lm_head",),
        num_labels=2,
        seed=2,
    )
    save_tiny_adapter(folder / "point", base, num_labels=3, seed=3, method="mle")
    save_tiny_adapter(folder / "unusual", base, r=UNUSUAL, num_labels=5, seed=4)
    return folder


@contextmanager
def engine_of(folder: Path, *names: str, **settings: Any) -> Iterator[LocalEngine]:
    settings = {"base": str(folder / "base"), "device": "cpu"} | settings
    engine = LocalEngine([folder / name for name in names], **settings)
    yield engine
    engine.close()


def rows_of(
    engine: LocalEngine,
    card: AdapterCard,
    sampling: Sampling | None = None,
    texts: Sequence[str] = TEXTS,
) -> list[BatchRow]:
    key = BatchKey(card.key, sampling or card.defaults)
    return [BatchRow(key, engine.encode(card.key, TextQuestion(t), "none")) for t in texts]


def always(_place: int) -> bool:
    return True


def answers(engine: LocalEngine, rows: Sequence[BatchRow]) -> list[RowScores]:
    found = [scores for scores in engine.run_batch(rows, always).rows if scores is not None]
    assert len(found) == len(rows)
    return found


def loaded_of(engine: LocalEngine, card: AdapterCard) -> Loaded:
    payload = engine.encode(card.key, TextQuestion("x"), "none").payload
    assert isinstance(payload, Row)
    return payload.adapter


@contextmanager
def before_each_pass(engine: LocalEngine, card: AdapterCard, act: Callable[[], Any]) -> Any:
    """Do something whenever the base model begins a forward."""
    decoder = loaded_of(engine, card).base.trunk.decoder

    def hook(_module: nn.Module, _args: Any) -> None:
        act()

    with decoder.register_forward_pre_hook(hook):
        yield


def unusual_tensors() -> list[Tensor]:
    """Return the tensors of the unusual rank that are alive."""
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is Tensor and UNUSUAL in found.shape]


# --- shared batches -------------------------------------------------------------------------


def assert_same(found: Sequence[RowScores], expected: Sequence[RowScores]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.labels == other.labels
        assert one.probs == pytest.approx(other.probs, abs=1e-5)
        assert one.label_mass == pytest.approx(other.label_mass, abs=1e-6)
        for mine, yours in zip(one.samples, other.samples, strict=True):
            assert mine == pytest.approx(yours, abs=1e-5)
        for name in ("mutual_information", "expected_entropy", "confidence_std"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5), name


def test_rows_of_several_adapters_share_a_batch_and_answer_as_alone(folder: Path) -> None:
    with engine_of(folder, "first", "late", "head") as engine:
        assert engine.mixes_adapters
        cards = engine.load()
        batches = [rows_of(engine, card) for card in cards]
        batches.append(rows_of(engine, cards[0], Sampling(3, seed=9)))  # the first, other masks
        # shuffled together: rows of one adapter need not stand side by side
        mixed = [row for four in zip(*batches, strict=True) for row in four]
        found = answers(engine, mixed)
        for n, batch in enumerate(batches):
            assert_same(found[n :: len(batches)], answers(engine, batch))
        assert found[0].labels == ("first-0", "first-1", "first-2", "first-3")
        assert found[1].labels == tuple(f"late-{c}" for c in range(6))
        assert found[0].probs != pytest.approx(found[3].probs, abs=1e-3)  # other masks


def test_a_mixed_batch_costs_the_passes_of_one(folder: Path) -> None:
    with engine_of(folder, "first", "late") as engine:
        one, other = engine.load()
        texts = TEXTS[1:2]
        a, b = rows_of(engine, one, texts=texts), rows_of(engine, other, texts=texts)
        passes: list[int] = []
        with before_each_pass(engine, one, lambda: passes.append(1)):
            answers(engine, [*a, *b])
            assert len(passes) == 1
            answers(engine, a)
            answers(engine, b)
            assert len(passes) == 3


def test_a_pass_takes_no_more_memory_than_it_may(folder: Path) -> None:
    """A MiB holds 442 tokens of this model: (11 * 32 + 5 * 48) * 4 bytes each."""
    many = Sampling(num_samples=60)
    with engine_of(folder, "first") as engine:
        (card,) = engine.load()
        assert engine.preferred_batch_tokens == 512
        expected = answers(engine, rows_of(engine, card, many))
    with engine_of(folder, "first", pass_memory_mb=1) as engine:
        (card,) = engine.load()
        assert engine.preferred_batch_tokens == 442
        rows, sizes = rows_of(engine, card, many), list[int]()
        decoder = loaded_of(engine, card).base.trunk.decoder

        def note(_module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
            sizes.append(given["input_ids"].numel())

        with decoder.register_forward_pre_hook(note, with_kwargs=True):
            assert_same(answers(engine, rows), expected)
    assert len(sizes) > 1
    assert max(sizes) <= 442


def test_one_function_each_however_it_is_asked_for(folder: Path) -> None:
    """Equal passes do not make equal kinds: mean masks, a point method and one sample."""
    with engine_of(folder, "first", "point") as engine:
        first, point = engine.load()
        batches = [
            rows_of(engine, first, Sampling(estimator="mean_mask")),
            rows_of(engine, point),
            rows_of(engine, first, Sampling(1)),
        ]
        found = answers(engine, [row for batch in batches for row in batch])
        for n, batch in enumerate(batches):
            own = found[4 * n : 4 * n + 4]
            assert_same(own, answers(engine, batch))
            assert {scores.mutual_information for scores in own} == ({0.0} if n == 2 else {None})
        # a point method answers with its one function even where ten samples were asked for
        ten = rows_of(engine, point, Sampling(10))
        assert_same(answers(engine, [*rows_of(engine, first, Sampling(10)), *ten])[4:], found[4:8])


def test_deterministic_answers_are_equal_bit_for_bit_in_any_company(folder: Path) -> None:
    with engine_of(folder, "first", "late", deterministic=True) as engine:
        assert not engine.mixes_adapters
        first, late = engine.load()
        assert first.deterministic
        rows = rows_of(engine, first)
        alone = [answers(engine, [row])[0] for row in rows]
        assert answers(engine, rows[::-1])[::-1] == alone
        company = [row for pair in zip(rows, rows_of(engine, late), strict=True) for row in pair]
        assert answers(engine, company)[::2] == alone


def test_rows_that_nobody_waits_for_are_left_out(folder: Path) -> None:
    with engine_of(folder, "first", "late") as engine:
        first, late = engine.load()
        rows = [*rows_of(engine, first), *rows_of(engine, late)]
        every = answers(engine, rows)
        found = engine.run_batch(rows, lambda place: place in {1, 6}).rows
        assert [scores is not None for scores in found] == [n in {1, 6} for n in range(8)]
        assert_same([s for s in found if s is not None], [every[1], every[6]])
        passes: list[int] = []
        asked: list[int] = []

        def nobody(place: int) -> bool:
            asked.append(place)
            return False

        with before_each_pass(engine, first, lambda: passes.append(1)):
            assert engine.run_batch(rows, nobody).rows == (None,) * 8
        assert passes == []
        assert sorted(asked) == list(range(8))


def test_a_design_is_the_cores_and_an_unknown_one_is_refused(folder: Path) -> None:
    with engine_of(folder, "first") as engine:
        (card,) = engine.load()
        assert card.designs == DESIGNS
        predictor, row = loaded_of(engine, card).predictor, TextQuestion(TEXTS[0])
        for design in DESIGNS:
            key = BatchKey(card.key, Sampling(4, design=design))
            plan = SamplingPlan(4, design=design)
            assert engine.mask_set(key) == predictor.mask_set(plan)
            encoded = engine.encode(card.key, row, "none")
            (scores,) = engine.run_batch([BatchRow(key, encoded)], lambda _: True).rows
            expected = predictor.predict([predictor.encode(TextExample("row", TEXTS[0]))], plan)
            assert scores is not None
            found = torch.tensor(scores.samples, dtype=torch.float64)
            torch.testing.assert_close(found, expected.log_probs[:, 0].double().exp())
        sobol = cast("Design", "sobol")  # as a foreign prediction id may say
        with pytest.raises(ConfigError, match=r"design must be iid or .* got sobol"):
            engine.mask_set(BatchKey(card.key, Sampling(design=sobol)))


def test_deterministic_adapters_answer_alone_in_any_company(folder: Path) -> None:
    with engine_of(folder, "first", deterministic=True) as engine:
        (card,) = engine.load()
        predictor = loaded_of(engine, card).predictor
        rows = [predictor.encode(TextExample("row", text)) for text in TEXTS]
        share = Share(predictor, SamplingPlan(2), rows)
        alone = predictor.predict(rows, SamplingPlan(2)).log_probs
        for found in (*predict_together([share]), *predict_together([share, share])):
            assert torch.equal(found.log_probs, alone)


def test_a_row_of_another_engine_is_refused(folder: Path) -> None:
    with engine_of(folder, "first", "late") as engine, engine_of(folder, "first") as other:
        first, late = engine.load()
        (row, *_) = rows_of(engine, first)
        strange = BatchRow(BatchKey(late.key, late.defaults), row.row)
        with pytest.raises(TypeError, match="for another adapter than its key says"):
            engine.run_batch([strange], always)
        # an engine that took the place of another may give its loads the same keys
        (same,) = other.load()
        assert same.key == first.key
        (stale, *_) = rows_of(other, same)
        with pytest.raises(TypeError, match="by another engine"):
            engine.run_batch([stale], always)
        unknown = BatchRow(row.key, EncodedRow(3, truncated=False, payload="x"))
        with pytest.raises(TypeError, match="by another engine"):
            engine.run_batch([unknown], always)


# --- loads and unloads ----------------------------------------------------------------------


def test_one_adapter_loaded_twice_is_two_loads_of_the_same_masks(folder: Path) -> None:
    with engine_of(folder, "first") as engine:
        (one,) = engine.load()
        other = engine.load_adapter(folder / "first", "other name")
        assert (one.name, other.name) == ("first", "other name")
        assert (one.key, other.key) == (f"first:{one.revision}#1", f"other name:{one.revision}#2")
        assert one.revision == other.revision
        assert one.manifest_sha256 == load_artifact(folder / "first").manifest_sha256
        assert (one.rank, one.signed_by, one.deterministic) == (3, None, False)
        keys = [BatchKey(card.key, Sampling(5, seed=2)) for card in (one, other)]
        assert engine.mask_set(keys[0]) == engine.mask_set(keys[1]) is not None
        assert_same(answers(engine, rows_of(engine, one)), answers(engine, rows_of(engine, other)))
        bases = {id(loaded_of(engine, card).base) for card in (one, other)}
        assert len(bases) == 1


def test_another_revision_under_one_name_is_another_load(folder: Path, tmp_path: Path) -> None:
    second = save_tiny_adapter(tmp_path / "first", folder / "base", seed=77)
    with engine_of(folder, "first") as engine:
        (one,) = engine.load()
        other = engine.load_adapter(second)
        assert one.name == other.name == "first"
        assert one.revision != other.revision
        assert one.key != other.key
        apart = [answers(engine, rows_of(engine, card)) for card in (one, other)]
        assert apart[0][0].probs != pytest.approx(apart[1][0].probs, abs=1e-3)
        engine.unload_adapter(one.key)
        assert_same(answers(engine, rows_of(engine, other)), apart[1])


def test_a_recalibrated_adapter_is_a_new_load_of_the_same_revision(
    folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder / "first", tmp_path / "first"))
    with engine_of(folder) as engine:
        assert engine.load() == ()
        one = engine.load_adapter(copy)
        with_manifest(copy, description="as recalibrated")
        other = engine.load_adapter(copy)
        assert one.revision == other.revision
        assert one.manifest_sha256 != other.manifest_sha256
        assert one.key != other.key


def test_nothing_of_an_unloaded_adapter_stays_in_memory(folder: Path) -> None:
    assert unusual_tensors() == []
    with engine_of(folder, "first") as engine:
        (first,) = engine.load()
        before = answers(engine, rows_of(engine, first))
        card = engine.load_adapter(folder / "unusual")
        waiting = rows_of(engine, card)
        answers(engine, waiting)
        tensors = [weakref.ref(tensor) for tensor in unusual_tensors()]
        assert len(tensors) > 5
        engine.unload_adapter(card.key)
        with pytest.raises(RowRejectedError, match="is not loaded"):
            engine.encode(card.key, TextQuestion("x"), "none")
        with pytest.raises(RowRejectedError, match="is not loaded"):
            engine.self_test(card.key)
        answers(engine, waiting)  # what was in the queue by then is answered
        del waiting
        assert unusual_tensors() == []
        assert [tensor() for tensor in tensors] == [None] * len(tensors)
        engine.unload_adapter(card.key)  # changes nothing
        engine.unload_adapter("never loaded")
        assert_same(answers(engine, rows_of(engine, first)), before)
        trunk = loaded_of(engine, first).base.trunk
        assert all(
            {name for name, _ in module.named_parameters()} <= {"base.weight", "base.bias"}
            for module in trunk.model.modules()
            if isinstance(module, AdaptedLinear)
        )


def test_loads_and_unloads_beside_running_answers_change_none_of_them(folder: Path) -> None:
    errors: list[BaseException] = []
    with engine_of(folder, "late") as engine:
        (card,) = engine.load()
        rows = rows_of(engine, card)
        before = answers(engine, rows)

        def swap() -> None:
            try:
                for name in ("first", "unusual", "head", "point") * 2:
                    added = engine.load_adapter(folder / name)
                    answers(engine, rows_of(engine, added, texts=TEXTS[:1]))
                    assert engine.self_test(added.key).passed
                    engine.unload_adapter(added.key)
            except BaseException as error:  # noqa: BLE001  shown by the test
                errors.append(error)

        thread = threading.Thread(target=swap)
        thread.start()
        rounds, deadline_s = 0, time.monotonic() + PATIENCE_S
        while (thread.is_alive() and time.monotonic() < deadline_s) or rounds < 3:
            assert answers(engine, rows) == before  # bit for bit: loading changes no shape
            rounds += 1
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert errors == []
    assert unusual_tensors() == []


def test_the_first_adapter_brings_its_base_and_takes_it_away_when_it_fails(
    folder: Path, tmp_path: Path
) -> None:
    other_base = save_tiny_base(tmp_path / "base", seed=5)
    other = save_tiny_adapter(tmp_path / "other", other_base)
    bad = Path(shutil.copytree(folder / "first", tmp_path / "bad"))
    golden = load_artifact(bad).manifest.golden[0]
    with_manifest(bad, golden=(golden.model_copy(update={"probs": (1.0, 0.0, 0.0, 0.0)}),))
    with engine_of(folder, base=None) as engine:
        assert engine.load() == ()
        assert engine.preferred_batch_tokens > 0
        with pytest.raises(AdapterSelfTestError):
            engine.load_adapter(bad)
        card = engine.load_adapter(other)  # it is of another base than the one that failed
        with pytest.raises(AdapterBaseMismatchError):
            engine.load_adapter(folder / "first")
        assert answers(engine, rows_of(engine, card))


def test_an_engine_that_is_closed_meanwhile_keeps_nothing(folder: Path) -> None:
    with engine_of(folder, "first") as engine:
        (card,) = engine.load()
        with (
            before_each_pass(engine, card, engine.close),
            pytest.raises(AdapterLoadError, match="the engine is closed"),
        ):
            engine.load_adapter(folder / "unusual")
        assert unusual_tensors() == []
        with pytest.raises(EngineStoppedError, match="before load"):
            engine.encode(card.key, TextQuestion("x"), "none")


def test_memory_is_what_the_tensors_take_with_all_the_packs_it_may_keep(folder: Path) -> None:
    with engine_of(folder, "unusual", "point") as engine:
        cards = engine.load()
        for card in cards:
            loaded = loaded_of(engine, card)
            predictor = loaded.predictor
            packs = [
                predictor.pack(SamplingPlan(SAMPLES_KEPT // PACKS_KEPT, seed=n))
                for n in range(PACKS_KEPT)
            ]
            head = predictor.model.head
            tensors = [*predictor.artifact.tensors.values(), head.weight, head.token_ids]
            tensors += [tensor for pack in packs for tensor in pack.tensors()]
            sizes = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
            assert card.memory_bytes == sum(sizes.values())


def test_a_self_test_tells_the_distance_and_its_limit(folder: Path) -> None:
    with engine_of(folder, "first") as engine:
        (card,) = engine.load()
        result = engine.self_test(card.key)
        assert result.passed
        assert result.max_abs_error == pytest.approx(card.selftest_max_abs_error, abs=1e-6)
        assert result.limit == 1e-3
        tensors = loaded_of(engine, card).predictor.artifact.tensors
        tensors["lm_head.lora_B"][0].add_(1.0)
        assert not engine.self_test(card.key).passed
        tensors["lm_head.lora_B"].fill_(float("nan"))  # as memory that has gone bad may look
        result = engine.self_test(card.key)
        assert result.max_abs_error != result.max_abs_error
        assert not result.passed


# --- what cannot be loaded ------------------------------------------------------------------


def as_missing(directory: Path, _base: Path) -> None:
    shutil.rmtree(directory)


def as_truncated(directory: Path, _base: Path) -> None:
    file = directory / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def as_nan(directory: Path, _base: Path) -> None:
    stored = load_artifact(directory)
    tensors = {name: value.clone() for name, value in stored.tensors.items()}
    tensors["lm_head.lora_B"].fill_(float("nan"))
    manifest = stored.manifest.model_copy(update={"golden": ()})
    save_artifact(directory, manifest, pack_tensors(tensors), overwrite=True)


def as_nan_with_probes(directory: Path, _base: Path) -> None:
    stored = load_artifact(directory)
    tensors = {name: value.clone() for name, value in stored.tensors.items()}
    tensors["lm_head.lora_B"].fill_(float("nan"))
    save_artifact(directory, stored.manifest, pack_tensors(tensors), overwrite=True)


def as_other_module(directory: Path, _base: Path) -> None:
    stored = load_artifact(directory)
    old, new = "model.layers.0.self_attn.q_proj", "model.layers.7.self_attn.q_proj"
    tensors = {name.replace(old, new): value for name, value in stored.tensors.items()}
    modules = [m.model_dump() for m in stored.manifest.modules]
    changed = tuple(ModuleRef(**{**m, "name": m["name"].replace(old, new)}) for m in modules)
    manifest = stored.manifest.model_copy(update={"modules": changed})
    save_artifact(directory, manifest, pack_tensors(tensors), overwrite=True)


def as_other_labels(directory: Path, _base: Path) -> None:
    labels = load_artifact(directory).manifest.labels
    fewer = LabelsRef(labels=labels.labels[:3], token_ids=labels.token_ids[:3])
    with_manifest(directory, labels=fewer)


def as_strange_token(directory: Path, _base: Path) -> None:
    labels = load_artifact(directory).manifest.labels
    tokens = (*labels.token_ids[:-1], 10**6)
    with_manifest(directory, labels=LabelsRef(labels=labels.labels, token_ids=tokens))


def as_other_answers(directory: Path, _base: Path) -> None:
    first, second = load_artifact(directory).manifest.golden
    with_manifest(directory, golden=(first, second.model_copy(update={"probs": first.probs})))


def as_short_answers(directory: Path, _base: Path) -> None:
    probe = GoldenProbe(id="p", row={"text": "x"}, probs=(1.0,))
    with_manifest(directory, golden=(probe,))


def as_other_tokenizer(directory: Path, _base: Path) -> None:
    base = load_artifact(directory).manifest.base
    with_manifest(directory, base=base.model_copy(update={"tokenizer_sha256": "another"}))


def as_other_base(directory: Path, _base: Path) -> None:
    base = load_artifact(directory).manifest.base
    with_manifest(directory, base=base.model_copy(update={"fingerprint": "sha256:other"}))


def as_method_that_breaks(directory: Path, _base: Path) -> None:
    with_manifest(directory, r=0)


@pytest.mark.parametrize(
    ("spoil", "kind", "said"),
    [
        (as_missing, AdapterLoadError, "spoilt does not exist"),
        (as_truncated, AdapterLoadError, "adapter.safetensors has sha256"),
        (as_nan, AdapterLoadError, "probabilities that are not finite"),
        (as_nan_with_probes, AdapterSelfTestError, "stored probabilities are off by nan"),
        (as_other_module, AdapterLoadError, "no module 'model.layers.7.self_attn.q_proj'"),
        (as_other_labels, AdapterLoadError, "3 label rows of width 32"),
        (as_strange_token, AdapterLoadError, "label tokens must lie in 0..479"),
        (as_other_answers, AdapterSelfTestError, "spoilt: stored probabilities are off by"),
        (as_short_answers, AdapterSelfTestError, "stores 1 probabilities, the adapter has 4"),
        (as_other_tokenizer, AdapterBaseMismatchError, "trained with the tokenizer another"),
        (as_other_base, AdapterBaseMismatchError, "the base model in base has sha256:"),
        (as_method_that_breaks, AdapterLoadError, "spoilt"),
    ],
)
def test_an_adapter_that_cannot_be_served_leaves_nothing_behind(
    folder: Path,
    tmp_path: Path,
    spoil: Callable[[Path, Path], None],
    kind: type[AdapterLoadError],
    said: str,
) -> None:
    spoilt = save_tiny_adapter(tmp_path / "spoilt", folder / "base", r=UNUSUAL, seed=6)
    spoil(spoilt, folder / "base")
    with engine_of(folder, "first") as engine:
        (first,) = engine.load()
        before = answers(engine, rows_of(engine, first))
        with pytest.raises(AdapterLoadError) as caught:
            engine.load_adapter(spoilt)
        assert type(caught.value) is kind
        assert said in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
        assert str(folder) not in str(caught.value)
        assert unusual_tensors() == []  # while the error is still held
        if isinstance(caught.value, AdapterBaseMismatchError):
            assert caught.value.expected in str(caught.value)
            assert caught.value.found in str(caught.value)
        assert list(engine._loaded) == [first.key]
        assert answers(engine, rows_of(engine, first)) == before


def test_a_failure_nobody_foresaw_is_a_failed_load_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_of(folder, "first") as engine:
        engine.load()
        for error, said in (
            (KeyError("/srv/secret/place"), "unusual cannot be loaded: KeyError: 'place'"),
            (MemoryError(), "unusual does not fit into memory"),
        ):

            def fail(*_args: object, error: Exception = error) -> None:
                raise error

            monkeypatch.setattr(Predictor, "warm_up", fail)
            with pytest.raises(AdapterLoadError) as caught:
                engine.load_adapter(folder / "unusual")
            assert str(caught.value) == said


def test_a_base_that_cannot_be_used_is_said_without_its_path(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    engine = LocalEngine([], base=str(tmp_path / "empty"), device="cpu")
    with pytest.raises(AdapterLoadError, match=r"directory empty must hold config\.json") as caught:
        engine.load()
    assert str(tmp_path) not in str(caught.value)


def test_only_what_a_trusted_key_signed_is_loaded(folder: Path, tmp_path: Path) -> None:
    private, public = make_key_pair()
    keys = tmp_path / "keys.pem"
    keys.write_bytes(public)
    signed = Path(shutil.copytree(folder / "first", tmp_path / "signed"))
    key_id = sign_artifact(signed, private)
    with engine_of(folder, trusted_keys=keys) as engine:
        engine.load()
        assert engine.load_adapter(signed).signed_by == key_id
        with pytest.raises(AdapterUntrustedError, match="first is not signed"):
            engine.load_adapter(folder / "first")
        with_manifest(signed, description="changed since")
        with pytest.raises(AdapterUntrustedError):
            engine.load_adapter(signed)


# --- batches that fail ----------------------------------------------------------------------


def raising(error: Exception) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "kind", "said"),
    [
        (lambda: torch.empty(1 << 50), EngineMemoryError, "DefaultCPUAllocator"),
        (raising(MemoryError()), EngineMemoryError, None),
        (raising(RowMemoryError("2 labels, 9 tokens")), EngineMemoryError, "2 labels, 9 tokens"),
        (
            raising(torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")),
            EngineMemoryError,
            None,
        ),
        (raising(RuntimeError("CUDA error: out of memory")), EngineMemoryError, "out of memory"),
        (raising(RuntimeError("CUDA error: lost\nmore")), EngineFatalError, "^CUDA error: lost$"),
        (raising(RuntimeError("a shape")), RuntimeError, "a shape"),
        (raising(ValueError("a value")), ValueError, "a value"),
    ],
)
def test_each_failure_of_a_batch_is_told_apart_and_the_next_one_succeeds(
    folder: Path, act: Callable[[], Any], kind: type[Exception], said: str | None
) -> None:
    with engine_of(folder, "first", "late") as engine:
        first, late = engine.load()
        rows = [*rows_of(engine, first), *rows_of(engine, late)]
        before = answers(engine, rows)
        with before_each_pass(engine, first, act), pytest.raises(kind, match=said) as caught:
            engine.run_batch(rows, always)
        assert type(caught.value) is kind
        assert answers(engine, rows) == before


def test_numbers_that_are_not_finite_fail_their_batch_only(folder: Path) -> None:
    with engine_of(folder, "first", "late") as engine:
        first, late = engine.load()
        loaded_of(engine, first).predictor.artifact.tensors["lm_head.lora_B"].fill_(float("nan"))
        with pytest.raises(FloatingPointError, match="not finite"):
            engine.run_batch(rows_of(engine, first), always)
        assert answers(engine, rows_of(engine, late))


# --- what lies on disk ----------------------------------------------------------------------


def test_a_stored_adapter_is_described_from_its_manifest(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder / "late", tmp_path / "copy"))
    (copy / "adapter.safetensors").write_bytes(b"not looked at")
    (copy / "signature.json").write_bytes(b"{}")
    found = LocalEngine([]).stored_adapter(copy)
    assert (found.name, found.method, found.num_labels) == ("late", "dalorra", 6)
    assert found.revision == load_artifact(folder / "late").revision
    assert found.num_bytes == sum(file.stat().st_size for file in copy.iterdir())
    assert (found.signed, found.calibrated, found.problem) == (True, False, None)


def no_directory(directory: Path) -> None:
    shutil.rmtree(directory)


def a_file(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.write_text("x")


def no_manifest(directory: Path) -> None:
    (directory / "manifest.json").unlink()


def no_json(directory: Path) -> None:
    (directory / "manifest.json").write_bytes(b"\xff{")


def deep_json(directory: Path) -> None:
    (directory / "manifest.json").write_text("[" * 200_000)


def changed(directory: Path) -> None:
    file = directory / "manifest.json"
    file.write_text(file.read_text().replace("first-0", "first-9"))


def later_version(directory: Path) -> None:
    (directory / "manifest.json").write_text('{"format_version": 99}')


def huge(directory: Path) -> None:
    with (directory / "manifest.json").open("r+b") as file:
        file.truncate(17 << 20)


def a_loop(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").symlink_to(directory / "manifest.json")


def a_link_without_an_end(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    (directory / "manifest.json").symlink_to("/dev/zero")


def a_pipe(directory: Path) -> None:
    (directory / "manifest.json").unlink()
    os.mkfifo(directory / "manifest.json")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_directory, "has no manifest.json"),
        (a_file, "manifest.json"),
        (no_manifest, "bad has no manifest.json"),
        (no_json, "is not valid JSON"),
        (deep_json, "is not valid JSON"),
        (changed, "was changed"),
        (later_version, "99"),
        (huge, "must have at most 16777216 bytes"),
        (a_loop, "manifest.json"),
        (a_link_without_an_end, "must be a plain file"),
        (a_pipe, "must be a plain file"),
    ],
)
def test_bad_content_is_a_problem_and_never_an_error(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    bad = Path(shutil.copytree(folder / "first", tmp_path / "bad"))
    spoil(bad)
    found = LocalEngine([]).stored_adapter(bad)
    assert (found.name, found.revision, found.method, found.num_labels) == ("bad", None, None, 0)
    assert found.problem is not None
    assert said in found.problem
    assert str(tmp_path) not in found.problem


def test_a_manifest_without_tensors_is_a_problem(folder: Path, tmp_path: Path) -> None:
    from dalorra_core.artifact.manifest import manifest_digest  # noqa: PLC0415
    from dalorra_core.artifact.reading import manifest_bytes  # noqa: PLC0415

    bad = Path(shutil.copytree(folder / "first", tmp_path / "bad"))
    values = load_artifact(bad).manifest.model_dump(mode="json") | {"files": {}}
    values["manifest_sha256"] = manifest_digest(values)
    (bad / "manifest.json").write_bytes(manifest_bytes(values))
    found = LocalEngine([]).stored_adapter(bad)
    assert found.problem == "manifest.json lists no adapter.safetensors"
