from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from llmserve.api import sse
from llmserve.api.endpoint_id import EndpointId
from llmserve.api.endpoints import NAMED_EVENTS, error_response
from llmserve.errors import EngineDead
from llmserve.http.keepalive import KeepAliveSend

if TYPE_CHECKING:
    from starlette.types import Message

START = {"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]}
REFUSAL = {"type": "http.response.start", "status": 400, "headers": [(b"x", b"y")]}


class Client:
    def __init__(self, endpoint: EndpointId = EndpointId.CHAT_COMPLETIONS) -> None:
        self.sent: list[Message] = []
        self.early = KeepAliveSend(self._send, endpoint)

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def text(self) -> str:
        return b"".join(each["body"] for each in self.sent[1:]).decode()

    @property
    def ended(self) -> bool:
        return not self.sent[-1]["more_body"]


def body(text: bytes, *, more: bool = False) -> Message:
    return {"type": "http.response.body", "body": text, "more_body": more}


async def test_answer_without_comments_is_sent_unchanged() -> None:
    client = Client()
    for message in (REFUSAL, body(b"no")):
        await client.early(message)
    assert client.sent == [REFUSAL, body(b"no")]
    assert (client.early.began, client.early.answered) == (False, True)


async def test_a_comment_begins_an_event_stream_once() -> None:
    client = Client()
    for state in ("loading", "warming"):
        await client.early.comment(f"chat is {state}")
    assert [each["type"] for each in client.sent] == ["http.response.start"] + [
        "http.response.body"
    ] * 2
    assert (client.sent[0]["status"], client.sent[0]["headers"]) == (200, sse.HEADERS)
    assert client.text == ": chat is loading\n\n: chat is warming\n\n"
    assert not client.ended
    assert (client.early.began, client.early.answered) == (True, False)


async def test_stream_continues_after_comments() -> None:
    client = Client()
    await client.early.comment("wait")
    for message in (START, body(b"data: 1\n\n", more=True), body(b"data: 2\n\n")):
        await client.early(message)
    assert [each["type"] for each in client.sent].count("http.response.start") == 1
    assert client.text == ": wait\n\ndata: 1\n\ndata: 2\n\n"
    assert client.ended
    assert client.early.answered


@pytest.mark.parametrize("endpoint", [EndpointId.CHAT_COMPLETIONS, EndpointId.MESSAGES])
async def test_error_response_after_comments_is_the_last_event(endpoint: EndpointId) -> None:
    """In the way of the endpoint, as an error that is raised."""
    error = EngineDead("gone")
    refused, failed = Client(endpoint), Client(endpoint)
    await refused.early.comment("wait")
    path = "/v1/messages" if endpoint is EndpointId.MESSAGES else ""
    response = error_response(error, path)
    for message in ({**REFUSAL, "status": 503}, body(bytes(response.body))):
        await refused.early(message)
    await failed.early.comment("wait")
    await failed.early.fail(error)
    assert refused.text == failed.text
    assert refused.ended
    assert failed.ended


@pytest.mark.parametrize(
    "endpoint", [EndpointId.COMPLETIONS, EndpointId.MESSAGES, EndpointId.RESPONSES]
)
async def test_error_after_comments_is_an_event_of_the_endpoint(
    endpoint: EndpointId,
) -> None:
    client = Client(endpoint)
    await client.early.comment("wait")
    await client.early.fail(EngineDead("gone"))
    _, _, event = client.text.partition(": wait\n\n")
    named = endpoint in NAMED_EVENTS
    assert event.startswith("event: error\ndata: {" if named else "data: {")
    assert event.endswith("data: [DONE]\n\n") is not named
    shown = sse.payload(event.removesuffix("data: [DONE]\n\n").encode())
    assert shown["error"]["message"] == "gone"
    assert shown["error"].get("code") == (
        None if endpoint is EndpointId.MESSAGES else "engine_dead"
    )
    assert client.ended
