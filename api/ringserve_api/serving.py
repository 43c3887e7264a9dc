"""`ringserve serve`: bind, start the engine, say what was decided, serve."""

import sys

from ringserve.async_engine import AsyncEngine
from ringserve.config import EngineConfig
from ringserve_api.config import ServerConfig
from ringserve_api.server import Server, bind_socket


async def serve_model(config: EngineConfig, server: ServerConfig) -> int:
    """Returns the exit code. Raises StartupError, a taken port included, before a model is loaded for nothing."""
    listener = bind_socket(server)
    try:
        print("ringserve is loading the model", file=sys.stderr, flush=True)
        engine = await AsyncEngine.start(config)
    except BaseException:
        listener.close()
        raise
    for line in engine.info.decisions:
        print(f"  {line}", file=sys.stderr)
    return await Server(engine, engine.tokenizer, server, listener=listener).serve()
