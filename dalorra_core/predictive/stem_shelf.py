"""States below the first adapted layer, kept for sets of rows that are met again and again.

Training and scoring many adapters on one base meet the same rows every time, and what lies below
the first adapted layer is the base model's alone: the shelf keeps it in files, for all processes.
"""

import fcntl
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dalorra_core.artifact.placing import place_file
from dalorra_core.data.collate import EncodedExample
from dalorra_core.predictive.forward import LabelModel
from dalorra_core.predictive.stem import MAX_BYTES, StemStates, stem_states

__all__ = ["MIN_ROWS", "StemShelf"]

_LOG = logging.getLogger(__name__)

MIN_ROWS = 32
"""Smaller sets are not kept."""

_NAME = "states"


class StemShelf:
    """Finds or makes the states of a set of rows.

    A set is known by its tokens, the layer, the base model and its precision, so that a set has the
    very same states in every run that meets it. In memory are the sets that were used last, as far
    as they fit into ``stem.MAX_BYTES``.

    Args:
        directory: Of the files; what is in it may be deleted at any time.
        fingerprint: Of the base model.
    """

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self._directory, self._fingerprint = directory, fingerprint
        self._known: dict[str, StemStates] = {}

    def of(self, model: LabelModel, rows: Sequence[EncodedExample]) -> StemStates | None:
        """Return the states of these rows; None where keeping them gains nothing.

        Args:
            model: The adapted model.
            rows: Encoded rows.
        """
        if model.fold_layer is None or len(rows) < MIN_ROWS:
            return None
        key = self._key(model, rows)
        found = self._known.pop(key, None)
        if found is None:
            with _alone(self._directory / f"{key}.lock"):  # others wait instead of computing it too
                found = self._read(key, model, rows) or self._made(key, model, rows)
        if found is not None:
            self._known[key] = found  # the last one is the one that was used last
            while len(self._known) > 1 and sum(s.nbytes for s in self._known.values()) > MAX_BYTES:
                self._known.pop(next(iter(self._known)))
        return found

    def _key(self, model: LabelModel, rows: Sequence[EncodedExample]) -> str:
        weight = next(model.trunk.model.parameters())
        text = f"{self._fingerprint}|{weight.dtype}|{weight.device.type}|{model.fold_layer}"
        digest = hashlib.sha256(text.encode())
        for row in rows:
            digest.update(repr(row.token_ids).encode())
        return digest.hexdigest()[:32]

    def _path(self, key: str) -> Path:
        return self._directory / f"{key}.safetensors"

    def _read(
        self, key: str, model: LabelModel, rows: Sequence[EncodedExample]
    ) -> StemStates | None:
        weight = model.head.weight
        try:
            flat = load_file(self._path(key), device=str(weight.device))[_NAME]
        except (OSError, SafetensorError, KeyError):  # not there, or not whole: made again
            return None
        lengths = [len(row.token_ids) for row in rows]
        if flat.shape != (sum(lengths), weight.shape[1]):
            return None
        return StemStates(flat.split(lengths))

    def _made(
        self, key: str, model: LabelModel, rows: Sequence[EncodedExample]
    ) -> StemStates | None:
        with torch.inference_mode(mode=False), torch.no_grad():  # training will use them too
            found = stem_states(model, rows)
        if found is not None:
            try:
                place_file(self._path(key), save({_NAME: found.flat.cpu().contiguous()}))
            except OSError as error:  # a full disk; the run can do without the file
                _LOG.warning("states of %d rows are not kept: %s", len(rows), error)
        return found


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock against other processes; the system drops it when its process ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
