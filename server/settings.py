"""Every setting of the server, from the environment (``DALORRA_``) or the command line."""

import os
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

__all__ = ["Settings", "unknown_environment"]


class Settings(BaseSettings):
    """What an operator may choose. Environment: ``DALORRA_`` and the field's name in capitals."""

    model_config = SettingsConfigDict(env_prefix="DALORRA_", extra="forbid", frozen=True)

    # the model
    adapter: Path | None = Field(default=None, description="Adapter directory to serve.")
    base: str | None = Field(
        default=None,
        description="Base model: a directory, hub id or built-in alias; the manifest's if unset.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of the base model's weights and activations; with engine vllm the "
        "--dtype of vLLM, float32 for auto.",
    )
    pass_memory_mb: int | None = Field(
        default=None,
        ge=1,
        description="MiB that the activations of one forward pass may take, beside weights and "
        "adapters: larger batches go in several passes. The label mass comes on top, 4 bytes "
        "times the vocabulary for each row and sample. Left to the device if unset: 512 tokens "
        "times samples on a CPU, 65,536 on a GPU.",
    )
    pass_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Padded tokens times samples of one forward pass; auto tries 256 to 2,048 at "
        "start on a CPU and keeps 512 unless another is clearly faster. As for pass_memory_mb if "
        "unset; the smaller of the two counts.",
    )
    deterministic: bool = Field(
        default=False, description="Run every row alone, so that answers are equal bit for bit."
    )
    locked_policy: str | None = Field(
        default=None,
        min_length=1,
        description="Name of the policy that no request can loosen; none is locked if unset.",
    )

    # who computes
    engine: Literal["local", "vllm"] = Field(
        default="local", description="local: this process. vllm: a vLLM server with an export."
    )
    vllm_url: str | None = Field(
        default=None,
        description="Where engine vllm finds its server, without /v1: http://127.0.0.1:8001.",
    )
    vllm_export: Path | None = Field(
        default=None,
        description="The adapter's export for engine vllm: `dalorra export --engine vllm`.",
    )
    vllm_export_there: str | None = Field(
        default=None,
        min_length=1,
        description="The directory vllm_export as vLLM sees it; the same path if unset.",
    )
    vllm_api_key: SecretStr | None = Field(
        default=None, description="The --api-key of vLLM; none if unset."
    )
    vllm_timeout_s: float = Field(
        default=30.0, gt=0, le=600, description="Longest wait for one answer of vLLM, in seconds."
    )
    vllm_start_s: float = Field(
        default=300.0,
        ge=0,
        le=3600,
        description="How long to wait at start for a vLLM that does not answer yet, in seconds.",
    )
    vllm_watch_s: float = Field(
        default=2.0, gt=0, le=60, description="Time between two looks at vLLM, in seconds."
    )

    # adapters at run time
    adapter_root: Path | None = Field(
        default=None,
        description="Directory of adapter directories; those in it can be loaded and unloaded "
        "while the server runs. Without it the adapter is fixed.",
    )
    adapter_memory_mb: int | None = Field(
        default=None,
        ge=1,
        description="MiB that loaded adapters may take; the one unused for longest goes first, "
        "never a pinned one. No bound if unset.",
    )
    trusted_keys: Path | None = Field(
        default=None,
        description="File of PEM public keys; adapters that none of them signed are refused. "
        "Nothing need be signed if unset.",
    )

    # who may come in
    api_keys_file: Path | None = Field(
        default=None,
        description="File of API keys, made by `dalorra keys`; without it every caller may do all.",
    )
    allow_unauthenticated: bool = Field(
        default=False,
        description="Without API keys, listen on other addresses than loopback, under any name.",
    )

    # the socket and the process
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8000, ge=0, le=65535, description="Port; 0 takes a free one.")
    drain_seconds: float = Field(
        default=5.0, ge=0, le=600, description="Keep serving so long after SIGTERM, not ready."
    )
    max_connections: int = Field(
        default=1024, ge=1, description="Connections at a time; more are closed at once."
    )
    max_header_bytes: int = Field(
        default=32_768, ge=1024, description="Bytes of the request line and the headers."
    )
    header_timeout_s: float = Field(
        default=10.0, gt=0, description="Time for a client to send its headers, in seconds."
    )
    body_timeout_s: float = Field(
        default=15.0, gt=0, description="Time for a client to send its body, in seconds."
    )
    write_timeout_s: float = Field(
        default=30.0, gt=0, description="Time for a client to take its answer, in seconds."
    )
    tls_cert: Path | None = Field(
        default=None,
        description="PEM file of the server's certificate and its chain; plain HTTP if unset.",
    )
    tls_key: Path | None = Field(
        default=None, description="PEM file of the certificate's private key, not encrypted."
    )
    tls_client_ca: Path | None = Field(
        default=None,
        description="PEM file of authorities; clients must show a certificate of one of them. "
        "None need to if unset.",
    )
    otel_endpoint: str | None = Field(
        default=None,
        description="OTLP/HTTP collector for traces, such as http://localhost:4318; needs the "
        "extra otel. No traces if unset.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="debug, info, warning or error."
    )
    docs: bool = Field(default=True, description="Serve /docs and /openapi.json.")
    git_sha: str = Field(default="unknown", description="Commit shown in dalorra_build_info.")
    error_base: str = Field(
        default="urn:dalorra:error:",
        description="Prefix of the type of every error; set it to where you publish docs/api.md.",
    )

    # one request
    max_body_bytes: int = Field(default=2 * 2**20, ge=1024, description="Bytes of one body.")
    max_rows: int = Field(default=64, ge=1, description="Rows of one request.")
    max_text_chars: int = Field(default=65_536, ge=1, description="Characters of one row.")
    max_num_samples: int = Field(default=64, ge=1, description="Posterior samples of one answer.")
    request_timeout_s: float = Field(
        default=30.0, gt=0, description="Deadline of a request that names none, in seconds."
    )
    max_request_timeout_s: float = Field(
        default=120.0, gt=0, description="Longest deadline that X-Request-Timeout-Ms may ask for."
    )

    # all requests together
    max_requests: int = Field(default=256, ge=1, description="Requests inside at a time.")
    max_queued_rows: int = Field(default=512, ge=1, description="Rows inside at a time.")
    max_queued_tokens: int = Field(
        default=262_144, ge=1, description="Padded tokens times samples inside at a time."
    )
    max_batch_rows: int = Field(default=32, ge=1, description="Rows of one batch.")
    max_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens times samples of one batch, padding included where rows are padded; "
        "what the samples share counts once. The engine's own choice if unset.",
    )
    batch_wait_ms: float = Field(
        default=4.0,
        ge=0,
        le=1000,
        description="How long an idle engine waits for company, if any is on its way.",
    )
    batch_priority_delay_ms: float = Field(
        default=2000.0,
        ge=0,
        le=600_000,
        description="How much later than it came a row of priority batch is taken to have come.",
    )
    batch_priority_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Share of the requests, rows and tokens inside that may be of priority batch.",
    )
    encode_threads: int = Field(default=2, ge=1, le=64, description="Threads that tokenise.")

    # health
    stall_s: float = Field(
        default=10.0,
        gt=0,
        description="An engine without a sign of life for so long is hung (or ten times its "
        "slowest forward pass so far, if that is longer), in seconds.",
    )
    max_engine_restarts: int = Field(
        default=3, ge=0, description="Restarts of a dead or hung engine within an hour."
    )
    max_failed_batches: int = Field(
        default=3, ge=1, description="So many failed batches in a row make the server not ready."
    )
    selftest_interval_s: float = Field(
        default=300.0, gt=0, description="Time between self tests of the adapters, in seconds."
    )

    # feedback
    state_dir: Path | None = Field(
        default=None,
        description="What must outlive the process; $XDG_STATE_HOME/dalorra or "
        "~/.local/state/dalorra if unset.",
    )
    feedback_url: SecretStr | None = Field(
        default=None,
        description="Database of true labels: postgresql://user:password@host/name, "
        "sqlite:////path, or off; feedback.sqlite3 in the state directory if unset.",
    )
    feedback_retention_days: int = Field(
        default=365, ge=1, le=36_500, description="Days that a true label is kept."
    )
    secret_file: Path | None = Field(
        default=None,
        description="File of secrets that sign prediction ids, one on each line, the first signs; "
        "made in the state directory if unset.",
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.request_timeout_s > self.max_request_timeout_s:
            raise ValueError(
                f"request_timeout_s ({self.request_timeout_s}) must not exceed "
                f"max_request_timeout_s ({self.max_request_timeout_s})"
            )
        if self.max_rows > self.max_queued_rows:
            raise ValueError(
                f"max_rows ({self.max_rows}) must not exceed max_queued_rows "
                f"({self.max_queued_rows}), or the largest allowed request could never enter"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        given = [name for name in sorted(self.model_fields_set) if name.startswith("vllm_")]
        if self.engine == "local":
            if given:
                raise ValueError(f"{given[0]} needs engine vllm, got engine local")
            return self
        for name in ("vllm_url", "vllm_export", "adapter"):
            if getattr(self, name) is None:
                raise ValueError(f"engine vllm needs {name}")
        for name in ("adapter_root", "pass_memory_mb", "deterministic"):
            if getattr(self, name):
                raise ValueError(f"{name} must be left out with engine vllm")
        if self.device != "auto":
            raise ValueError(
                f"device must be auto with engine vllm, which computes elsewhere, got {self.device}"
            )
        return self

    @field_validator("vllm_url")
    @classmethod
    def _check_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            sound = False
        sound = sound and url.isprintable() and not any(c in url for c in "@?# ")
        if not sound or url.rstrip("/").endswith("/v1"):
            raise ValueError(
                "must be http://HOST:PORT or https://HOST:PORT, with neither /v1 nor a password"
            )
        return url

    @staticmethod
    def default_state_dir() -> Path:
        """Return where state belongs when no setting says otherwise.

        Raises:
            RuntimeError: This user has no home directory.
        """
        asked = Path(os.environ.get("XDG_STATE_HOME", ""))
        # the XDG specification: a relative path is to be ignored
        return (asked if asked.is_absolute() else Path.home() / ".local" / "state") / "dalorra"


def unknown_environment() -> list[str]:
    """Return the ``DALORRA_`` variables that no setting reads: most likely misspelt."""
    known = {f"DALORRA_{name.upper()}" for name in Settings.model_fields}
    known |= {"DALORRA_API_KEY", "DALORRA_CACHE", "DALORRA_TEST_REQUIRE"}  # read elsewhere
    return sorted(
        name for name in os.environ if name.startswith("DALORRA_") and name.upper() not in known
    )
