"""TLS of the HTTP listener: from PEM files to the context that the sockets use.

The context is made here and not by uvicorn: for a minimum version, and because OpenSSL asks at the terminal for the
passphrase of an encrypted key, where nobody may be sitting.
"""

import ssl
from pathlib import Path

from ringserve.errors import ConfigError
from ringserve_api.config import ServerConfig


def server_context(config: ServerConfig) -> ssl.SSLContext | None:
    """None without `tls_cert`. Raises ConfigError when one of the files cannot be used."""
    if config.tls_cert is None or config.tls_key is None:
        return None
    _look_for("-----BEGIN CERTIFICATE-----", "tls_cert", config.tls_cert)
    _look_for("PRIVATE KEY-----", "tls_key", config.tls_key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2

    def passphrase() -> str:
        raise ConfigError(f"tls_key is encrypted, and there is nobody to ask for its passphrase: {config.tls_key}")

    try:
        context.load_cert_chain(config.tls_cert, config.tls_key, passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"tls_key is not the key of tls_cert: {config.tls_key} and {config.tls_cert}") from None
        raise ConfigError(f"tls_cert and tls_key cannot be used: {config.tls_cert} and {config.tls_key}: "
                          f"{_reason(error)}") from None
    if config.tls_client_ca is not None:
        _look_for("-----BEGIN CERTIFICATE-----", "tls_client_ca", config.tls_client_ca)
        try:
            context.load_verify_locations(config.tls_client_ca)
        except ssl.SSLError as error:
            raise ConfigError(f"tls_client_ca cannot be used: {config.tls_client_ca}: {_reason(error)}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _look_for(mark: str, name: str, path: str) -> None:
    """OpenSSL does not say which of its files is missing or is no PEM."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {path}: {error.strerror or error}") from None
    if mark.encode() not in text:
        raise ConfigError(f"{name} must be a PEM file with `{mark}` in it: {path}")


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "not valid PEM").replace("_", " ").lower()
