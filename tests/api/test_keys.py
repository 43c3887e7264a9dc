"""API keys: their file, whose a secret is, and what each route wants of a request."""

import asyncio
import hashlib
import hmac
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from ringserve_api.access import authorize
from ringserve_api.cli import main
from ringserve_api.config import ServerConfig
from ringserve_api.errors import ApiError, wire_error
from ringserve_api.keys import Key, KeyTable, bearer
from ringserve_api.server import bind_socket, run_server

from ringserve.errors import ConfigError
from tests.api.conftest import RunningServer
from tests.api.fakes import ByteTokenizer, FakeEngine
from tests.api.test_http import check_error
from tests.api.test_tenants import BODIES

ACME, OPS, BOTH = "rs-secret-of-acme", "rs-secret-of-ops", "rs-secret-of-both"


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


ENTRIES: list[dict[str, object]] = [
    {"name": "acme-1", "sha256": digest(ACME), "tenant": "acme"},
    {"name": "ops", "sha256": digest(OPS).upper(), "scopes": ["admin"]},
    {"name": "both", "sha256": digest(BOTH), "scopes": ["inference", "admin"]}]


def write(folder: Path, content: object) -> str:
    path = folder / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    return write(tmp_path, {"keys": ENTRIES})


@pytest.fixture
def table(keys_file: str) -> KeyTable:
    return KeyTable.read(keys_file)


@pytest.fixture
def guarded(start_server: Callable[..., RunningServer], keys_file: str) -> Iterator[RunningServer]:
    yield start_server(api_keys=keys_file)


def with_key(value: str | None) -> dict[str, str]:
    return {} if value is None else {"authorization": value}


def test_whose_a_secret_is(table: KeyTable) -> None:
    assert table.find(ACME) == Key("acme-1", "acme", frozenset({"inference"}))
    assert table.find(OPS) == Key("ops", "ops", frozenset({"admin"}))
    assert table.find(BOTH) == Key("both", "both", frozenset({"inference", "admin"}))
    for unknown in (None, "", ACME[:-1], ACME + "x", ACME.upper(), digest(ACME), "\udc80", "é"):
        assert table.find(unknown) is None


@pytest.mark.parametrize("secret", [ACME, OPS, BOTH, "unknown"])
def test_every_key_is_compared(table: KeyTable, monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    compared: list[bytes] = []
    compare = hmac.compare_digest

    def counted(known: bytes, given: bytes) -> bool:
        compared.append(known)
        assert given == hashlib.sha256(secret.encode()).digest()
        return compare(known, given)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    table.find(secret)
    assert [known.hex() for known in compared] == [str(entry["sha256"]).lower() for entry in ENTRIES]


def test_an_empty_secret_opens_nothing(tmp_path: Path) -> None:
    table = KeyTable.read(write(tmp_path, {"keys": [{"name": "empty", "sha256": digest("")}]}))
    assert table.find("") is None and table.find(None) is None


@pytest.mark.parametrize("value, secret", [
    (None, None), ("", None), ("Bearer", None), ("Bearer ", None), ("Basic abc", None), ("abc", None),
    ("BearerX abc", None), ("Bearer abc", "abc"), ("bearer abc", "abc"), ("BEARER   abc ", "abc"),
    ("Bearer a b", "a b")])
def test_the_secret_in_a_header(value: str | None, secret: str | None) -> None:
    assert bearer(value) == secret


def test_scopes(table: KeyTable) -> None:
    assert authorize(None, None, "admin") is None
    for secret, scope in ((ACME, "inference"), (OPS, "admin"), (BOTH, "inference"), (BOTH, "admin")):
        assert authorize(table, secret, scope) == table.find(secret)  # type: ignore[arg-type]
    for secret, scope in ((ACME, "admin"), (OPS, "inference")):
        with pytest.raises(ApiError, match=f"lacks the scope '{scope}'") as refused:
            authorize(table, secret, scope)  # type: ignore[arg-type]
        assert refused.value.code == "model_not_allowed" and secret not in refused.value.message
    for nobody in (None, "", "rs-unknown"):
        with pytest.raises(ApiError) as refused:
            authorize(table, nobody, "inference")
        assert wire_error(refused.value).row.grpc == "UNAUTHENTICATED" and "rs-unknown" not in refused.value.message


ONE = {"name": "a", "sha256": "0" * 64}


@pytest.mark.parametrize("content, words", [
    ("", "truncated"), ("{", "truncated"), ("[]", "Expected `object`"), ({}, "`keys`"), ({"keys": []}, "length >= 1"),
    ({"keys": [ONE], "more": 1}, "unknown field `more`"),
    ({"keys": [{**ONE, "secret": "s"}]}, "unknown field `secret`"),
    ({"keys": [ONE, {"name": "b"}]}, "`sha256` - at `$.keys[1]`"), ({"keys": [{"sha256": "0" * 64}]}, "`name`"),
    ({"keys": [{**ONE, "name": ""}]}, "$.keys[0].name"), ({"keys": [{**ONE, "name": "a b"}]}, "$.keys[0].name"),
    ({"keys": [{**ONE, "name": "x" * 257}]}, "$.keys[0].name"), ({"keys": [{**ONE, "name": 7}]}, "$.keys[0].name"),
    ({"keys": [{**ONE, "tenant": ""}]}, "$.keys[0].tenant"), ({"keys": [{**ONE, "tenant": None}]}, "$.keys[0].tenant"),
    ({"keys": [{**ONE, "tenant": "x\n"}]}, "$.keys[0].tenant"),
    ({"keys": [{**ONE, "sha256": "0" * 63}]}, "$.keys[0].sha256"),
    ({"keys": [{**ONE, "sha256": "0" * 64 + "\n"}]}, "$.keys[0].sha256"),
    ({"keys": [{**ONE, "sha256": "rs-by-mistake"}]}, "$.keys[0].sha256"),
    ({"keys": [{**ONE, "scopes": []}]}, "$.keys[0].scopes"),
    ({"keys": [{**ONE, "scopes": "admin"}]}, "$.keys[0].scopes"),
    ({"keys": [{**ONE, "scopes": ["root"]}]}, "$.keys[0].scopes"),
    ({"keys": [ONE, {"name": "a", "sha256": "1" * 64}]}, "keys[1] has the name of keys[0], 'a'"),
    ({"keys": [{**ONE, "sha256": "aA" * 32}, {"name": "b", "sha256": "Aa" * 32}]},
     "keys[1] ('b') has the sha256 of keys[0] ('a')")], ids=str)
def test_files_that_cannot_be_used(tmp_path: Path, content: object, words: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=re.escape(f"the keys in {path} cannot be used: ")) as refused:
        KeyTable.read(path)
    assert words in refused.value.message and "by-mistake" not in refused.value.message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"the keys in {path} cannot be read: {words}"):
            KeyTable.read(path)
    (tmp_path / "bytes").write_bytes(b'{"keys": [{"name": "\xff"}]}')
    with pytest.raises(ConfigError, match="cannot be used"):
        KeyTable.read(tmp_path / "bytes")


def requests_of(server: RunningServer) -> list[tuple[str, str]]:
    """Method and path of everything the server answers, read from the application itself."""
    app = server.server._http.config.app
    assert isinstance(app, FastAPI)
    found = []
    for route in app.routes:
        assert isinstance(route, APIRoute), f"{route} does not pass through the guard"
        found += [(method, re.sub(r"\{.*?\}", "needle", route.path)) for method in route.methods]
    return found


def test_every_route_but_the_probes_wants_a_key(guarded: RunningServer) -> None:
    probes = {"/health", "/livez", "/readyz", "/version"}
    seen = set()
    with httpx.Client(base_url=guarded.url) as http:
        for method, path in requests_of(guarded):
            seen.add(path)
            response = http.request(method, path)
            if path in probes:
                assert response.status_code == 200
                continue
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.headers["x-should-retry"] == "false"
            if method != "HEAD":
                assert check_error(response, 401, "invalid_api_key")["type"] == "authentication_error"
    assert seen >= probes | BODIES.keys() | {"/v1/models", "/v1/models/needle"}
    assert guarded.engine.asked == []


@pytest.mark.parametrize("value", [
    None, "", "Bearer", "Bearer rs-nobodys-secret", f"Basic {ACME}", ACME, f"Bearer {ACME}x", f"Bearer {ACME} {ACME}"])
def test_without_a_known_key_nothing_is_done(guarded: RunningServer, caplog: pytest.LogCaptureFixture,
                                             value: str | None) -> None:
    caplog.set_level(logging.DEBUG)
    for path, body in BODIES.items():
        response = httpx.post(guarded.url + path, json=body, headers=with_key(value))
        check_error(response, 401, "invalid_api_key")
        assert "nobodys-secret" not in response.text and ACME not in response.text
    assert guarded.engine.asked == []
    server_side = "".join(record.getMessage() for record in caplog.records if not record.name.startswith("http"))
    assert "nobodys-secret" not in server_side and ACME not in server_side


def test_two_keys_are_nobodys(guarded: RunningServer) -> None:
    headers = [("authorization", f"Bearer {ACME}"), ("authorization", f"Bearer {BOTH}")]
    check_error(httpx.get(f"{guarded.url}/v1/models", headers=headers), 401, "invalid_api_key")


def test_the_key_is_wanted_before_the_body(guarded: RunningServer) -> None:
    response = httpx.post(f"{guarded.url}/v1/completions", content=b"no json", headers={"content-type": "text/plain"})
    check_error(response, 401, "invalid_api_key")


def test_a_key_without_the_scope_is_forbidden(guarded: RunningServer) -> None:
    for path, body in BODIES.items():
        response = httpx.post(guarded.url + path, json=body, headers=with_key(f"Bearer {OPS}"))
        error = check_error(response, 403, "model_not_allowed")
        assert error["type"] == "permission_error" and "www-authenticate" not in response.headers
    assert guarded.engine.asked == []


def test_the_tenant_is_that_of_the_key(guarded: RunningServer) -> None:
    for path, body in BODIES.items():
        for value, tenant in ((f"Bearer {ACME}", "acme"), (f"bearer {BOTH}", "both")):
            for pad in (0, 100_000):  # here, and in the prompt worker
                response = httpx.post(guarded.url + path, json={**body, "user": "x" * pad}, timeout=20,
                                      headers={**with_key(value), "x-tenant": "other"})
                assert response.status_code == 200, response.text
                assert guarded.engine.scheduled[-1].tenant == tenant


def test_the_openai_client(guarded: RunningServer) -> None:
    for api_key, known in ((ACME, True), ("sk-none", False)):
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=api_key, max_retries=2, timeout=20) as client:
            if known:
                assert client.models.list().data[0].id == "needle"
                continue
            with pytest.raises(openai.AuthenticationError) as refused:
                client.models.list()
            assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize("flags, key", [
    ([], Key("new", "new", frozenset({"inference"}))),
    (["--tenant", "acme", "--scopes", "admin", "inference"], Key("new", "acme", frozenset({"inference", "admin"})))])
def test_a_new_key_opens_with_its_entry(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str],
                                        key: Key) -> None:
    secrets = []
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["key", "new", *flags])
        assert ended.value.code == 0
        said = capsys.readouterr()
        secret = said.err.split()[-1]
        assert re.fullmatch(r"rs-[A-Za-z0-9_-]{43}", secret) and said.err.count(secret) == 1
        assert secret not in said.out
        assert KeyTable.read(write(tmp_path, f'{{"keys": [{said.out}]}}')).find(secret) == key
        secrets.append(secret)
    assert secrets[0] != secrets[1]


@pytest.mark.parametrize("flags", [
    ["a b"], [""], ["ok", "--tenant", ""], ["ok", "--tenant", "x\n"], ["ok", "--scopes"]])
def test_a_key_that_the_file_would_refuse_is_not_made(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["key", *flags])
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and "rs-" not in said.err and "no key can be made" in said.err


def test_a_file_that_went_bad_while_the_model_was_loaded(tmp_path: Path) -> None:
    engine, config = FakeEngine(), ServerConfig(port=0, api_keys=str(tmp_path / "none"))
    listener = bind_socket(config)
    with pytest.raises(ConfigError, match="none cannot be read"):
        asyncio.run(run_server(engine, ByteTokenizer(), config, listener=listener))
    assert engine.closed and listener.fileno() == -1


def test_a_wrong_file_is_told_before_a_model_is_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "needle", "--port", "0", "--api-keys", str(tmp_path / "none")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "none cannot be read" in said and "loading" not in said and said.count("\n") == 1
