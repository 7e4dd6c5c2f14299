"""Text -> token ids; the only file that calls a tokenizer on text.

Text is always data: a user who types ``<|im_end|>`` gets the tokens of those characters, never the
control token. All calls use the same options, because a fast tokenizer keeps them as state and
changing them while another thread encodes is an error there.
"""

from typing import Any

from transformers import PreTrainedTokenizerBase

from dalorra_core.errors import ConfigError

__all__ = [
    "body_offsets",
    "end_token_id",
    "prompt_token_ids",
    "special_token_ids",
    "text_token_ids",
]


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of a whole prompt, with what the tokenizer adds itself (BOS, EOS)."""
    return _ids(_call(tokenizer, prompt, add_special_tokens=True))


def text_token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a piece of text, nothing added."""
    return _ids(_call(tokenizer, text, add_special_tokens=False))


def body_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, int]]:
    """Return (start, end) in characters of each token of ``text``; needs a fast tokenizer."""
    found = _call(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    return [(int(start), int(end)) for start, end in found["offset_mapping"]]


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that mean something to the model besides text (BOS, EOS, roles ...)."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(tokenizer.all_special_ids) | added


def end_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the end-of-text token.

    Raises:
        ConfigError: The tokenizer has none.
    """
    found = tokenizer.eos_token_id
    if not isinstance(found, int):
        raise ConfigError(
            "data.append_eos needs a tokenizer with an end-of-text token, got "
            f"{type(tokenizer).__name__} without one"
        )
    return found


def _call(tokenizer: PreTrainedTokenizerBase, text: str, **options: Any) -> Any:
    return tokenizer(text, split_special_tokens=True, verbose=False, **options)


def _ids(encoding: Any) -> list[int]:
    return [int(i) for i in encoding["input_ids"]]
