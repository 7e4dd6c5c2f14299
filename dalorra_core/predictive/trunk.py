"""What all adapters of one base model share: its layers, and who uses them now."""

from collections.abc import Sequence

from torch import Tensor, nn

from dalorra_core.adapters.binding import Binding
from dalorra_core.adapters.inject import TargetSpec, decoder_of, inject
from dalorra_core.adapters.pack import SamplePack, fold
from dalorra_core.predictive.fork import folded_at
from dalorra_core.predictive.turns import Turns

__all__ = ["Trunk"]


class Trunk:
    """A frozen causal LM that any number of adapters may borrow for one forward at a time.

    Attributes:
        model: The causal LM.
        decoder: Its part that ends in the last hidden states.
        binding: Through which packs are lent to the adapted layers.
        turns: Held for one forward pass at a time, by whichever thread runs it.
    """

    def __init__(self, model: nn.Module) -> None:
        model.requires_grad_(requires_grad=False)
        model.eval()
        self.model = model
        self.decoder = decoder_of(model)
        self.binding = Binding()
        self.turns = Turns()

    def adapt(self, specs: Sequence[TargetSpec]) -> None:
        """Make the modules of one adapter ready to be adapted; waits for the forward under way.

        Raises:
            BaseModelError: A module does not fit; nothing has changed then.
        """
        with self.turns:
            inject(self.model, specs, self.binding)

    def states(
        self,
        input_ids: Tensor,
        packs: Sequence[SamplePack],
        rows: Sequence[int],
        fold_layer: int | None,
    ) -> Tensor:
        """Return the last hidden states; to be called inside ``turns``.

        Args:
            input_ids: (B, T), the packs' rows one after the other, padded on the right.
            packs: At least one; all of equal M.
            rows: Rows of each pack, when there are several; they sum to B.
            fold_layer: Layer at whose input the samples are folded in; None: before the decoder.

        Returns:
            (M*B, T, d), row m*B + b.
        """
        m = packs[0].num_samples
        ids = input_ids if fold_layer is not None else fold(input_ids, m)
        with (
            self.binding.bind(*packs, rows=rows if len(packs) > 1 else ()),
            folded_at(self.decoder, fold_layer, m),
        ):
            states: Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            return states
