"""What a request's context holds once the answer is out."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest
from pydantic import SecretStr

from llmserve.api.context import RequestContext
from llmserve.api.endpoint_id import EndpointId
from llmserve.errors import EngineDead, EngineError
from llmserve.registry.spec import ServerSpec
from tests.fakes import FakeRunning, Plan, failing, plain, stream
from tests.unit.test_app import CHAT, HI, Box, asgi

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from starlette.responses import Response

    from tests.fakes import Answer, Call


def box_of(answer: Answer, server: ServerSpec | None = None) -> AbstractAsyncContextManager[Box]:
    return asgi(server=server, chat=Plan(FakeRunning(answer)))


def context_of(box: Box) -> RequestContext:
    context = box.running.calls[-1].context
    assert context is not None
    return context


@pytest.mark.parametrize("answer", [plain(), stream(b"data: 1\n\n")], ids=["whole", "stream"])
async def test_context_of_answer_has_all_facts_in_order(answer: Answer) -> None:
    async with box_of(answer, server=ServerSpec(api_keys=[SecretStr("k")])) as box:
        headers = {"authorization": "Bearer k", "x-request-id": "r1"}
        await box.client.post(CHAT, json=HI | {"model": "gpt-4o"}, headers=headers)
        context = context_of(box)
    assert (context.id, context.endpoint, context.model) == (
        "r1",
        EndpointId.CHAT_COMPLETIONS,
        "chat",
    )
    assert context.owner == hashlib.sha256(b"k").hexdigest()
    assert (context.status, context.is_complete) == (200, True)
    marks = [context.arrival_s, context.body_read_s, context.leased_s]
    marks += [context.first_byte_s, context.end_s]
    known = [mark for mark in marks if mark is not None]
    assert len(known) == len(marks)
    assert known == sorted(known)
    assert (context.prompt_tokens, context.generated_tokens) == (None, None)


async def test_context_without_key_has_no_owner() -> None:
    async with box_of(plain()) as box:
        await box.client.post(CHAT, json=HI)
        assert context_of(box).owner == ""


async def test_context_of_failure_has_its_status() -> None:
    async with box_of(failing(EngineError("no"))) as box:
        await box.client.post(CHAT, json=HI)
        context = context_of(box)
    assert (context.status, context.is_complete) == (500, True)


async def test_context_of_retried_request_is_the_same() -> None:
    async def second(call: Call) -> Response:
        box.running.answer = plain()
        raise EngineDead("gone")

    async with box_of(second) as box:
        assert (await box.client.post(CHAT, json=HI)).status_code == 200
        first, last = (call.context for call in box.running.calls)
    assert first is last


async def test_context_before_the_answer_is_that_of_a_client_that_left() -> None:
    context = RequestContext("r1", None)
    assert (context.status, context.is_complete, context.has_begun) == (499, False, False)
    context.begin(200)
    assert (context.status, context.is_complete, context.has_begun) == (200, False, True)
