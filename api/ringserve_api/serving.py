"""`ringserve serve`: read keys and certificates, bind, start the engine, say what was decided, serve."""

from ringserve.async_engine import AsyncEngine, resolve_model
from ringserve.config import EngineConfig
from ringserve_api.access import read_keys
from ringserve_api.config import ServerConfig
from ringserve_api.rpc.server import RpcServer
from ringserve_api.server import Server, bind_socket, say
from ringserve_api.tls import server_context


async def serve_model(config: EngineConfig, server: ServerConfig) -> int:
    """Returns the exit code.

    Raises StartupError, a taken port or a wrong certificate included, before a model is loaded for nothing.
    """
    # The server reads these files itself when it starts; what is wrong with them is told now.
    read_keys(server)
    server_context(server)
    listener = bind_socket(server)
    rpc = RpcServer(server)
    try:
        rpc.bind()
        resolve_model(config.model.model)
        say("ringserve is loading the model")
        engine = await AsyncEngine.start(config)
    except BaseException:
        listener.close()
        raise
    for line in engine.info.decisions:
        say(f"  {line}")
    code = await Server(engine, engine.tokenizer, server, listener=listener, rpc=rpc).serve()
    say("ringserve has ended")
    return code
