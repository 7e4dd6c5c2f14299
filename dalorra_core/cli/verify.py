"""``dalorra verify``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dalorra_core.artifact.reading import MANIFEST_FILE, Artifact, load_artifact
from dalorra_core.artifact.signing import (
    SignatureState,
    TrustedKeys,
    signature_states,
    verify_signature,
)
from dalorra_core.artifact.store import SIGNATURE_FILE
from dalorra_core.cli.console import errors_as_exit
from dalorra_core.cli.options import AdapterArgument
from dalorra_core.errors import ArtifactError
from dalorra_core.predictive.matching import state_of

__all__ = ["verify_command"]


def verify_command(
    adapter: AdapterArgument,
    trusted_keys: Annotated[
        Path | None,
        typer.Option(help="File of PEM public keys; one of them must have signed the adapter."),
    ] = None,
    as_json: Annotated[  # noqa: FBT002  a command-line flag
        bool, typer.Option("--json", help="The findings as one JSON object.")
    ] = False,
) -> None:
    """Check every byte of an adapter, and who signed it; the base model is not needed.

    Checked are the sha256 of every file, the manifest's own digest, its format and version, that
    no file can execute code, and that the tensors are those the manifest describes. Without
    `--trusted-keys` signatures are shown and not verified; with it, one of the keys must have
    signed the adapter as it is now.

    **Examples**

    - `dalorra verify adapters/clinc150`

    - `dalorra verify adapters/clinc150 --trusted-keys keys/release.pub.pem`

    Exit status: 0 sound, and signed by a trusted key if keys are given; 1 not; 2 wrong usage.
    """
    with errors_as_exit():
        trusted = None if trusted_keys is None else TrustedKeys.read(trusted_keys)
        try:
            artifact = load_artifact(adapter)
            state_of(artifact)
            states = signature_states(adapter, artifact.manifest_sha256, trusted)
            signer = trusted and verify_signature(adapter, artifact.manifest_sha256, trusted)
        except ArtifactError as error:
            if as_json:
                values = {"sound": False, "error": type(error).__name__, "problem": str(error)}
                typer.echo(json.dumps(values, indent=1, ensure_ascii=False))
                raise typer.Exit(1) from None
            raise
    findings = _findings(artifact, states, signer)
    if as_json:
        typer.echo(json.dumps(findings, indent=1, ensure_ascii=False))
        return
    for name in ("name", "revision", "format_version", "manifest_sha256"):
        typer.echo(f"{name:<16}{findings[name]}")
    for name, digest in artifact.manifest.files.items():
        typer.echo(f"{name:<16}sha256 {digest}")
    for name in findings["not_listed"]:
        typer.echo(f"{name:<16}not listed: never read, and no signature is about it")
    for state in states:
        typer.echo(f"{'signature':<16}{state.text}")
    if not states:
        typer.echo(f"{'signature':<16}none: anyone may have made this adapter")
    typer.echo(f"sound{f', signed by trusted key {signer}' if signer else ''}")


def _findings(
    artifact: Artifact, states: tuple[SignatureState, ...], signer: str | None
) -> dict[str, Any]:
    known = {MANIFEST_FILE, SIGNATURE_FILE, *artifact.manifest.files}
    return {
        "sound": True,
        "name": artifact.manifest.name,
        "revision": artifact.revision,
        "format_version": artifact.manifest.format_version,
        "manifest_sha256": artifact.manifest_sha256,
        "files": dict(artifact.manifest.files),
        "not_listed": sorted(p.name for p in artifact.directory.iterdir() if p.name not in known),
        "signatures": [
            {"key_id": one.key_id, "signed_at": one.signed_at, "state": one.state} for one in states
        ],
        "signed_by": signer,
    }
