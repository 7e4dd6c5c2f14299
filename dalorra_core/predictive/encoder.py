"""Questions to one adapter as token ids; needs its manifest and a tokenizer, and no model."""

from typing import Any

from dalorra_core.artifact.manifest import GoldenProbe, Manifest
from dalorra_core.data.encode import EncodedExample, Truncation, encode
from dalorra_core.data.examples import Example
from dalorra_core.data.labels import LabelSet
from dalorra_core.data.prompts import PromptTemplate
from dalorra_core.data.rows import parse_row

__all__ = ["RowEncoder"]


class RowEncoder:
    """Turns examples into tokens as the adapter was trained on them; from any thread.

    Attributes:
        label_set: Labels of the adapter and their tokens.
    """

    def __init__(self, manifest: Manifest, tokenizer: Any) -> None:
        """Take what decides the tokens.

        Args:
            manifest: Of the adapter.
            tokenizer: Of its base model.
        """
        prompt = manifest.prompt
        self.label_set = LabelSet(manifest.labels.labels, manifest.labels.token_ids)
        self._template = PromptTemplate(prompt.kind, prompt.name, prompt.template)
        self._manifest, self._tokenizer = manifest, tokenizer

    def __call__(self, example: Example, truncate: Truncation = "none") -> EncodedExample:
        """Return one question as token ids; an unknown right label becomes -1.

        Raises:
            InputError: If it is empty or malformed; InputTooLongError when it has more tokens than
                the adapter takes.
            DataError: A choice's label is unknown.
        """
        return encode(
            example,
            tokenizer=self._tokenizer,
            template=self._template,
            label_set=self.label_set,
            max_tokens=self._manifest.prompt.max_tokens,
            truncate=truncate,
            unknown_label="ignore",
            union=self._manifest.labels.union,
            append_eos=self._manifest.prompt.append_eos,
        )

    def probe(self, probe: GoldenProbe) -> EncodedExample:
        """Return the question of a golden probe, encoded as when it was stored."""
        example = parse_row({"id": probe.id, **probe.row}, require_labels=False)
        return self(example, truncate="end")
