"""What lies in a directory, as far as its manifest says; nothing is loaded."""

import os
from pathlib import Path

from dalorra_core.artifact.manifest import Manifest
from dalorra_core.artifact.reading import read_manifest
from dalorra_core.artifact.store import ADAPTER_FILE, MANIFEST_FILE, SIGNATURE_FILE
from dalorra_core.errors import DalorraError
from server.engines.faults import without_paths
from server.ports import StoredAdapter

__all__ = ["stored_adapter"]

_LARGEST_MANIFEST = 16 << 20


def stored_adapter(directory: Path) -> StoredAdapter:
    """Return what lies in a directory; see ``server.ports.Engine``."""
    sizes = _file_sizes(directory)
    manifest, problem = _manifest_of(directory, sizes)
    stored = StoredAdapter(
        name=directory.name,
        revision=None,
        method=None,
        num_labels=0,
        num_bytes=sum(sizes.values()),
        signed=SIGNATURE_FILE in sizes,
        calibrated=False,
        problem=problem,
    )
    if manifest is None:
        return stored
    return StoredAdapter(
        name=manifest.name,
        revision=manifest.files[ADAPTER_FILE][:12],
        method=manifest.method.name,
        num_labels=len(manifest.labels.labels),
        num_bytes=stored.num_bytes,
        signed=stored.signed,
        calibrated=manifest.calibration is not None,
    )


def _file_sizes(directory: Path) -> dict[str, int]:
    """Return the sizes of the plain files of a directory, in bytes; links are not followed."""
    sizes: dict[str, int] = {}
    try:
        for file in directory.iterdir():
            if file.is_file() and not file.is_symlink():
                sizes[file.name] = file.lstat().st_size
    except OSError:  # it is none, may not be read, or goes away meanwhile
        return sizes
    return sizes


def _manifest_of(directory: Path, sizes: dict[str, int]) -> tuple[Manifest | None, str | None]:
    """Return a directory's manifest, or why it cannot be read."""
    if sizes.get(MANIFEST_FILE, 0) > _LARGEST_MANIFEST:
        return None, f"{MANIFEST_FILE} must have at most {_LARGEST_MANIFEST} bytes"
    if MANIFEST_FILE not in sizes and os.path.lexists(directory / MANIFEST_FILE):
        # a link may lead to what has no end, and a pipe is waited for
        return None, f"{MANIFEST_FILE} must be a plain file"
    try:
        manifest = read_manifest(directory)
    except (DalorraError, OSError, ValueError) as error:
        return None, without_paths(str(error), directory)
    if ADAPTER_FILE not in manifest.files:
        return None, f"{MANIFEST_FILE} lists no {ADAPTER_FILE}"
    return manifest, None
