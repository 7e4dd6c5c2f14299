"""The errors Dalorra raises on purpose.

Every message names the setting, file or field at fault, what is allowed, and the value that was
found, so that a person can act on it without reading code::

    DalorraError
    ├── ConfigError                 a setting outside its domain
    ├── DataError                   a data row that cannot be used (file, line, field)
    ├── InputError                  one question that cannot be encoded (empty, unknown choice ...)
    │   └── InputTooLongError       more tokens than the limit, and truncation was not allowed
    ├── RowMemoryError              one question that would take more memory than is allowed
    ├── BaseModelError              the base model cannot be found, fetched, checked or adapted
    └── ArtifactError               an adapter directory that cannot be trusted or used
        ├── ArtifactMissingFileError
        ├── ArtifactCorruptError    a file's sha256 differs from the manifest
        ├── ArtifactVersionError    written by a newer format than this program reads
        ├── ArtifactUnsafeError     pickle or another executable format
        ├── ArtifactUntrustedError  no trusted key signed what is there
        ├── BaseMismatchError       trained on another base model (both fingerprints are named)
        ├── GoldenProbeError        loads, but does not reproduce its stored probabilities
        └── ParityError             exported, but answers otherwise in the other program
"""

__all__ = [
    "ArtifactCorruptError",
    "ArtifactError",
    "ArtifactMissingFileError",
    "ArtifactUnsafeError",
    "ArtifactUntrustedError",
    "ArtifactVersionError",
    "BaseMismatchError",
    "BaseModelError",
    "ConfigError",
    "DalorraError",
    "DataError",
    "GoldenProbeError",
    "InputError",
    "InputTooLongError",
    "ParityError",
    "RowMemoryError",
]


class DalorraError(Exception):
    """Base of every error raised on purpose; its text is meant for the user."""


class ConfigError(DalorraError):
    """A setting lies outside its domain."""


class DataError(DalorraError):
    """A data row cannot be used; the message names the file, the line and the field."""


class InputError(DalorraError):
    """One question cannot be turned into tokens."""


class InputTooLongError(InputError):
    """A question has more tokens than the limit and truncation was not allowed.

    Attributes:
        num_tokens: Tokens of the whole prompt.
        max_tokens: The limit it broke.
    """

    def __init__(self, num_tokens: int, max_tokens: int) -> None:
        super().__init__(f"the prompt has {num_tokens} tokens; the limit is {max_tokens}")
        self.num_tokens = num_tokens
        self.max_tokens = max_tokens


class RowMemoryError(DalorraError, MemoryError):
    """A question alone would take more memory than one may."""


class BaseModelError(DalorraError):
    """The base model cannot be found, fetched, verified or adapted."""


class ArtifactError(DalorraError):
    """An adapter directory cannot be trusted or used."""


class ArtifactMissingFileError(ArtifactError):
    """A file that the manifest lists, or the manifest itself, is not there."""


class ArtifactCorruptError(ArtifactError):
    """A file's content differs from the sha256 in the manifest, or cannot be parsed."""


class ArtifactVersionError(ArtifactError):
    """The artifact was written in a format version this program does not read."""


class ArtifactUnsafeError(ArtifactError):
    """The artifact holds a file type that can execute code when read."""


class ArtifactUntrustedError(ArtifactError):
    """No trusted key signed the artifact as it is now."""


class BaseMismatchError(ArtifactError):
    """The adapter was trained on another base model than the one at hand.

    Attributes:
        expected: Hash of the base model's tensors, or of its tokenizer, that it was trained with.
        found: The same hash of the one at hand.
    """

    def __init__(self, message: str, *, expected: str, found: str) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class GoldenProbeError(ArtifactError):
    """The adapter loads but does not reproduce the probabilities stored with it."""


class ParityError(ArtifactError):
    """An exported adapter, loaded by another program, does not answer as ours does."""
