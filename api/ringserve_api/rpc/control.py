"""Control: the ControlService, for operators."""

import time
from collections.abc import Callable

from ringserve.v1 import control_pb2 as pb
from ringserve.v1 import control_pb2_grpc
from ringserve_api.errors import ApiError
from ringserve_api.rpc.callers import Context, tenant_of_call
from ringserve_api.rpc.inference import answered
from ringserve_api.rpc.session import Session
from ringserve_api.rpc.sessions import Sessions
from ringserve_api.state import ServerState

_PHASES = {"upload": pb.REQUEST_PHASE_UPLOAD, "prefill": pb.REQUEST_PHASE_PREFILL, "decode": pb.REQUEST_PHASE_DECODE,
           "finished": pb.REQUEST_PHASE_FINISHED}


class Control(control_pb2_grpc.ControlServiceServicer):
    def __init__(self, state: ServerState, sessions: Sessions, drain: Callable[[], None]) -> None:
        self._state, self._sessions, self._drain = state, sessions, drain
        self._began = time.monotonic()

    @answered
    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.GetStatusResponse:
        tenant_of_call(self._state, context, "admin")
        model = self._state.model
        return pb.GetStatusResponse(
            model=model.model_name, version=model.version, ring_size=model.ring_size,
            open_requests=self._state.open_requests, draining=self._state.draining,
            uptime_ms=int(1000 * (time.monotonic() - self._began)))

    @answered
    async def ListRequests(self, request: pb.ListRequestsRequest, context: Context) -> pb.ListRequestsResponse:
        tenant_of_call(self._state, context, "admin")
        return pb.ListRequestsResponse(requests=[_summary(session) for session in self._sessions])

    @answered
    async def CancelRequest(self, request: pb.CancelRequestRequest, context: Context) -> pb.CancelRequestResponse:
        tenant_of_call(self._state, context, "admin")
        found = [session for session in self._sessions if session.request_id == request.request_id]
        if not found:
            raise ApiError("not_found", f"there is no request {request.request_id[:128]!r}", "request_id")
        for session in found:
            session.forget()
        return pb.CancelRequestResponse()

    @answered
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainResponse:
        tenant_of_call(self._state, context, "admin")
        self._drain()
        return pb.DrainResponse(open_requests=self._state.open_requests)


def _summary(session: Session) -> pb.RequestSummary:
    return pb.RequestSummary(
        request_id=session.request_id, tenant=session.tenant, phase=_PHASES[session.phase],
        received_bytes=session.upload.received if session.upload is not None else 0,
        output_tokens=session.output_tokens, age_ms=int(1000 * (time.monotonic() - session.began)),
        attached=session.is_attached)
