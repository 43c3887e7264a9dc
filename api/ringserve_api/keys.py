"""API keys: the file that lists them by digest, and whose a secret is.

The file is JSON; `ringserve key NAME` prints an entry. Only digests are stored, so that whoever reads the file cannot
use a key. A plain SHA-256 is enough for that: a secret is 256 random bits, not a password that could be guessed.

    {"keys": [{"name": "ops", "sha256": "<64 hex digits>", "tenant": "acme", "scopes": ["inference", "admin"]}]}

`tenant` is the name where it is not given, `scopes` are `["inference"]`.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from ringserve.errors import ConfigError
from ringserve.scheduling_params import MAX_NAME

Scope = Literal["inference", "admin"]
"""What a key opens: `inference` the routes that use the model, `admin` what controls the server."""

USUAL_SCOPES: frozenset[Scope] = frozenset({"inference"})

_Name = Annotated[str, msgspec.Meta(pattern=rf"\A[!-~]{{1,{MAX_NAME}}}\Z")]
_Digest = Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-Fa-f]{64}\Z")]


class _Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: _Name
    sha256: _Digest
    tenant: _Name = ""
    scopes: Annotated[frozenset[Scope], msgspec.Meta(min_length=1)] = USUAL_SCOPES


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    keys: Annotated[list[_Entry], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class Key:
    name: str
    tenant: str
    """Whose requests they are that come with this key."""
    scopes: frozenset[Scope]


class KeyTable:
    """All keys of a server. It holds digests; a secret passes through `find` and is not kept."""

    def __init__(self, keys: list[tuple[bytes, Key]]) -> None:
        self._keys = keys

    @classmethod
    def read(cls, path: str | Path) -> "KeyTable":
        """Raises ConfigError, which names the file and the entry."""
        try:
            entries = msgspec.json.decode(Path(path).read_bytes(), type=_File).keys
        except OSError as error:
            raise ConfigError(f"the keys in {path} cannot be read: {error.strerror or error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"the keys in {path} cannot be used: {error}") from None
        names: dict[str, int] = {}
        digests: dict[bytes, int] = {}
        keys: list[tuple[bytes, Key]] = []
        for index, entry in enumerate(entries):
            digest = bytes.fromhex(entry.sha256)
            if (other := names.setdefault(entry.name, index)) != index:
                raise ConfigError(f"the keys in {path} cannot be used: keys[{index}] has the name of keys[{other}], "
                                  f"{entry.name!r}")
            if (other := digests.setdefault(digest, index)) != index:
                raise ConfigError(f"the keys in {path} cannot be used: keys[{index}] ({entry.name!r}) has the sha256 "
                                  f"of keys[{other}] ({entries[other].name!r})")
            keys.append((digest, Key(entry.name, entry.tenant or entry.name, entry.scopes)))
        return cls(keys)

    def find(self, secret: str | None) -> Key | None:
        """Whose secret it is. Compares with every key, so that the time tells nothing about any of them."""
        if not secret:  # an entry with the digest of nothing would else open to everybody
            return None
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        found: Key | None = None
        for known, key in self._keys:
            if hmac.compare_digest(known, digest):
                found = key
        return found


def bearer(header_value: str | None) -> str | None:
    """The secret in the value of an `Authorization` header; None where it holds none of this kind."""
    scheme, _, secret = (header_value or "").strip().partition(" ")
    return secret.strip() or None if scheme.lower() == "bearer" else None


def new_key(name: str, tenant: str | None, scopes: frozenset[Scope]) -> tuple[str, str]:
    """A random secret, and the JSON of its entry for the file. Raises ConfigError when the file would be refused."""
    secret = f"rs-{secrets.token_urlsafe(32)}"
    entry = {"name": name, "sha256": hashlib.sha256(secret.encode()).hexdigest(),
             "tenant": name if tenant is None else tenant, "scopes": sorted(scopes)}
    try:
        msgspec.convert(entry, _Entry)
    except msgspec.ValidationError as error:
        raise ConfigError(f"no key can be made of this: {error}") from None
    return secret, msgspec.json.encode(entry).decode()
