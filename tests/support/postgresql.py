"""A private PostgreSQL server for a test session: its own cluster, on a free loopback port."""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PostgresServer", "find_postgresql", "postgresql_server"]

TIMEOUT_S = 60
PORTS = range(20_000, 32_000)  # below what common systems use for outgoing connections
LAST_RESORT_USERS = ("postgres", "nobody")


def find_postgresql() -> Path | None:
    """Return the directory of ``initdb``, ``pg_ctl`` and ``postgres``; None when there is none."""
    places = [Path(found).parent for found in (shutil.which("pg_ctl"),) if found]
    config = shutil.which("pg_config")
    if config:
        said = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=False)
        places.append(Path(said.stdout.strip()))
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if all((place / name).exists() for name in ("initdb", "pg_ctl", "postgres")):
            return place
    return None


@dataclass(frozen=True)
class PostgresServer:
    """A running server.

    Attributes:
        programs: Directory of its programs.
        data: Its data directory.
        port: Its port on 127.0.0.1.
        password: Password of the user ``dalorra``.
        account: Operating system user that runs it; None for this one.
    """

    programs: Path
    data: Path
    port: int
    password: str
    account: str | None

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://dalorra:{self.password}@127.0.0.1:{self.port}/{database}"

    def make_database(self) -> str:
        """Return the URL of a new, empty database."""
        import psycopg  # noqa: PLC0415 - optional: only where the server was found

        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}".encode())
        return self.url(name)

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories="
        self._pg_ctl("start", "-o", options, "-l", str(self.data.parent / "log"))

    def stop(self, mode: str = "fast") -> None:
        self._pg_ctl("stop", "-m", mode)

    def _pg_ctl(self, action: str, *arguments: str) -> None:
        command = [str(self.programs / "pg_ctl"), action, "-w", "-D", str(self.data), *arguments]
        _run(command, self.account, self.data.parent)


@contextlib.contextmanager
def postgresql_server(programs: Path) -> Iterator[PostgresServer]:
    """Make a cluster, start it, and remove it at the end."""
    account = _account()
    # not pytest's own directory: only its owner may enter that, and root may not run PostgreSQL
    folder = Path(tempfile.mkdtemp(prefix="dalorra-postgresql-"))
    try:
        if account is not None:
            shutil.chown(folder, account)
        password_file = folder / "password"
        password_file.write_text(secrets.token_hex(16))
        if account is not None:
            shutil.chown(password_file, account)
        server = PostgresServer(
            programs, folder / "data", _free_port(), password_file.read_text(), account
        )
        initdb = [str(programs / "initdb"), "-D", str(server.data), "-U", "dalorra", "-E", "UTF8"]
        _run([*initdb, "-A", "scram-sha-256", "--pwfile", str(password_file)], account, folder)
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):  # a test may have stopped it
                server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _account() -> str | None:
    """Return the user to run as: PostgreSQL refuses root."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in LAST_RESORT_USERS if name in known)


def _run(command: list[str], account: str | None, folder: Path) -> None:
    entry = pwd.getpwnam(account) if account else None
    # to a file: the server that pg_ctl leaves behind would keep a pipe open for ever
    with (folder / "output").open("ab") as output:
        try:
            subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=folder,
                user=entry.pw_uid if entry else None,
                group=entry.pw_gid if entry else None,
                extra_groups=[] if entry else None,
                timeout=TIMEOUT_S,
                check=True,
            )
        except subprocess.CalledProcessError as error:
            error.add_note((folder / "output").read_text(errors="replace")[-2000:])
            raise


def _free_port() -> int:
    """Return a port that stays free while the server is down.

    Those that the system hands out to outgoing connections do not: another connection takes one,
    even the very attempt to reach the stopped server.
    """
    for port in secrets.SystemRandom().sample(PORTS, 100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no port from {PORTS.start} to {PORTS.stop - 1} is free")
