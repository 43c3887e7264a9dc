"""Who may do what: the one decision over keys and scopes, for HTTP and gRPC alike."""

from ringserve_api.config import ServerConfig
from ringserve_api.errors import ApiError
from ringserve_api.keys import Key, KeyTable, Scope


def read_keys(config: ServerConfig) -> KeyTable | None:
    """None where the server has no keys; raises ConfigError when their file cannot be used."""
    return KeyTable.read(config.api_keys) if config.api_keys is not None else None


def authorize(keys: KeyTable | None, secret: str | None, scope: Scope) -> Key | None:
    """Whose request it is; None where there are no keys, and everybody may do everything.

    Raises ApiError: `invalid_api_key` without a known secret, `model_not_allowed` when its key lacks the scope.
    """
    if keys is None:
        return None
    if secret is None:
        raise ApiError("invalid_api_key", "this server wants an API key: send one `authorization` header, "
                                          "`Bearer` and the key")
    key = keys.find(secret)
    if key is None:
        raise ApiError("invalid_api_key", "this API key is not one of this server's")
    if scope not in key.scopes:
        raise ApiError("model_not_allowed", f"the API key {key.name!r} may not do this: it lacks the scope {scope!r}")
    return key
