"""A model's work: one ASGI app for each of ENDPOINTS."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request

from llmserve.api.context import RequestContext
from llmserve.api.endpoints import BackgroundAnswer, Endpoint
from llmserve.api.sse import EventStream
from llmserve.api.token_stream import TokenStream
from llmserve.api.validation_errors import name_as_sent
from llmserve.errors import EngineDead, LLMServeError, RequestError, quoted
from llmserve.http.body import form_fields, form_of, json_object
from llmserve.http.keepalive import KeepAliveSend
from llmserve.http.models import requested_model
from llmserve.lifecycle.admission import Deadline, QueuedRequest
from llmserve.lifecycle.lease import ModelRequest

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from starlette.types import ASGIApp, Receive, Scope, Send

    from llmserve.http.services import Services
    from llmserve.lifecycle.lease import Lease
    from llmserve.lifecycle.served_model import ServedModel

_TIMEOUT = b"x-request-timeout"


class InferenceEndpoint:
    """Read a body, lease its model, answer."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        services: Services = scope["app"].state.services
        limit = services.operator.server.max_body
        if self.endpoint.multipart:
            request = await form_of(scope, receive, limit, services.off_loop)
            try:
                await self._serve(scope, receive, send, await form_fields(request))
            finally:
                await request.close()  # an upload's temporary file
        else:
            body = await json_object(scope, receive, limit, services.off_loop)
            await self._serve(scope, receive, send, body)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, body: dict[str, Any]
    ) -> None:
        """Once more if the engine dies before the answer has begun."""
        context, pool = RequestContext.of(scope), scope["app"].state.services.pool
        context.body_read_s = time.monotonic()
        name = requested_model(body, pool.registry)
        model = pool.registry.find(name)
        context.model = model.name  # for the metrics, refused or not
        deadline = _deadline(scope, model.spec.timeout)
        wish = ModelRequest(name, self.endpoint, body, deadline, asyncio.current_task())
        early = KeepAliveSend(send, self.endpoint.id)
        try:
            try:
                await self._once(scope, receive, early, wish)
            except EngineDead:
                if early.answered:
                    raise
                await self._once(scope, receive, early, wish.retried())
        except LLMServeError as error:
            name_as_sent(error, body)
            if not early.began:
                raise
            await early.fail(error)

    async def _once(
        self, scope: Scope, receive: Receive, early: KeepAliveSend, wish: ModelRequest
    ) -> None:
        services: Services = scope["app"].state.services
        lease = services.pool.lease(wish)
        if isinstance(lease, QueuedRequest):
            entry = services.pool.find(wish.name)
            streams = self.endpoint.answer_tokens and wish.body.get("stream") is True
            comment_s = services.schedule.comment_s if streams else None
            lease = await self._waited(receive, early, lease, entry, comment_s)
        RequestContext.of(scope).leased_s = time.monotonic()
        answer = await self._answer(scope, receive, wish, lease)
        await answer(scope, receive, early)

    async def _waited(
        self,
        receive: Receive,
        early: KeepAliveSend,
        place: QueuedRequest[ModelRequest, Lease],
        entry: ServedModel,
        comment_s: float | None,
    ) -> Lease:
        """A stream gets a comment each `comment_s` meanwhile.

        Raises what the queue refuses with, or ClientDisconnect.
        """
        gone = asyncio.ensure_future(_gone(receive))
        try:
            while not place.given.done():
                both: set[asyncio.Future[Any]] = {place.given, gone}
                await asyncio.wait(both, timeout=comment_s, return_when="FIRST_COMPLETED")
                if gone.done():
                    raise ClientDisconnect  # noqa: TRY301  # what it has joined, it leaves below
                if not place.given.done():
                    await early.comment(
                        f"{entry.name} is {entry.state}, {entry.slots.waiting()} wait"
                    )
            return place.given.result()
        except BaseException as error:
            cut_by = _cut_by(place)
            place.cancel()
            if cut_by is not None and isinstance(error, asyncio.CancelledError):
                raise cut_by from None
            raise
        finally:
            gone.cancel()

    async def _answer(
        self, scope: Scope, receive: Receive, wish: ModelRequest, lease: Lease
    ) -> ASGIApp:
        services: Services = scope["app"].state.services
        try:
            with lease.running.coming():
                await services.batcher.join()
                answer = lease.running.express(self.endpoint.id, wish.body, wish.name, scope)
                await asyncio.sleep(0)  # the rest of its batch is prepared first
            if answer is None:
                request = Request(scope, receive)
                work = lease.running.call(self.endpoint.id, wish.body, wish.name, request)
                answer = await _raise_if_gone(receive, work)
        except BaseException as error:
            lease.release()
            if lease.cut_by is not None and isinstance(error, asyncio.CancelledError):
                raise lease.cut_by from None
            raise
        return LeasedResponse(answer, lease)


def _cut_by(place: QueuedRequest[ModelRequest, Lease]) -> LLMServeError | None:
    """Of a lease that was cut before its request could take it from the queue."""
    given = place.given
    return given.result().cut_by if given.done() and given.exception() is None else None


class LeasedResponse:
    """Gives its lease back when the work is done, also when no byte was sent."""

    def __init__(self, answer: ASGIApp, lease: Lease) -> None:
        self._answer = answer
        self._lease = lease

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer(scope, receive, send)
        except asyncio.CancelledError:
            error, context = self._lease.cut_by, RequestContext.of(scope)
            if error is None:
                raise
            if not context.has_begun:
                raise error from None
            if not context.is_complete:
                await self._end_early(send, error)
        finally:
            if isinstance(self._answer, BackgroundAnswer):
                self._answer.task.add_done_callback(lambda _: self._lease.release())
            else:
                self._lease.release()

    async def _end_early(self, send: Send, error: LLMServeError) -> None:
        if isinstance(self._answer, TokenStream):
            await self._answer.end_early(error)
            return
        last = self._answer.failure(error) if isinstance(self._answer, EventStream) else b""
        await send({"type": "http.response.body", "body": last, "more_body": False})


def _deadline(scope: Scope, timeout_s: float | None) -> Deadline:
    """The model's timeout, or a shorter one of the request's own."""
    given = next((value for name, value in scope["headers"] if name == _TIMEOUT), None)
    if given is not None:
        try:
            own_s = float(given[:32]) if b"_" not in given else 0.0
        except ValueError:
            own_s = 0.0
        if not 0 < own_s < float("inf"):
            came = quoted(given.decode("latin-1"))
            raise RequestError(f"x-request-timeout must be seconds, more than 0; it is {came}.")
        timeout_s = own_s if timeout_s is None else min(own_s, timeout_s)
    return Deadline(timeout_s)


async def _raise_if_gone(receive: Receive, work: Awaitable[ASGIApp]) -> ASGIApp:
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
