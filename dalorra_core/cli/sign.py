"""``dalorra sign``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from dalorra_core.artifact.keys import is_encrypted, make_key_pair
from dalorra_core.artifact.signing import TrustedKeys, sign_artifact
from dalorra_core.cli.console import errors_as_exit, note
from dalorra_core.errors import ConfigError

__all__ = ["sign_command"]

_OTHERS = 0o077
_USAGE_ERROR = 2


def sign_command(
    adapter: Annotated[
        Path | None,
        typer.Argument(metavar="[ADAPTER]", help="Artifact directory, such as adapters/clinc150."),
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", "-k", help="Ed25519 private key in PEM.")
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option(
            metavar="PREFIX",
            help="Make a key pair instead: PREFIX.pem, which signs, and PREFIX.pub.pem.",
        ),
    ] = None,
    passphrase_file: Annotated[
        Path | None,
        typer.Option(
            help="File whose first line is the private key's passphrase; asked for otherwise, if "
            "the key has one. With --new-key: protect the key with it."
        ),
    ] = None,
) -> None:
    """Sign an adapter, so that a server with trusted keys serves it; or make a key pair.

    The signature is over the digest of the manifest, and so over every byte of the adapter. It
    lies in `signature.json` beside the manifest and changes no other file. Calibrating an adapter
    again voids it. Several keys may sign one adapter.

    **Examples**

    - `dalorra sign --new-key keys/release`

    - `dalorra sign adapters/clinc150 --key keys/release.pem`

    - `dalorra verify adapters/clinc150 --trusted-keys keys/release.pub.pem`

    Exit status: 0 done; 1 the adapter is not sound or the key cannot be used; 2 wrong usage.
    """
    if (new_key is None) == (adapter is None or key is None) or (new_key and (adapter or key)):
        typer.echo("dalorra sign: give ADAPTER and --key KEY.pem, or --new-key PREFIX", err=True)
        raise typer.Exit(_USAGE_ERROR)
    with errors_as_exit():
        if new_key is not None:
            _make(new_key, passphrase_file)
        elif adapter is not None and key is not None:
            _sign(adapter, key, passphrase_file)


def _sign(adapter: Path, key: Path, passphrase_file: Path | None) -> None:
    pem = _read(key, "key")
    if key.stat().st_mode & _OTHERS:
        note(f"{key.name} may be read by others than its owner; chmod 600 {key}")
    passphrase = None
    if passphrase_file is not None:
        passphrase = _passphrase(passphrase_file)
    elif is_encrypted(pem):
        passphrase = typer.prompt(f"passphrase of {key.name}", hide_input=True, err=True).encode()
    key_id = sign_artifact(adapter, pem, passphrase=passphrase)
    note(f"signed {adapter} with key {key_id}")


def _make(prefix: Path, passphrase_file: Path | None) -> None:
    private, public = (prefix.with_name(f"{prefix.name}{end}") for end in (".pem", ".pub.pem"))
    for path in (private, public):
        if path.exists():
            raise ConfigError(f"{path} exists; a key is never written over")
    passphrase = None if passphrase_file is None else _passphrase(passphrase_file)
    private_pem, public_pem = make_key_pair(passphrase)
    try:
        prefix.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _create(private, private_pem, 0o600)
        _create(public, public_pem, 0o644)
    except OSError as error:
        raise ConfigError(f"new_key: {prefix} cannot be written: {error.strerror}") from None
    key_id = TrustedKeys.parse(public_pem).key_ids[0]
    note(f"wrote {private} (keep it secret) and {public} (give it to servers); key id {key_id}")


def _create(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _passphrase(path: Path) -> bytes:
    lines = _read(path, "passphrase_file").splitlines()
    if not lines or not lines[0]:
        raise ConfigError(f"passphrase_file: the first line of {path} is empty")
    return lines[0]


def _read(path: Path, setting: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {error.strerror}") from None
