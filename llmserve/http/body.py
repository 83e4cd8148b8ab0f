"""The body and the fields of a request: bounded reading, decoding and parsing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request

from llmserve.api.body_limits import check_quantities
from llmserve.api.context import RequestContext
from llmserve.api.endpoints import parse_object
from llmserve.api.json_text import is_light
from llmserve.api.validation_errors import field_mistakes
from llmserve.errors import BodyTooLarge, RequestError
from llmserve.http.content_coding import coding_of, decode
from llmserve.http.schema_limits import check_constraints

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.types import Message, Receive, Scope

    from llmserve.api.body_thread import BodyThread
    from llmserve.api.json_text import Buffer

M = TypeVar("M", bound=BaseModel)

_FORM_SLICE = 8 * 2**10  # bytes of a form that one event-loop iteration parses
_FORM_FILES, _FORM_FIELDS = 8, 256


async def json_object(
    scope: Scope, receive: Receive, limit: int, off_loop: BodyThread
) -> dict[str, Any]:
    """Return a body as a JSON object; the context of a large one gets the body thread."""
    coding = _coding(scope, limit)
    raw = await _read(receive, limit)
    if coding is None and is_light(raw):
        return parse_body(raw)
    RequestContext.of(scope).body_thread = off_loop
    if coding is not None:
        raw = await off_loop.run(decode, coding, raw, limit)
    return await off_loop.run(parse_body, raw)


def parse_body(raw: Buffer) -> dict[str, Any]:
    """Return the keys that are not null, within their limits.

    Null means absent. Source: OpenAI API reference. Raises RequestError, BodyTooLarge.
    """
    body = parse_object(raw)
    check_constraints(body)
    check_quantities(body)
    return {key: value for key, value in body.items() if value is not None}


async def form_of(scope: Scope, receive: Receive, limit: int, off_loop: BodyThread) -> Request:
    """Return a request with a bounded `form()`; closing it deletes temporary files of uploads."""
    coding = _coding(scope, limit)
    if coding is None:
        return Request(scope, _sliced(receive, limit))
    whole = await off_loop.run(decode, coding, await _read(receive, limit), limit)
    return Request(scope, _sliced(_receive_from(whole), limit))


async def form_fields(request: Request) -> dict[str, Any]:
    """Return the fields of an upload; a name that ends in [] is a list."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError("Send the audio as multipart/form-data.", param="file")
    form = await request.form(max_files=_FORM_FILES, max_fields=_FORM_FIELDS)
    if "file" in form and not isinstance(form["file"], UploadFile):
        raise RequestError("`file` must be a file; it is text. Send a file name too.", param="file")
    return {key: form.getlist(key) if key.endswith("[]") else form[key] for key in form}


def validate_fields(kind: type[M], values: Mapping[str, Any]) -> M:
    """Return the fields of a query or an admin body as a `kind`. Raises RequestError."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        (first, _), *_ = found = field_mistakes(error.errors(include_url=False))
        problems = "; ".join(problem for _, problem in found)
        allowed = ", ".join(kind.model_fields) or "no keys"
        raise RequestError(f"{problems}. Allowed: {allowed}.", param=first) from None


def _coding(scope: Scope, limit: int) -> str | None:
    """Return the coding of a body. Raises UnsupportedEncoding, and BodyTooLarge by its length."""
    coding = coding_of(scope["headers"])
    if (length := _length(scope)) > limit:
        raise BodyTooLarge(
            f"The body has {length} bytes; server.max_body is {limit}. Send a smaller body."
        )
    return coding


def _length(scope: Scope) -> int:
    given = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    return int(given[:20]) if given.isdigit() else 0


async def _read(receive: Receive, limit: int) -> Buffer:
    """Return a whole body. Raises BodyTooLarge, or ClientDisconnect before its end."""
    body, more = await _next(receive, limit, limit)
    if not more:
        return body
    whole = bytearray(body)  # not a list: a chunk may be a single byte
    while more:
        body, more = await _next(receive, limit - len(whole), limit)
        whole += body
    return whole


async def _next(receive: Receive, left: int, limit: int) -> tuple[bytes, bool]:
    """Return the next part, of at most `left` of `limit` bytes, and whether more follow."""
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    body: bytes = message.get("body", b"")
    if len(body) > left:
        raise BodyTooLarge(
            f"The body is larger than server.max_body, {limit} bytes. Send a smaller body."
        )
    return body, message.get("more_body", False)


def _sliced(receive: Receive, limit: int) -> Receive:
    """Return a `receive` with small parts, one per event-loop iteration."""
    left, body, more = limit, b"", True

    async def pieces() -> Message:
        nonlocal left, body, more
        if body:
            await asyncio.sleep(0)
        elif more:
            body, more = await _next(receive, left, limit)
            left -= len(body)
        piece, body = body[:_FORM_SLICE], body[_FORM_SLICE:]
        return {"type": "http.request", "body": piece, "more_body": bool(body) or more}

    return pieces


def _receive_from(body: Buffer) -> Receive:
    async def receive() -> Message:
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return receive
