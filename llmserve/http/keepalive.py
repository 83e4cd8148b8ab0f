"""Comments to a client whose request is queued: its event stream begins before the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from llmserve.api import endpoints, sse

if TYPE_CHECKING:
    from starlette.types import Message, Send

    from llmserve.api.endpoint_id import EndpointId
    from llmserve.errors import LLMServeError


class KeepAliveSend:
    """`send` for an answer whose stream a comment may have begun.

    An error response becomes the last event of that stream.
    """

    def __init__(self, send: Send, endpoint: EndpointId) -> None:
        self.began = False  # by a comment
        self.answered = False
        self._send = send
        self._endpoint = endpoint
        self._is_error = False

    async def comment(self, text: str) -> None:
        """Send a comment: proxies keep the connection, and clients ignore it."""
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
            self._is_error = message["status"] != 200
        elif self._is_error:
            body = endpoints.last_event(self._endpoint, orjson.loads(message["body"]))
            await self._send({**message, "body": body})
        else:
            await self._send(message)

    async def fail(self, error: LLMServeError) -> None:
        body = endpoints.failure(self._endpoint, error)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})
