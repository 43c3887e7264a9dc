"""ServerConfig: how the HTTP server listens and what it limits."""

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
    """Address to listen on. Anything but loopback needs `insecure`."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    served_model_name: str | None = None
    """Name under which clients ask for the model. Unset: the engine's name for it."""

    insecure: bool = False
    """Allow to listen off loopback without keys and without TLS."""

    tenant_header: str | None = None
    """Name of a request header, set by a trusted proxy, that says whose request it is. Unset: all requests are one
    tenant's."""

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
        _require(self.insecure or is_loopback(self.host),
                 f"other machines reach host {self.host!r}, and this server has neither keys nor TLS: "
                 "listen on 127.0.0.1, or pass --insecure")
        _require(0 <= self.port < 65536, f"port must be in 0 to 65535, got {self.port}")
        _require(self.served_model_name != "", "served_model_name must not be empty")
        _require(self.tenant_header is None or HEADER_NAME.fullmatch(self.tenant_header) is not None,
                 f"tenant_header must be the name of a header, got {self.tenant_header!r}")
        for name in ("keep_alive_s", "body_idle_timeout_s", "prompt_timeout_s"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("drain_timeout_s", "inline_body_kib"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(1 <= self.max_body_mib <= 1024,
                 f"max_body_mib must be in 1 to 1024, got {self.max_body_mib}")
        _require(self.max_bodies_mib >= self.max_body_mib,
                 f"max_bodies_mib must be at least max_body_mib, got {self.max_bodies_mib} and "
                 f"{self.max_body_mib}")
