"""Who calls: the key and the tenant, from a call's metadata."""

from typing import Any

import grpc

from ringserve_api.access import authorize
from ringserve_api.generate import tenant_among
from ringserve_api.keys import Scope, bearer
from ringserve_api.state import ServerState

Context = grpc.aio.ServicerContext[Any, Any]


def tenant_of_call(state: ServerState, context: Context, scope: Scope = "inference") -> str:
    """Whose request it is. Raises ApiError for a caller who may not, InvalidValueError when it cannot be told."""
    metadata = context.invocation_metadata() or ()
    given = [str(value) for name, value in metadata if name == "authorization"]
    key = authorize(state.keys, bearer(given[0]) if len(given) == 1 else None, scope)
    if key is not None:
        return key.tenant
    name = state.config.tenant_header
    return tenant_among([str(v) for n, v in metadata if name is not None and n == name.lower()], name)
