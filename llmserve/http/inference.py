"""Inference requests: from the body over a lease to the answer."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect, Request

from llmserve.api.context import RequestContext
from llmserve.api.endpoints import BackgroundAnswer, Endpoint
from llmserve.api.ignored_values import check_values
from llmserve.api.sse import EventStream
from llmserve.api.token_stream import TokenStream
from llmserve.api.unsupported_keys import check_supported
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
    """The ASGI app of one endpoint: reads the body, leases the model, sends the answer."""

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
                await request.close()  # deletes temporary files of uploads
        else:
            body = await json_object(scope, receive, limit, services.off_loop)
            await self._serve(scope, receive, send, body)

    async def _serve(
        self, scope: Scope, receive: Receive, send: Send, body: dict[str, Any]
    ) -> None:
        """Answer, with one retry if the engine dies before the first byte."""
        context, names = RequestContext.of(scope), scope["app"].state.services.pool.registry
        context.body_read_s = time.monotonic()
        check_supported(self.endpoint.id, body)
        check_values(self.endpoint.id, body)
        name = requested_model(body, names)
        model = names.find(name)
        context.model = model.name  # for the metrics of refused requests too
        deadline = _deadline(scope, model.timeout)
        wanted = ModelRequest(name, self.endpoint, body, deadline, asyncio.current_task())
        client = KeepAliveSend(send, self.endpoint.id)
        try:
            try:
                await self._attempt(scope, receive, client, wanted)
            except EngineDead:
                if client.answered:
                    raise
                await self._attempt(scope, receive, client, wanted.retried())
        except LLMServeError as error:
            name_as_sent(error, body)
            if not client.began:
                raise
            await client.fail(error)

    async def _attempt(
        self, scope: Scope, receive: Receive, client: KeepAliveSend, wanted: ModelRequest
    ) -> None:
        services: Services = scope["app"].state.services
        lease = services.pool.lease(wanted)
        if isinstance(lease, QueuedRequest):
            model = services.pool.find(wanted.name)
            streams = self.endpoint.answer_tokens and wanted.body.get("stream") is True
            comment_s = services.schedule.comment_s if streams else None
            lease = await self._wait_in_queue(receive, client, lease, model, comment_s)
        RequestContext.of(scope).leased_s = time.monotonic()
        answer = await self._create_answer(scope, receive, wanted, lease)
        await answer(scope, receive, client)

    async def _wait_in_queue(
        self,
        receive: Receive,
        client: KeepAliveSend,
        queued: QueuedRequest[ModelRequest, Lease],
        model: ServedModel,
        comment_s: float | None,
    ) -> Lease:
        """Return the lease of a queued request; a stream gets a comment each `comment_s`.

        Raises the error of the queue, or ClientDisconnect.
        """
        disconnected = asyncio.ensure_future(_disconnected(receive))
        try:
            while not queued.given.done():
                both: set[asyncio.Future[Any]] = {queued.given, disconnected}
                await asyncio.wait(both, timeout=comment_s, return_when="FIRST_COMPLETED")
                if disconnected.done():
                    raise ClientDisconnect  # noqa: TRY301  # leaves the queue below
                if not queued.given.done():
                    await client.comment(
                        f"{model.name} is {model.state}, {model.slots.waiting()} queued"
                    )
            return queued.given.result()
        except BaseException as error:
            cut_by = _cut_by(queued)
            queued.cancel()
            if cut_by is not None and isinstance(error, asyncio.CancelledError):
                raise cut_by from None
            raise
        finally:
            disconnected.cancel()

    async def _create_answer(
        self, scope: Scope, receive: Receive, wanted: ModelRequest, lease: Lease
    ) -> ASGIApp:
        services: Services = scope["app"].state.services
        try:
            with lease.running.preparing():
                await services.batcher.join()
                answer = lease.running.try_fast_path(
                    self.endpoint.id, wanted.body, wanted.name, scope
                )
                await asyncio.sleep(0)  # until its batch is prepared
            if answer is None:
                request = Request(scope, receive)
                work = lease.running.call(self.endpoint.id, wanted.body, wanted.name, request)
                answer = await _until_disconnect(receive, work)
        except BaseException as error:
            lease.release()
            if lease.cut_by is not None and isinstance(error, asyncio.CancelledError):
                raise lease.cut_by from None
            raise
        return LeasedResponse(answer, lease)


def _cut_by(queued: QueuedRequest[ModelRequest, Lease]) -> LLMServeError | None:
    """Return the error of a lease that ended before its request took it from the queue."""
    given = queued.given
    return given.result().cut_by if given.done() and given.exception() is None else None


class LeasedResponse:
    """An answer that releases its lease at the end, also if no byte was sent."""

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
    """Return the shorter timeout of the model and the request."""
    given = next((value for name, value in scope["headers"] if name == _TIMEOUT), None)
    if given is not None:
        try:
            own_s = float(given[:32]) if b"_" not in given else 0.0
        except ValueError:
            own_s = 0.0
        if not 0 < own_s < float("inf"):
            came = quoted(given.decode("latin-1"))
            raise RequestError(f"x-request-timeout must be seconds, greater than 0; it is {came}.")
        timeout_s = own_s if timeout_s is None else min(own_s, timeout_s)
    return Deadline(timeout_s)


async def _until_disconnect(receive: Receive, work: Awaitable[ASGIApp]) -> ASGIApp:
    """Return the answer of `work`; cancel it when the client disconnects.

    Starlette does that for streams only.
    """
    task = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for each in (task, disconnected):
            each.cancel()
        await asyncio.gather(task, disconnected, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
