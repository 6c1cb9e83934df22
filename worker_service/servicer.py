"""Wire in, one call, wire out."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from shardlane.pb import worker_pb2
from worker_service.inbox import Inbox, Request


class WorkerServicer:
    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def Transfer(self, requests: Iterator[Request], context: grpc.ServicerContext) -> worker_pb2.TransferResponse:
        self._inbox.receive(requests, context.is_active)
        return worker_pb2.TransferResponse()
