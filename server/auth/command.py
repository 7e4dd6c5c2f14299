"""``dalorra keys``: make, list and revoke API keys; the server takes a change up by itself."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from server.auth.keys import (
    ApiKey,
    KeyFileError,
    locked,
    make_key,
    parse_checked,
    read_keys,
    write_keys,
)

__all__ = ["keys_app"]

USAGE_ERROR = 2

keys_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Make, list and revoke the API keys of a server (`dalorra serve --api-keys-file`).",
)

_File = Annotated[
    Path, typer.Option("--file", help="File of keys; `create` makes it when there is none.")
]


@keys_app.command("create")
def create(
    key_id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="Name of the key in logs: 1 to 64 letters, digits, dots, dashes or underscores.",
        ),
    ],
    file: _File,
    scope: Annotated[
        list[str],
        typer.Option(
            help="What it may do: infer, feedback, metrics or admin; give one option for each."
        ),
    ],
    rate_limit: Annotated[
        str | None,
        typer.Option(help="Requests in a time, such as 600/minute or 10/second. [default: any]"),
    ] = None,
    expires_in_days: Annotated[
        float | None,
        typer.Option(help="Days after which it is refused. [default: never]", min=0, max=36_500),
    ] = None,
) -> None:
    """Make a key and print it: alone on standard output, once; the file holds its hash only.

    A running server looks at its file once a second, so it needs no restart. To replace a key
    without a gap: create the new one under another ID, give it to its clients, revoke the old one.

    **Scopes**: `infer` classify, predict, models, policies; `feedback` true labels; `metrics`
    /metrics; `admin` load, unload and alias adapters. Health probes need no key.

    **Examples**

    - `dalorra keys create shop --file keys.json --scope infer --scope feedback`

    - `KEY=$(dalorra keys create ci --file keys.json --scope infer --expires-in-days 30)`

    - `curl -H "Authorization: Bearer $KEY" ...`
    """
    key, digest = make_key()
    created = datetime.now(UTC).replace(microsecond=0)
    expires = None if expires_in_days is None else created + timedelta(days=expires_in_days)
    entry = {
        "id": key_id,
        "sha256": digest,
        "scopes": list(dict.fromkeys(scope)),
        "rate_limit": rate_limit,
        "created": created,
        "expires": expires,
    }
    try:
        new = parse_checked(entry)
        with locked(file):
            write_keys(file, _with(read_keys(file) if file.exists() else (), new))
    except (KeyFileError, OSError) as error:
        raise _failed("create", error) from None
    until = "" if expires is None else f" until {expires:%Y-%m-%d %H:%M} UTC"
    typer.echo(f"{key_id} may {', '.join(new.scopes)}{until}. Its key, shown only now:", err=True)
    typer.echo(key)


@keys_app.command("list")
def show(file: _File) -> None:
    """Show every key without the key itself: id, scopes, rate limit, created, expires."""
    try:
        keys = read_keys(file)
    except KeyFileError as error:
        raise _failed("list", error) from None
    now = datetime.now(UTC)
    rows = [("ID", "SCOPES", "RATE LIMIT", "CREATED", "EXPIRES")]
    rows += [_row(key, now) for key in keys]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


@keys_app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key to take away.")],
    file: _File,
) -> None:
    """Take a key out of the file; a running server refuses it within a second or so."""
    try:
        with locked(file):
            left = _without(read_keys(file), key_id)
            write_keys(file, left)
    except (KeyFileError, OSError) as error:
        raise _failed("revoke", error) from None
    note = "" if left else "; no key is left, so nobody may come in"
    typer.echo(f"revoked {key_id}{note}", err=True)


def _with(keys: tuple[ApiKey, ...], new: ApiKey) -> tuple[ApiKey, ...]:
    if any(key.id == new.id for key in keys):
        raise KeyFileError(f"there is a key {new.id} already; revoke it, or take another id")
    return (*keys, new)


def _without(keys: tuple[ApiKey, ...], key_id: str) -> tuple[ApiKey, ...]:
    left = tuple(key for key in keys if key.id != key_id)
    if len(left) == len(keys):
        known = ", ".join(key.id for key in keys) or "none"
        raise KeyFileError(f"there is no key {key_id}; there are: {known}")
    return left


def _row(key: ApiKey, now: datetime) -> Sequence[str]:
    expires = "never" if key.expires is None else f"{key.expires:%Y-%m-%d}"
    return (
        key.id,
        ",".join(key.scopes),
        key.rate_limit or "any",
        f"{key.created:%Y-%m-%d}",
        f"{expires} (expired)" if key.has_expired(now) else expires,
    )


def _failed(command: str, error: Exception) -> typer.Exit:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    typer.echo(f"dalorra keys {command}: {reason}", err=True)
    return typer.Exit(USAGE_ERROR)
