"""TLS: handshakes, what is refused in them, and files that are refused before."""

import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from ringserve_api.cli import main
from ringserve_api.config import ServerConfig
from ringserve_api.server import bind_socket
from ringserve_api.tls import server_context

from ringserve.errors import ConfigError
from tests.api.conftest import RunningServer, eventually
from tests.api.test_http import BODY
from tests.api.test_keys import ACME, ENTRIES, write


@dataclass(frozen=True)
class Authority:
    """A root of its own, which signs certificates for 127.0.0.1."""

    folder: Path
    name: str
    authority: trustme.CA = field(default_factory=trustme.CA)

    @property
    def root(self) -> str:
        path = self.folder / f"{self.name}.pem"
        self.authority.cert_pem.write_to_path(path)
        return str(path)

    def sign(self, name: str) -> tuple[str, str]:
        """Paths of a certificate and its key."""
        signed = self.authority.issue_cert("127.0.0.1")
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        signed.cert_chain_pems[0].write_to_path(certificate)
        signed.private_key_pem.write_to_path(key)
        return str(certificate), str(key)


@dataclass(frozen=True)
class Files:
    root: str
    server: tuple[str, str]
    client: tuple[str, str]
    stranger: tuple[str, str]
    """Signed by a root that nobody here trusts."""

    def flags(self, **more: str) -> dict[str, str]:
        return {"tls_cert": self.server[0], "tls_key": self.server[1], **more}

    def trusting(self, shown: tuple[str, str] | None = None) -> ssl.SSLContext:
        """What a client uses that trusts our root and shows a certificate."""
        context = ssl.create_default_context(cafile=self.root)
        if shown is not None:
            context.load_cert_chain(*shown)
        return context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
    return Files(ours.root, ours.sign("server"), ours.sign("client"), theirs.sign("stranger"))


Start = Callable[..., RunningServer]


def test_requests_and_streams_over_tls(start_server: Start, files: Files) -> None:
    server = start_server(**files.flags())
    assert server.url.startswith("https://127.0.0.1:")
    with httpx.Client(base_url=server.url, verify=files.trusting(), timeout=20) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.post("/v1/completions", json=BODY).json()["choices"][0]["text"] == "ab"
        large = {**BODY, "prompt": "x" * 1_000_000, "stream": True}
        assert http.post("/v1/completions", json=large).text.endswith("data: [DONE]\n\n")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{server.url}/health")


def test_a_client_that_leaves_cancels(start_server: Start, files: Files) -> None:
    server = start_server(**files.flags())
    server.engine.step_s = 60
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**BODY, "stream": True}, verify=files.trusting()):
        eventually(lambda: server.engine.submitted)
    eventually(lambda: server.engine.cancelled)


def test_a_server_with_idle_connections_ends(start_server: Start, files: Files,
                                             caplog: pytest.LogCaptureFixture) -> None:
    """A pool that is not in use does not answer the goodbye of TLS."""
    server = start_server(**files.flags())
    with httpx.Client(verify=files.trusting()) as http:
        http.get(f"{server.url}/health")
        server.server.shut_down()
        assert server.join() == 0
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_keys_over_tls(start_server: Start, files: Files, tmp_path: Path) -> None:
    keys = write(tmp_path, {"keys": ENTRIES})
    server = start_server(api_keys=keys, **files.flags())
    with httpx.Client(base_url=server.url, verify=files.trusting()) as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={"authorization": f"Bearer {ACME}"}).status_code == 200


def test_plain_http_on_a_tls_port_is_closed(start_server: Start, files: Files,
                                            capfd: pytest.CaptureFixture[str]) -> None:
    server = start_server(**files.flags())
    capfd.readouterr()
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https:", "http:") + "/health")
    assert httpx.get(f"{server.url}/health", verify=files.trusting()).status_code == 200
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_versions_are_refused(start_server: Start, files: Files) -> None:
    server = start_server(**files.flags())
    parts = urlsplit(server.url)
    for version, name in ((ssl.TLSVersion.TLSv1_1, None), (ssl.TLSVersion.TLSv1_2, "TLSv1.2"),
                          (ssl.TLSVersion.TLSv1_3, "TLSv1.3")):
        context = files.trusting()
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # else the client does not even offer the old one
        context.minimum_version = context.maximum_version = version
        with socket.create_connection((parts.hostname, parts.port), timeout=10) as sock:
            if name is None:
                with pytest.raises(ssl.SSLError, match=r"EOF|alert protocol version"):  # the server's no
                    context.wrap_socket(sock, server_hostname="127.0.0.1")
                continue
            with context.wrap_socket(sock, server_hostname="127.0.0.1") as encrypted:
                assert encrypted.version() == name


def test_clients_must_show_a_certificate_of_the_given_root(start_server: Start, files: Files) -> None:
    server = start_server(**files.flags(tls_client_ca=files.root))
    assert httpx.get(f"{server.url}/health", verify=files.trusting(files.client)).status_code == 200
    for shown in (None, files.stranger):
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/health", verify=files.trusting(shown))
    assert httpx.get(f"{server.url}/health", verify=files.trusting(files.client)).status_code == 200


def wrong_files(files: Files, folder: Path) -> list[tuple[dict[str, str], str]]:
    """Flags, and what is said about them."""
    (cert, key), none = files.server, str(folder / "none.pem")
    empty, torn, torn_key, locked = (str(folder / f"{name}.pem") for name in ("empty", "torn", "torn_key", "locked"))
    Path(empty).write_text("")
    Path(torn).write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    Path(torn_key).write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    private = serialization.load_pem_private_key(Path(key).read_bytes(), None)
    Path(locked).write_bytes(private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret")))
    return [
        ({"tls_cert": none, "tls_key": key}, f"tls_cert cannot be read: {none}: No such file"),
        ({"tls_cert": cert, "tls_key": none}, f"tls_key cannot be read: {none}: No such file"),
        ({"tls_cert": cert, "tls_key": str(folder)}, "tls_key cannot be read"),
        ({"tls_cert": empty, "tls_key": key}, f"tls_cert must be a PEM file with .*: {empty}"),
        ({"tls_cert": key, "tls_key": cert}, "tls_cert must be a PEM file with"),
        ({"tls_cert": cert, "tls_key": cert}, "tls_key must be a PEM file with"),
        ({"tls_cert": torn, "tls_key": key}, f"tls_cert and tls_key cannot be used: {torn} and "),
        ({"tls_cert": cert, "tls_key": torn_key}, "tls_cert and tls_key cannot be used"),
        ({"tls_cert": cert, "tls_key": files.client[1]}, "tls_key is not the key of tls_cert"),
        ({"tls_cert": cert, "tls_key": locked}, f"tls_key is encrypted.*{locked}"),
        (files.flags(tls_client_ca=none), f"tls_client_ca cannot be read: {none}"),
        (files.flags(tls_client_ca=empty), f"tls_client_ca must be a PEM file with .*: {empty}"),
        (files.flags(tls_client_ca=torn), f"tls_client_ca cannot be used: {torn}")]


def test_files_that_cannot_be_used(files: Files, tmp_path: Path) -> None:
    for flags, words in wrong_files(files, tmp_path):
        with pytest.raises(ConfigError, match=words):
            server_context(ServerConfig(**flags))  # type: ignore[arg-type]
    assert server_context(ServerConfig()) is None


def test_a_wrong_file_is_told_before_a_model_is_loaded(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "needle", "--port", "0", "--tls-cert", files.server[0], "--tls-key", files.client[1]])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "is not the key of" in said and "loading" not in said and said.count("\n") == 1


def test_keys_and_tls_let_the_server_listen_off_loopback(files: Files) -> None:
    config = ServerConfig(host="0.0.0.0", port=0, api_keys="k", **files.flags())  # type: ignore[arg-type]
    with bind_socket(config) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"
