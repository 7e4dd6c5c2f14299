"""The doors on a real socket: before the body, whatever the target's form, and under TLS."""

import asyncio
import contextlib
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from server.connections import TlsSetupError, make_tls_context
from server.settings import Settings
from tests.support.api import async_test
from tests.support.keys import write_key_file
from tests.support.sockets import port_of, raw_exchange, serving_on_a_socket

WAIT_S = 20.0


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_the_key_is_checked_before_the_body_is_sent(key_file: Path) -> None:
    keys = write_key_file(key_file, metrics=("metrics",))

    @async_test
    async def ask() -> None:
        async with serving_on_a_socket(api_keys_file=key_file) as server:
            announced = (
                b"POST /v1/classify HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
                b"content-length: 1000000\r\nexpect: 100-continue\r\n"
            )
            wrong = b"authorization: Bearer dk_wrong\r\n"
            lacking = f"authorization: Bearer {keys['metrics']}\r\n".encode()
            for more, expected in ((b"", 401), (wrong, 401), (lacking, 403)):
                status, head = await raw_exchange(port_of(server), announced + more + b"\r\n")
                assert status == expected
                assert b"100 Continue" not in head

    ask()


def test_no_form_of_a_target_gets_past_its_scope(key_file: Path) -> None:
    keys = write_key_file(key_file, infer=("infer",))
    targets = [
        *("/metrics", "//metrics", "/metrics/", "/%6detrics", "/metrics%0a", "/metrics?a=b"),
        *("http://a/metrics", "http://a//metrics", "HTTP://A/metrics", "https://x@a:1/metrics"),
        *("/health/../metrics", "/health/%2e%2e/metrics", "/metrics#a", "/v1/adapters/topics"),
        *("/health/live?/../../metrics", "/docs/../metrics", "*", "metrics", "a:80", "/\\metrics"),
    ]

    @async_test
    async def ask() -> None:
        async with serving_on_a_socket(api_keys_file=key_file) as server:
            known = f"authorization: Bearer {keys['infer']}\r\n".encode()
            for target in targets:
                for method in (b"GET", b"OPTIONS", b"HEAD"):
                    for key, allowed in ((b"", {400, 401}), (known, {400, 403, 404})):
                        head = method + b" " + target.encode() + b" HTTP/1.1\r\nhost: a\r\n" + key
                        status, _ = await raw_exchange(port_of(server), head + b"\r\n")
                        # a query of a public path is that, and nothing more
                        public = {200, 405} if target.startswith("/health/live?") else allowed
                        assert status in public, (method, target, status)

    ask()


def test_an_upgrade_is_no_way_in(key_file: Path) -> None:
    write_key_file(key_file, infer=("infer",))

    @async_test
    async def ask() -> None:
        async with serving_on_a_socket(api_keys_file=key_file) as server:
            status, head = await raw_exchange(
                port_of(server),
                b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\n"
                b"upgrade: websocket\r\nsec-websocket-version: 13\r\n"
                b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            )
            assert status == 401
            assert b"Switching" not in head

    ask()


@async_test
async def test_slow_clients_of_the_whole_server_do_not_stop_a_normal_one() -> None:
    limits = {"max_connections": 10, "header_timeout_s": 0.2, "batch_wait_ms": 0}
    async with serving_on_a_socket(**limits) as server:
        url = f"http://127.0.0.1:{port_of(server)}"
        slow = [await asyncio.open_connection("127.0.0.1", port_of(server)) for _ in range(30)]
        for _, writer in slow:
            writer.write(b"POST /v1/classify HTTP/1.1\r\nx: ")
        async with httpx.AsyncClient(base_url=url, timeout=WAIT_S) as client:
            answer = await client.post("/v1/classify", json={"input": "a sure thing"})
            assert answer.status_code == 200
            for reader, writer in slow:
                with contextlib.suppress(ConnectionError):
                    assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
                writer.transport.abort()
            metrics = (await client.get("/metrics")).text
        for reason in ("connections", "slow_client"):
            (line,) = [one for one in metrics.splitlines() if f'reason="{reason}"' in one]
            assert float(line.split()[-1]) > 0


# -- TLS ------------------------------------------------------------------------------------------


class Authority:
    """A certificate authority that lives for a test."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.path = folder / f"{name}.pem"
        self.path.write_bytes(_pem(self._sign(self._name, self._key, is_authority=True)))

    def issue(self, name: str) -> tuple[Path, Path]:
        """Return the files of a new certificate for 127.0.0.1 and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate, private = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        certificate.write_bytes(_pem(self._sign(subject, key, is_authority=False)))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, private

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_authority: bool
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        address = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
        basic = x509.BasicConstraints(ca=is_authority, path_length=None)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(basic, critical=True)
            .add_extension(address, critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.path))


def test_tls_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    certificate, key = authority.issue("server")

    @async_test
    async def ask() -> None:
        async with serving_on_a_socket(tls_cert=certificate, tls_key=key) as server:
            port = port_of(server)
            async with httpx.AsyncClient(verify=_trusting(authority), timeout=WAIT_S) as client:
                answer = await client.get(f"https://127.0.0.1:{port}/v1/models")
                assert answer.status_code == 200
                assert "max-age" in answer.headers["strict-transport-security"]
                with pytest.raises(httpx.HTTPError):
                    await client.get(f"http://127.0.0.1:{port}/v1/models")
            async with httpx.AsyncClient(timeout=WAIT_S) as stranger:
                with pytest.raises(httpx.ConnectError, match=r"(?i)certificate"):
                    await stranger.get(f"https://127.0.0.1:{port}/v1/models")

    ask()


def test_tls_that_asks_for_the_clients_certificate(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path, "authority"), Authority(tmp_path, "other")
    certificate, key = authority.issue("server")

    @async_test
    async def ask() -> None:
        async with serving_on_a_socket(
            tls_cert=certificate, tls_key=key, tls_client_ca=authority.path
        ) as server:
            url = f"https://127.0.0.1:{port_of(server)}/v1/models"
            for issuer, welcome in ((authority, True), (other, False), (None, False)):
                context = _trusting(authority)
                if issuer is not None:
                    context.load_cert_chain(*issuer.issue("client"))
                async with httpx.AsyncClient(verify=context, timeout=WAIT_S) as client:
                    if welcome:
                        assert (await client.get(url)).status_code == 200
                    else:
                        with pytest.raises(httpx.HTTPError):
                            await client.get(url)

    ask()


def test_a_handshake_that_never_ends_is_cut(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path, "authority").issue("server")

    @async_test
    async def ask() -> None:
        async with serving_on_a_socket(
            tls_cert=certificate, tls_key=key, header_timeout_s=0.2
        ) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), WAIT_S) == b""
            writer.transport.abort()

    ask()


def test_files_that_are_no_certificates_are_named_by_their_setting(tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path, "authority").issue("server")
    _, other_key = Authority(tmp_path, "other").issue("another")
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tls_cert": wrong, "tls_key": key}, "tls_cert or tls_key"),
        ({"tls_cert": tmp_path / "none", "tls_key": key}, "tls_cert or tls_key"),
        ({"tls_cert": certificate, "tls_key": other_key}, "tls_cert or tls_key"),
        ({"tls_cert": certificate, "tls_key": key, "tls_client_ca": wrong}, "tls_client_ca"),
    ]
    for files, says in cases:
        with pytest.raises(TlsSetupError, match=f"^{says} cannot be used: ") as caught:
            make_tls_context(Settings(**files))
        assert str(tmp_path) not in str(caught.value)
