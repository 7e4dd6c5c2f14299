"""The command ``dalorra``: the core's commands, and ``serve``."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from dalorra_core.cli import app
from server.app import create_app
from server.feedback import FeedbackSetupError
from server.logs import configure_logging
from server.ports import Engine
from server.run import leave, run_server
from server.settings import Settings, unknown_environment

__all__ = ["app", "main", "serve"]

logger = logging.getLogger(__name__)

USAGE_ERROR = 2
_LIMITS = "Limits of one request"
_QUEUE = "Queue and batches"
_MODEL = "Model"
_PROCESS = "Process"


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def serve(  # noqa: PLR0913, PLR0917 - one parameter per option
    adapter: Annotated[
        Path | None,
        typer.Argument(
            help="Adapter directory to serve, as written by `dalorra train`.",
            envvar="DALORRA_ADAPTER",
            show_envvar=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model: a directory, a hub id or a built-in alias. [default: the adapter's]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="auto, cpu, cuda or cuda:N. [default: auto]", rich_help_panel=_MODEL),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision of the base model: auto, float32 or bfloat16. [default: auto]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    deterministic: Annotated[
        bool | None,
        typer.Option(
            "--deterministic/--batched",
            help="Run every row alone, so that equal requests get answers equal bit for bit; "
            "batched answers differ in the last digits. [default: batched]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    locked_policy: Annotated[
        str | None,
        typer.Option(
            help="Policy that requests can only make stricter. [default: none]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(help="Address to listen on. [default: 127.0.0.1]", rich_help_panel=_PROCESS),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port; 0 takes a free one. [default: 8000]", rich_help_panel=_PROCESS),
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(
            help="After SIGTERM, keep serving so long while /health/ready says 503. [default: 5]",
            rich_help_panel=_PROCESS,
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the feedback database and the secret of prediction ids are kept. "
            "[default: ~/.local/state/dalorra]",
            rich_help_panel=_PROCESS,
        ),
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(
            help="debug, info, warning or error. [default: info]", rich_help_panel=_PROCESS
        ),
    ] = None,
    docs: Annotated[
        bool | None,
        typer.Option(
            "--docs/--no-docs", help="Serve /docs and /openapi.json.", rich_help_panel=_PROCESS
        ),
    ] = None,
    request_timeout_s: Annotated[
        float | None,
        typer.Option(
            "--request-timeout",
            help="Deadline in seconds of a request that names none. [default: 30]",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_request_timeout_s: Annotated[
        float | None,
        typer.Option(
            "--max-request-timeout",
            help="Longest deadline X-Request-Timeout-Ms may ask for, in seconds. [default: 120]",
            rich_help_panel=_LIMITS,
        ),
    ] = None,
    max_body_bytes: Annotated[
        int | None,
        typer.Option(help="Bytes of one body. [default: 2097152]", rich_help_panel=_LIMITS),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(
            help="Texts or questions of one request. [default: 64]", rich_help_panel=_LIMITS
        ),
    ] = None,
    max_text_chars: Annotated[
        int | None,
        typer.Option(help="Characters of one row. [default: 65536]", rich_help_panel=_LIMITS),
    ] = None,
    max_num_samples: Annotated[
        int | None,
        typer.Option(
            help="Posterior samples of one answer. [default: 64]", rich_help_panel=_LIMITS
        ),
    ] = None,
    max_requests: Annotated[
        int | None,
        typer.Option(help="Requests inside at a time. [default: 256]", rich_help_panel=_QUEUE),
    ] = None,
    max_queued_rows: Annotated[
        int | None,
        typer.Option(help="Rows inside at a time. [default: 512]", rich_help_panel=_QUEUE),
    ] = None,
    max_queued_tokens: Annotated[
        int | None,
        typer.Option(
            help="Padded tokens times samples inside at a time. [default: 262144]",
            rich_help_panel=_QUEUE,
        ),
    ] = None,
    max_batch_rows: Annotated[
        int | None,
        typer.Option(help="Rows of one batch. [default: 32]", rich_help_panel=_QUEUE),
    ] = None,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            help="Padded tokens times samples of one batch. [default: by device]",
            rich_help_panel=_QUEUE,
        ),
    ] = None,
    batch_wait_ms: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds an idle engine waits for company. [default: 4]",
            rich_help_panel=_QUEUE,
        ),
    ] = None,
) -> None:
    """Answer classification requests over HTTP until SIGTERM or SIGINT.

    Loads ADAPTER and its base model, checks both against the adapter's fingerprints and stored
    probabilities, and serves POST /v1/classify. The server listens at once; /health/ready says 503
    until the model is loaded. See /docs for the API and /metrics for Prometheus.

    Every option can be set by an environment variable as well: DALORRA_ and the option's name in
    capitals, such as DALORRA_MAX_ROWS=16 (deadlines: DALORRA_REQUEST_TIMEOUT_S). The command line
    wins.

    On SIGTERM readiness turns off at once, requests are still answered for --drain-seconds, then
    the server stops accepting, finishes what is inside and exits 0. On SIGINT it does not wait.

    Exit status: 0 after SIGTERM, 130 after SIGINT, 1 when the model could not be loaded, the
    feedback database cannot be used or the port is taken, 2 for a wrong option.

    **Examples**

    - `dalorra serve adapters/clinc150`

    - `dalorra serve adapters/clinc150 --host 0.0.0.0 --port 80 --device cuda`

    - `curl localhost:8000/v1/classify -H 'content-type: application/json' -d '{"input": "hi"}'`
    """
    options = {name: value for name, value in locals().items() if value is not None}
    settings = _settings(options)
    configure_logging(settings.log_level)
    for name in unknown_environment():
        logger.warning("no setting reads this environment variable", extra={"variable": name})
    try:
        fastapi_app = create_app(lambda: _make_engine(settings), settings)
    except FeedbackSetupError as error:
        typer.echo(f"dalorra serve: {error}", err=True)
        raise typer.Exit(1) from None
    exit_code = run_server(fastapi_app, settings)
    lifecycle = fastapi_app.state.service.lifecycle
    if lifecycle.failure is not None:
        typer.echo(f"dalorra serve: {lifecycle.failure}", err=True)
    if lifecycle.abandoned:
        leave(exit_code)
    sys.exit(exit_code)


def _settings(options: dict[str, Any]) -> Settings:
    """Return the settings; end with a sentence per fault when one is outside its domain."""
    try:
        settings = Settings(**options)
    except ValidationError as error:
        for fault in error.errors(include_url=False):
            name = ".".join(str(part) for part in fault["loc"])
            # a fault between settings has all of them as its input, the database's password too
            text = f"{name}: {fault['msg']}, got {fault['input']!r}" if name else fault["msg"]
            typer.echo(f"dalorra serve: {text}", err=True)
        raise typer.Exit(USAGE_ERROR) from None
    if settings.adapter is None:
        typer.echo("dalorra serve: give an adapter directory, or set DALORRA_ADAPTER", err=True)
        raise typer.Exit(USAGE_ERROR)
    if not (settings.adapter / "manifest.json").is_file():
        typer.echo(f"dalorra serve: {settings.adapter} has no manifest.json", err=True)
        raise typer.Exit(USAGE_ERROR)
    return settings


def _make_engine(settings: Settings) -> Engine:
    """Return the engine; runs in the loading thread, because importing torch takes seconds."""
    from server.engines.local import LocalEngine  # noqa: PLC0415

    assert settings.adapter is not None  # noqa: S101 - _settings has checked
    return LocalEngine(
        settings.adapter,
        base=settings.base,
        device=settings.device,
        dtype=settings.dtype,
        deterministic=settings.deterministic,
    )
