"""The command ``dalorra``: the core's commands, ``serve`` and ``keys``."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from dalorra_core.cli import app
from server.app import create_app
from server.auth import KeyFileError, exposure_fault, keys_app
from server.connections import TlsSetupError
from server.feedback import FeedbackSetupError
from server.logs import configure_logging
from server.ports import Engine
from server.replay import replay_command
from server.run import leave, run_server
from server.settings import Settings, unknown_environment
from server.tracing import TracingSetupError

__all__ = ["app", "main", "make_engine", "serve"]

logger = logging.getLogger(__name__)

USAGE_ERROR = 2
_EXPORT_RECORD = "dalorra-export.json"
_LIMITS = "Limits of one request"
_QUEUE = "Queue and batches"
_MODEL = "Model"
_DOORS = "Who may come in"
_PROCESS = "Process"

app.add_typer(keys_app, name="keys")


def main() -> None:
    """Run the command line."""
    app()


app.command("replay")(replay_command)


@app.command()
def serve(  # noqa: PLR0913, PLR0917 - one parameter per option
    adapter: Annotated[
        Path | None,
        typer.Argument(
            help="Adapter directory to serve, as written by `dalorra train`; may be left out with "
            "--adapter-root.",
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
    engine: Annotated[
        str | None,
        typer.Option(
            help="Who computes: local, this process, or vllm, a vLLM server. [default: local]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    vllm_url: Annotated[
        str | None,
        typer.Option(
            help="Where --engine vllm finds its server: http://127.0.0.1:8001.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    vllm_export: Annotated[
        Path | None,
        typer.Option(
            help="ADAPTER's export for vLLM, as written by `dalorra export --engine vllm`.",
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
    adapter_root: Annotated[
        Path | None,
        typer.Option(
            help="Directory of adapter directories: those in it can be loaded and unloaded while "
            "the server runs. [default: none, the adapter is fixed]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    trusted_keys: Annotated[
        Path | None,
        typer.Option(
            help="File of PEM public keys; adapters that none of them signed are refused. "
            "[default: none, nothing need be signed]",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            help="File of API keys, made by `dalorra keys create`; read again when it changes. "
            "[default: none, every caller may do all]",
            rich_help_panel=_DOORS,
        ),
    ] = None,
    allow_unauthenticated: Annotated[
        bool | None,
        typer.Option(
            "--allow-unauthenticated",
            help="Listen on another address than loopback although there are no API keys.",
            rich_help_panel=_DOORS,
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the server's certificate and its chain. [default: none, plain HTTP]",
            rich_help_panel=_DOORS,
        ),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of the certificate's private key, not encrypted.",
            rich_help_panel=_DOORS,
        ),
    ] = None,
    tls_client_ca: Annotated[
        Path | None,
        typer.Option(
            help="PEM file of authorities; clients must show a certificate of one of them. "
            "[default: none]",
            rich_help_panel=_DOORS,
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
    otel_endpoint: Annotated[
        str | None,
        typer.Option(
            help="OTLP/HTTP collector for traces, such as http://localhost:4318; needs the extra "
            "otel. [default: none]",
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
            help="Tokens times samples of one batch, of which what the samples share counts "
            "once. [default: by device]",
            rich_help_panel=_QUEUE,
        ),
    ] = None,
    batch_wait_ms: Annotated[
        float | None,
        typer.Option(
            help="Milliseconds an idle engine waits for company that is on its way. [default: 4]",
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
    wins. What has no option is listed in docs/operations.md, such as DALORRA_HEADER_TIMEOUT_S.

    Without --api-keys-file everybody who can reach the server may use it, so it then listens on
    loopback addresses only, unless --allow-unauthenticated says otherwise.

    On SIGTERM readiness turns off at once, requests are still answered for --drain-seconds, then
    the server stops accepting, finishes what is inside and exits 0. On SIGINT it does not wait.

    Exit status: 0 after SIGTERM, 130 after SIGINT, 1 when the model could not be loaded, the
    feedback database cannot be used or the port is taken, 2 for a wrong option, a file of keys or
    certificates that cannot be used, or an address that must not be open without keys.

    **Examples**

    - `dalorra serve adapters/clinc150`

    - `dalorra serve adapters/clinc150 --engine vllm --vllm-url http://127.0.0.1:8001
      --vllm-export exported/clinc150`

    - `dalorra serve adapters/clinc150 --host 0.0.0.0 --port 80 --api-keys-file keys.json`

    - `curl localhost:8000/v1/classify -H 'content-type: application/json' -d '{"input": "hi"}'`
    """
    options = {name: value for name, value in locals().items() if value is not None}
    settings = _settings(options)
    configure_logging(settings.log_level)
    for name in unknown_environment():
        logger.warning("no setting reads this environment variable", extra={"variable": name})
    try:
        fastapi_app = create_app(lambda: make_engine(settings), settings)
    except (FeedbackSetupError, TracingSetupError) as error:
        typer.echo(f"dalorra serve: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyFileError as error:
        raise _wrong(f"api_keys_file: {error}") from None
    try:
        exit_code = run_server(fastapi_app, settings)
    except TlsSetupError as error:
        raise _wrong(str(error)) from None
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
    if settings.adapter is None and settings.adapter_root is None:
        raise _wrong(
            "give an adapter directory, or set DALORRA_ADAPTER; with --adapter-root it may be "
            "left out"
        )
    if settings.adapter is not None and not (settings.adapter / "manifest.json").is_file():
        raise _wrong(f"{settings.adapter} has no manifest.json")
    export = settings.vllm_export
    if export is not None and not (export / _EXPORT_RECORD).is_file():
        raise _wrong(f"vllm_export: {export} has no {_EXPORT_RECORD}")
    if settings.adapter_root is not None and not settings.adapter_root.is_dir():
        raise _wrong(f"adapter_root: {settings.adapter_root} is not a directory")
    if (fault := exposure_fault(settings)) is not None:
        raise _wrong(fault)
    return settings


def _wrong(text: str) -> typer.Exit:
    """Say what is wrong with the options; return what ends the process."""
    typer.echo(f"dalorra serve: {text}", err=True)
    return typer.Exit(USAGE_ERROR)


def make_engine(settings: Settings) -> Engine:
    """Return the engine; runs in the loading thread, because importing torch takes seconds."""
    if settings.engine == "vllm":
        return _make_vllm_engine(settings)
    from server.engines.local import LocalEngine  # noqa: PLC0415

    return LocalEngine(
        () if settings.adapter is None else (settings.adapter,),
        base=settings.base,
        device=settings.device,
        dtype=settings.dtype,
        pass_memory_mb=settings.pass_memory_mb,
        pass_tokens=settings.pass_tokens,
        deterministic=settings.deterministic,
        trusted_keys=settings.trusted_keys,
    )


def _make_vllm_engine(settings: Settings) -> Engine:
    from server.engines.vllm import VllmEngine, VllmPlace  # noqa: PLC0415

    adapter, url, export = settings.adapter, settings.vllm_url, settings.vllm_export
    if adapter is None or url is None or export is None:  # the settings were checked
        raise AssertionError("engine vllm needs adapter, vllm_url and vllm_export")
    key = settings.vllm_api_key
    place = VllmPlace(
        url=url,
        export=export,
        export_there=settings.vllm_export_there,
        api_key=None if key is None else key.get_secret_value(),
        timeout_s=settings.vllm_timeout_s,
        start_s=settings.vllm_start_s,
        watch_s=settings.vllm_watch_s,
    )
    return VllmEngine(
        adapter, place, base=settings.base, dtype=settings.dtype, trusted_keys=settings.trusted_keys
    )
