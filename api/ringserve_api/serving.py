"""`ringserve serve`: bind, start the engine, say what was decided, serve."""

from ringserve.async_engine import AsyncEngine, resolve_model
from ringserve.config import EngineConfig
from ringserve_api.config import ServerConfig
from ringserve_api.server import Server, bind_socket, say


async def serve_model(config: EngineConfig, server: ServerConfig) -> int:
    """Returns the exit code. Raises StartupError, a taken port included, before a model is loaded for nothing."""
    listener = bind_socket(server)
    try:
        resolve_model(config.model.model)
        say("ringserve is loading the model")
        engine = await AsyncEngine.start(config)
    except BaseException:
        listener.close()
        raise
    for line in engine.info.decisions:
        say(f"  {line}")
    code = await Server(engine, engine.tokenizer, server, listener=listener).serve()
    say("ringserve has ended")
    return code
