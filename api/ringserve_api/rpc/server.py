"""RpcServer: the gRPC side of a server: what listens, on which ports, with which services."""

from collections.abc import Callable

from ringserve.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from ringserve_api.config import ServerConfig
from ringserve_api.rpc.control import Control
from ringserve_api.rpc.inference import Inference
from ringserve_api.rpc.listener import RpcListener
from ringserve_api.rpc.sessions import Sessions
from ringserve_api.state import ServerState

LOOPBACK = "127.0.0.1"


class RpcServer:
    """Both listeners are optional; without ports there is nothing here."""

    def __init__(self, config: ServerConfig) -> None:
        self._public = None if config.grpc_port is None else RpcListener(config.host, config.grpc_port, config)
        self._admin = None if config.grpc_admin_port is None else RpcListener(
            LOOPBACK, config.grpc_admin_port, config)
        self.sessions: Sessions | None = None

    @property
    def _listeners(self) -> list[RpcListener]:
        return [listener for listener in (self._public, self._admin) if listener is not None]

    @property
    def target(self) -> str:
        """Where clients connect to."""
        assert self._public is not None
        return self._public.target

    @property
    def admin_target(self) -> str:
        assert self._admin is not None
        return self._admin.target

    def bind(self) -> None:
        """Raises ListenError."""
        for listener in self._listeners:
            listener.bind()

    async def start(self, state: ServerState, drain: Callable[[], None]) -> list[str]:
        """Returns a line for each listener: what it is, and where."""
        sessions = self.sessions = Sessions(state)
        lines = []
        if self._public is not None:
            service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
            await self._public.start([(service, lambda server: (
                inference_pb2_grpc.add_InferenceServiceServicer_to_server(Inference(state, sessions), server)))])
            lines.append(f"gRPC on {self._public.target}")
        if self._admin is not None:
            service = control_pb2.DESCRIPTOR.services_by_name["ControlService"].full_name
            await self._admin.start([(service, lambda server: (
                control_pb2_grpc.add_ControlServiceServicer_to_server(Control(state, sessions, drain), server)))])
            lines.append(f"gRPC for operators on {self._admin.target}")
        return lines

    async def drain(self) -> None:
        for listener in self._listeners:
            await listener.drain()

    async def stop(self, *, abort: bool) -> None:
        for listener in self._listeners:
            await listener.stop(abort=abort)
        if self.sessions is not None:
            await self.sessions.close()
