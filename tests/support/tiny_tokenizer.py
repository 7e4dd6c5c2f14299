"""A small byte-level BPE tokenizer, trained in this process in a few milliseconds."""

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["SPECIAL_TOKENS", "tiny_tokenizer"]

SPECIAL_TOKENS = ("<|unk|>", "<|start|>", "<|end|>")

_WORDS = (
    "the a an of to is in it you and what how which question answer choices label intent text "
    "transfer balance card account bank spam ham true false yes no maybe positive negative change "
    "accent name language speed book flight hotel alarm weather order status Answer Question "
    "Choices Return True False Passage Read correct passage below words with"
)


def tiny_tokenizer(*, adds_start: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that can spell every text and decodes it exactly.

    Its vocabulary holds the 256 bytes, the letters A to Z with and without a leading space, some
    English words and three special tokens: `SPECIAL_TOKENS`, ids 0 to 2, the last of which is
    also the padding.

    Args:
        adds_start: Whether a prompt starts with ``<|start|>``, as Llama's does.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    short = ["change", *(f"x {letter}" for letter in string.ascii_uppercase)] * 40
    tokenizer.train_from_iterator([*short, *([f"{_WORDS} {_WORDS}"] * 10)], trainer)
    if adds_start:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", 1)]
        )
    unknown, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unknown,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        clean_up_tokenization_spaces=False,
    )
