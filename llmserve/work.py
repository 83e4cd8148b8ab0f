"""A model's work: one ASGI app for each of ENDPOINTS."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request

from llmserve.constraints import check_constraints
from llmserve.errors import BodyTooLarge, LLMServeError, RequestError
from llmserve.pool import cut_off
from llmserve.protocol import Endpoint, Ongoing, parse_object, requested_model
from llmserve.sse import EventStream
from llmserve.stream import TokenStream

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from llmserve.pool import Lease
    from llmserve.routes import Services


class Work:
    """Read a body, lease its model, answer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services: Services = scope["app"].state.services
        limit = services.config.server.max_body
        if _length(scope) > limit:
            raise BodyTooLarge(f"The body has {_length(scope)} bytes; server.max_body is {limit}.")
        if self.endpoint.multipart:
            answer = await self._of_form(scope, receive, services)
        else:
            body = parse_object(await _read(receive, limit))
            answer = await self._answer(scope, receive, body, services)
        await answer(scope, receive, send)

    async def _of_form(self, scope: Scope, receive: Receive, services: Services) -> ASGIApp:
        request = Request(scope, _counted(receive, services.config.server.max_body))
        try:
            return await self._answer(scope, receive, await _form(request), services)
        finally:
            await request.close()  # an upload's temporary file

    async def _answer(
        self, scope: Scope, receive: Receive, body: dict[str, Any], services: Services
    ) -> ASGIApp:
        check_constraints(body)
        registry = services.pool.registry
        name = requested_model(body, registry)
        scope["state"]["model"] = registry.find(name).name  # for the metrics, refused or not
        lease = services.pool.lease(name, self.endpoint, body, asyncio.current_task())
        try:
            await services.turns.take()
            answer = lease.running.express(self.endpoint.name, body, name, scope)
            if answer is None:
                request = Request(scope, receive)
                work = lease.running.call(self.endpoint.name, body, name, request)
                answer = await _unless_gone(receive, work)
        except BaseException as error:
            lease.release()
            if lease.was_cut and isinstance(error, asyncio.CancelledError):
                raise cut_off() from None
            raise
        return Leased(answer, lease)


class Leased:
    """Gives its lease back when the work is done, also when no byte was sent."""

    def __init__(self, answer: ASGIApp, lease: Lease) -> None:
        self._answer = answer
        self._lease = lease

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send)
        except asyncio.CancelledError:
            if not self._lease.was_cut:
                raise
            if not scope["state"]["began"]:
                raise cut_off() from None
            await self._end_early(send)
        finally:
            if isinstance(self._answer, Ongoing):
                self._answer.task.add_done_callback(lambda _: self._lease.release())
            else:
                self._lease.release()

    async def _end_early(self, send: Send) -> None:
        if isinstance(self._answer, TokenStream):
            await self._answer.end_early(cut_off())
            return
        last = self._answer.failure(cut_off()) if isinstance(self._answer, EventStream) else b""
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _length(scope: Scope) -> int:
    given = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(given[:20]) if given.isdigit() else 0


async def _read(receive: Receive, limit: int) -> bytes:
    """Raises BodyTooLarge, or ClientDisconnect if it ends before it is whole."""
    parts: list[bytes] = []
    received, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        received += len(parts[-1])
        if received > limit:
            raise _too_large(limit)
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _counted(receive: Receive, limit: int) -> Receive:
    received = 0

    async def counting() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(limit)
        return message

    return counting


def _too_large(limit: int) -> LLMServeError:
    return BodyTooLarge(f"The body is larger than server.max_body, {limit} bytes.")


async def _form(request: Request) -> dict[str, Any]:
    """An upload's fields; a name that ends in [] is a list."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError("Send the audio as multipart/form-data.", param="file")
    form = await request.form()
    return {key: form.getlist(key) if key.endswith("[]") else form[key] for key in form}


async def _unless_gone(receive: Receive, work: Awaitable[ASGIApp]) -> ASGIApp:
    """Do `work`, but stop it when the client leaves.

    Starlette watches for that in streams only; a plain answer can take as long.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
