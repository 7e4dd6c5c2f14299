"""What all adapters of one base model share: its layers, and who uses them now."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dalorra_core.adapters.binding import Binding
from dalorra_core.adapters.inject import TargetSpec, decoder_of, inject
from dalorra_core.adapters.pack import SamplePack, fold
from dalorra_core.predictive.last_layer import can_shorten, needs_every_position, shortened_to
from dalorra_core.predictive.recompute import recomputed_from
from dalorra_core.predictive.turns import Turns
from dalorra_core.predictive.unpadded import LayerWork, UnpaddedRows, any_length

__all__ = ["RowStates", "Stem", "StemSource", "Trunk", "first_adapted_layer", "starting_at"]


class Stem(NamedTuple):
    """What the layers below one have computed of some rows.

    Attributes:
        layer: Number of that layer.
        states: (B, T, d), its inputs.
    """

    layer: int
    states: Tensor


class RowStates(Protocol):
    """States of a set of rows at the input of the first adapted layer."""

    def of(self, places: Sequence[int]) -> Tensor:
        """Return the states of some rows, (B, T, d), padded on the right with zeros."""
        ...

    def pick(self, places: Sequence[int]) -> "RowStates":
        """Return the states of some rows as a set of their own."""
        ...


class StemSource(Protocol):
    """Finds the states of a set of rows; see ``predictive/stem_shelf.py``."""

    def of(self, model: Any, rows: Sequence[Any]) -> RowStates | None:
        """Return them; None where keeping them gains nothing."""
        ...


class Trunk:
    """A frozen causal LM that any number of adapters may borrow for one forward at a time.

    Attributes:
        model: The causal LM.
        decoder: Its part that ends in the last hidden states.
        binding: Through which packs are lent to the adapted layers.
        turns: Held for one forward pass at a time, by whichever thread runs it.
        shelf: Keeps rows' states below the first adapted layer, where somebody has set one up.
        recomputes: Whether layers are run again in the backward pass, see ``recomputing``.
        sharded: Whether the layers are spread over processes, which then have to run the same
            passes; see ``predictive/sharded_base.py``.
    """

    def __init__(self, model: nn.Module, *, sharded: bool = False) -> None:
        model.requires_grad_(requires_grad=False)
        model.eval()
        self.model = model
        self.decoder = decoder_of(model)
        self.binding = Binding()
        self.turns = Turns()
        self.shelf: StemSource | None = None
        self._begins: dict[int, bool] = {}
        self.recomputes = False
        self.sharded = sharded

    def adapt(self, specs: Sequence[TargetSpec]) -> None:
        """Make the modules of one adapter ready to be adapted; waits for the forward under way.

        Raises:
            BaseModelError: A module does not fit; nothing has changed then.
        """
        with self.turns:
            inject(self.model, specs, self.binding)

    def last_states(
        self,
        input_ids: Tensor,
        last: Tensor,
        packs: Sequence[SamplePack],
        rows: Sequence[int],
        fold_layer: int | None,
        stem: Stem | None = None,
    ) -> Tensor:
        """Return the hidden states of each row's last token; to be called inside ``turns``.

        Args:
            input_ids: See ``states``, as for the arguments that are not named here.
            last: (M*B,) position of the last token of row m*B + b.
            packs: At least one; all of equal M.
            rows: Rows of each pack.
            fold_layer: Layer at whose input the samples are folded in.
            stem: What is known of the rows.

        Returns:
            (M*B, d), row m*B + b.
        """
        if self.shortens and not needs_every_position(packs):
            layers: Any = self.decoder.layers
            # Where that is the layer from which samples differ, it has inputs that they share.
            inside = packs[0].num_samples if fold_layer == len(layers) - 1 else 1
            short = self._without_padding(input_ids, last, packs)
            with shortened_to(self.decoder, last, inside, short):
                lent = self._lent(packs, rows, short)
                copies = packs[0].num_samples // inside
                return self._states(input_ids, lent, copies, fold_layer, stem, short)[:, 0]
        states = self.states(input_ids, packs, rows, fold_layer, stem)  # (M*B, T, d)
        return states[torch.arange(len(last), device=last.device), last]

    @contextmanager
    def recomputing(self, *, enabled: bool) -> Iterator[None]:
        """Keep the adapted layers' inputs only, inside the block, and run them again for gradients.

        Args:
            enabled: False changes nothing.
        """
        before, self.recomputes = self.recomputes, enabled
        try:
            yield
        finally:
            self.recomputes = before

    @cached_property
    def shortens(self) -> bool:
        """Whether the last layer can be run at the last positions only.

        Tried when it is first asked, which is to be inside ``turns`` and while nothing is bound.
        """
        return can_shorten(self.decoder)

    @cached_property
    def unpads(self) -> bool:
        """Whether rows may go through the layers without padding, and it is of use on this device.

        Tried when it is first asked, as ``shortens``.
        """
        on_cpu = next(self.decoder.parameters()).device.type == "cpu"
        return on_cpu and not self.sharded and self.shortens and self._can_unpad()

    @torch.no_grad()
    def _can_unpad(self) -> bool:
        """Try both ways on three rows."""
        ids = torch.tensor([[1, 2, 3, 4, 3, 2], [3, 1, 2, 2, 4, 1], [2, 1, 4, 3, 1, 1]])
        last, rows = torch.tensor([3, 5, 0]), torch.arange(3)
        whole = self.decoder(input_ids=ids, use_cache=False).last_hidden_state[rows, last]
        short = UnpaddedRows.of([4, 6, 1])
        try:
            with shortened_to(self.decoder, last, unpadded=short):
                found = self._run(ids, None, 1, short)[:, 0]
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return False
        return found.shape == whole.shape and torch.allclose(
            found.float(), whole.float(), rtol=1e-2, atol=1e-2
        )

    @cached_property
    def _layer_work(self) -> LayerWork:
        return LayerWork.of(self.decoder)

    def _without_padding(
        self, input_ids: Tensor, last: Tensor | None, packs: Sequence[SamplePack]
    ) -> UnpaddedRows | None:
        """Return the rows without padding; None where that is not possible or no less work."""
        if last is None or torch.is_grad_enabled() or not (self.unpads and any_length(packs)):
            return None
        lengths = [place + 1 for place in last[: len(input_ids)].tolist()]
        return UnpaddedRows.of(lengths) if self._layer_work.saved_by(lengths) > 0 else None

    def begins_at(self, layer: int) -> bool:
        """Return whether a forward can begin at the inputs of a layer.

        Some families do more to embeddings than hand them on. Whether a model is of that kind is
        tried when it is first asked, which is to be inside ``turns`` and while nothing is bound.
        """
        if layer not in self._begins:
            self._begins[layer] = self._can_begin_at(layer)
        return self._begins[layer]

    @torch.no_grad()
    def _can_begin_at(self, layer: int) -> bool:
        """Try both ways on two rows."""
        ids = torch.tensor([[1, 2, 3], [3, 1, 2]], device=next(self.decoder.parameters()).device)
        whole = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        try:
            begun = self._run(ids, self._stopped_at(ids, layer, None), 1)
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError):
            return False
        return begun.shape == whole.shape and torch.allclose(
            begun.float(), whole.float(), rtol=1e-2, atol=1e-2
        )

    def stem(
        self,
        input_ids: Tensor,
        layer: int,
        packs: Sequence[SamplePack] = (),
        rows: Sequence[int] = (),
        known: Stem | None = None,
        last: Tensor | None = None,
    ) -> Stem:
        """Return the inputs of a layer; to be called inside ``turns``. What lies above is not run.

        Args:
            input_ids: (B, T), the packs' rows one after the other, padded on the right.
            layer: Its number.
            packs: Whose samples share the layers below; none where no adapter begins there.
            rows: Rows of each pack.
            known: The inputs of that layer or of one below, where they are known.
            last: (B,) position of each row's last token, if what stands after it is not wanted.
        """
        if known is not None and known.layer == layer:
            return known
        short = self._without_padding(input_ids, last, packs)
        with self._lent(packs, rows, short):
            return self._stopped_at(input_ids, layer, known, short)

    def states(
        self,
        input_ids: Tensor,
        packs: Sequence[SamplePack],
        rows: Sequence[int],
        fold_layer: int | None,
        stem: Stem | None = None,
    ) -> Tensor:
        """Return the last hidden states; to be called inside ``turns``.

        Args:
            input_ids: (B, T), the packs' rows one after the other, padded on the right.
            packs: At least one; all of equal M.
            rows: Rows of each pack, when there are several; they sum to B.
            fold_layer: Layer at whose input the samples are folded in: those below are run on B
                rows. None: before the decoder.
            stem: The inputs of that layer or of one below, where they are known: what lies below
                those is not run.

        Returns:
            (M*B, T, d), row m*B + b.
        """
        lent = self._lent(packs, rows, None)
        return self._states(input_ids, lent, packs[0].num_samples, fold_layer, stem, None)

    def _states(
        self,
        input_ids: Tensor,
        lent: AbstractContextManager[None],
        copies: int,
        fold_layer: int | None,
        stem: Stem | None,
        short: UnpaddedRows | None,
    ) -> Tensor:
        """Return the last hidden states.

        Args:
            input_ids: See ``states``, as for what is not named here.
            lent: Lends the packs.
            copies: How often rows are repeated at ``fold_layer``.
            fold_layer: As there.
            stem: As there.
            short: The rows without padding; the last layer then pads them.
        """
        with lent:
            if fold_layer is not None and copies > 1 and (stem is None or stem.layer != fold_layer):
                stem = self._stopped_at(input_ids, fold_layer, stem, short)
            with self._kept(0 if stem is None else stem.layer):
                return self._run(input_ids, stem, copies, short)

    def _lent(
        self, packs: Sequence[SamplePack], rows: Sequence[int], short: UnpaddedRows | None
    ) -> AbstractContextManager[None]:
        if not packs:
            return nullcontext()
        if len(packs) == 1:
            return self.binding.bind(*packs)
        return self.binding.bind(*packs, rows=rows, lengths=() if short is None else short.lengths)

    def _kept(self, first: int) -> AbstractContextManager[None]:
        """Return what decides which activations are kept for the backward pass."""
        if not self.recomputes:
            return nullcontext()
        return recomputed_from(self.decoder, first, self.binding)

    def _run(
        self, input_ids: Tensor, stem: Stem | None, copies: int, short: UnpaddedRows | None = None
    ) -> Tensor:
        """Return the last hidden states of rows that are repeated before the first layer run."""
        inputs = input_ids if stem is None else stem.states
        options: dict[str, Any] = {"use_cache": False}
        if short is not None:
            inputs = short.joined(inputs)
            options["position_ids"] = short.positions
        inputs = fold(inputs, copies)
        if stem is None:
            return self.decoder(input_ids=inputs, **options).last_hidden_state
        with starting_at(self.decoder, stem.layer):
            return self.decoder(inputs_embeds=inputs, **options).last_hidden_state

    def _stopped_at(
        self, input_ids: Tensor, layer: int, known: Stem | None, short: UnpaddedRows | None = None
    ) -> Stem:
        found: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _ReachedError

        layers: Any = self.decoder.layers
        # before other hooks, which would fetch the weights of a layer that is not run
        stopping = layers[layer].register_forward_pre_hook(stop, prepend=True)
        with stopping, suppress(_ReachedError):
            self._run(input_ids, known, 1, short)
        return Stem(layer, found[0] if short is None else short.padded(found[0]))


def first_adapted_layer(decoder: nn.Module, specs: Sequence[TargetSpec]) -> int | None:
    """Return the first adapted layer; None where no frozen one lies below it."""
    first = min((s.layer for s in specs if s.layer is not None), default=0)
    layers: Any = getattr(decoder, "layers", None)
    return first if first > 0 and isinstance(layers, nn.ModuleList) else None


class _ReachedError(Exception):
    """Ends a forward pass whose rest is not wanted."""


class _Skipped(nn.Module):
    """Stands in a layer's place, so that the others keep their numbers, and hands its input on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # some decoders ask for it

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


@contextmanager
def starting_at(decoder: nn.Module, layer: int) -> Iterator[None]:
    """Leave out the layers below one, inside the block: what goes in are that layer's inputs."""
    layers: Any = decoder.layers
    below, rest = layers[:layer], layers[layer:]
    decoder.layers = nn.ModuleList([*(_Skipped(one) for one in below), *rest])
    try:
        yield
    finally:
        decoder.layers = layers
