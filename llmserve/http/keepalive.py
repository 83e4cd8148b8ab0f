"""The way to a client while its request waits: an event stream can begin before its answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from llmserve.api import endpoints, sse

if TYPE_CHECKING:
    from starlette.types import Message, Send

    from llmserve.api.endpoint_id import EndpointId
    from llmserve.errors import LLMServeError


class KeepAliveSend:
    """`send` for an answer that goes on with what may have begun.

    One that is a refusal becomes the stream's last event.
    """

    def __init__(self, send: Send, endpoint: EndpointId) -> None:
        self.began = False  # by a comment
        self.answered = False
        self._send = send
        self._endpoint = endpoint
        self._refused = False

    async def comment(self, text: str) -> None:
        """Clients of event streams do not see it; proxies and sockets stay open."""
        if not self.began:
            self.began = True
            await self._send({"type": "http.response.start", "status": 200, "headers": sse.HEADERS})
        body = f": {text}\n\n".encode()
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def __call__(self, message: Message) -> None:
        self.answered = True
        if not self.began:
            await self._send(message)
        elif message["type"] == "http.response.start":
            self._refused = message["status"] != 200
        elif self._refused:
            body = endpoints.last_event(self._endpoint, orjson.loads(message["body"]))
            await self._send({**message, "body": body})
        else:
            await self._send(message)

    async def fail(self, error: LLMServeError) -> None:
        body = endpoints.failure(self._endpoint, error)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
