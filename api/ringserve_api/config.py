"""ServerConfig: how the server listens, whom it lets in and what it limits."""

import ipaddress
import re
from dataclasses import dataclass

from ringserve.errors import ConfigError

HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
"""RFC 9110, 5.6.2: a token."""


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


def is_loopback(host: str) -> bool:
    """Whether `host` is `localhost` or an address that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback needs keys and TLS, or `insecure`."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    grpc_port: int | None = None
    """Port for gRPC, on the same host; 0 takes a free one. Unset: no gRPC."""

    grpc_admin_port: int | None = None
    """Port of the admin listener, on loopback only; 0 takes a free one. Unset: none."""

    served_model_name: str | None = None
    """Name under which clients ask for the model. Unset: the engine's name for it."""

    api_keys: str | None = None
    """JSON file with the digests of API keys; `ringserve key` prints an entry. Unset: whoever reaches the port may use
    it."""

    tls_cert: str | None = None
    """PEM file with the server's certificate and those between it and its root; needs `tls_key`."""

    tls_key: str | None = None
    """PEM file with the private key of `tls_cert`, not encrypted."""

    tls_client_ca: str | None = None
    """PEM file with root certificates: a client must show a certificate signed by one of them. Needs `tls_cert`."""

    insecure: bool = False
    """Allow to listen off loopback without keys or without TLS."""

    tenant_header: str | None = None
    """Name of a request header, set by a trusted proxy, that says whose request it is. Unset: all requests are one
    tenant's. Not together with `api_keys`, which say it themselves."""

    keep_alive_s: float = 10.0
    """Seconds of silence in a stream after which a `: keep-alive` comment is sent."""

    max_body_mib: int = 64
    """Largest request body in MiB."""

    max_bodies_mib: int = 512
    """MiB of request bodies in flight over all connections; more are refused."""

    body_idle_timeout_s: float = 30.0
    """Seconds without a byte after which an unfinished request body is given up."""

    inline_body_kib: int = 64
    """Larger bodies are parsed and tokenized in another process, so that the server stays responsive."""

    prompt_timeout_s: float = 300.0
    """Seconds that this process may work on one body."""

    drain_timeout_s: float = 30.0
    """Seconds that open requests may go on after SIGINT or SIGTERM."""

    access_log: bool = False
    """Log each HTTP request."""

    def __post_init__(self) -> None:
        _require(bool(self.host), "host must be an address, got an empty name")
        for needs, needed in (("tls_cert", "tls_key"), ("tls_key", "tls_cert"), ("tls_client_ca", "tls_cert")):
            _require(getattr(self, needs) is None or getattr(self, needed) is not None,
                     f"{needs} needs {needed}, got {getattr(self, needs)!r} without it")
        self.require_safe(self.host)
        self._check_ports()
        _require(self.served_model_name != "", "served_model_name must not be empty")
        _require(self.tenant_header is None or HEADER_NAME.fullmatch(self.tenant_header) is not None,
                 f"tenant_header must be the name of a header, got {self.tenant_header!r}")
        _require(self.tenant_header is None or self.api_keys is None,
                 f"tenant_header and api_keys both say whose a request is, got {self.tenant_header!r} and "
                 f"{self.api_keys!r}: pass one of them")
        for name in ("keep_alive_s", "body_idle_timeout_s", "prompt_timeout_s"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("drain_timeout_s", "inline_body_kib"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(1 <= self.max_body_mib <= 1024,
                 f"max_body_mib must be in 1 to 1024, got {self.max_body_mib}")
        _require(self.max_bodies_mib >= self.max_body_mib,
                 f"max_bodies_mib must be at least max_body_mib, got {self.max_bodies_mib} and "
                 f"{self.max_body_mib}")

    def require_safe(self, address: str) -> None:
        """Raise ConfigError when other machines reach `address`, which `host` is here, and may not."""
        has = {"keys": self.api_keys is not None, "TLS": self.tls_cert is not None}
        if self.insecure or all(has.values()) or is_loopback(address):
            return
        lacks = " and ".join(f"no {name}" for name, there in has.items() if not there)
        host = repr(self.host) if address == self.host else f"{self.host!r}, which is {address} here"
        raise ConfigError(f"other machines reach host {host}, and this server has {lacks}: pass --api-keys, --tls-cert "
                          "and --tls-key, listen on 127.0.0.1, or pass --insecure")

    def _check_ports(self) -> None:
        taken: dict[int, str] = {}
        for name in ("port", "grpc_port", "grpc_admin_port"):
            port: int | None = getattr(self, name)
            if port is None:
                continue
            _require(0 <= port < 65536, f"{name} must be in 0 to 65535, got {port}")
            _require(port == 0 or port not in taken, f"{name} must not be that of {taken.get(port)}, got {port}")
            taken[port] = name
