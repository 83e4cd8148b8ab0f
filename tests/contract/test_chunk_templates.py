"""Events from templates, to the byte: with and without a parser between."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

from llmserve.api import sse
from llmserve.api.endpoint_id import EndpointId
from llmserve.engine.endpoint_handlers import HANDLERS
from llmserve.engine.fastpath.chunk_templates import ChatModels, ChunkTemplate
from tests.contract.support import CHAT


def template(*, parsed: bool) -> ChunkTemplate:
    models = ChatModels("chat", "assistant", None, include_usage=False, parsed=parsed)
    return ChunkTemplate(models, lambda frame: frame)


def choice_of(frame: bytes) -> Any:
    (choice,) = json.loads(frame.removeprefix(b"data: "))["choices"]
    return choice


@pytest.mark.parametrize("texts", [("", "x"), ("x", "")], ids=["none first", "some first"])
@pytest.mark.parametrize("parsed", [False, True])
def test_chunks_without_text_are_vllms(parsed: bool, texts: tuple[str, str]) -> None:
    answer = template(parsed=parsed).answer("id")
    for text in texts:
        bare = parsed and not text
        middle = answer.middle(text)
        assert middle == b"" if bare else choice_of(middle)["delta"] == {"content": text}


@pytest.mark.parametrize("parsed", [False, True])
def test_last_text_of_a_chat_precedes_its_end(parsed: bool) -> None:
    answer = template(parsed=parsed).answer("id")
    text, end, done, rest = answer.last("x", "stop", None, 1, 1).split(b"\n\n")
    assert text + b"\n\n" == answer.middle("x")
    assert choice_of(end)["delta"] == {}
    assert choice_of(end)["finish_reason"] == "stop"
    assert (done, rest) == (b"data: [DONE]", b"")
    assert answer.last("", "stop", None, 1, 1).split(b"\n\n")[0] == end


CALLS = [{"index": 0, "function": {"arguments": "}"}}]


@pytest.mark.parametrize(
    "delta",
    [{"content": "x"}, {"reasoning": "x"}, {"tool_calls": CALLS}],
    ids=lambda d: next(iter(d)),
)
def test_event_with_content_and_end_is_split(delta: dict[str, Any]) -> None:
    choice = {"index": 0, "delta": delta, "logprobs": {"content": []}, "finish_reason": "stop"}
    chunk = {"id": "a", "system_fingerprint": "f", "choices": [choice | {"stop_reason": 7}]}
    frame = sse.with_payload(b"", chunk)
    content, end = HANDLERS[EndpointId.CHAT_COMPLETIONS].pruned(frame).split(b"\n\n")[:2]
    logprobs: dict[str, Any] = {"content": [], "refusal": None}
    assert choice_of(content) == choice | {"finish_reason": None, "logprobs": logprobs}
    assert choice_of(end) == choice | {"delta": {}, "logprobs": None, "stop_reason": 7}


@pytest.mark.parametrize("own", [{"logprobs": {"content": [1]}}, {"token_ids": [2]}])
def test_last_token_without_text_keeps_its_logprobs_and_id(own: dict[str, Any]) -> None:
    choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "stop", **own}
    frame = sse.with_payload(b"", {"choices": [choice]})
    content, end = HANDLERS[EndpointId.CHAT_COMPLETIONS].pruned(frame).split(b"\n\n")[:2]
    (key,) = own
    assert choice_of(content)[key]
    assert not choice_of(end).get(key)
    assert choice_of(end)["finish_reason"] == "stop"


def test_event_with_an_end_alone_stays_one() -> None:
    choice = {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "stop"}
    frame = sse.with_payload(b"", {"choices": [choice]})
    (end, rest) = HANDLERS[EndpointId.CHAT_COMPLETIONS].pruned(frame).split(b"\n\n")
    assert (choice_of(end)["delta"], rest) == ({}, b"")


def test_vllms_parser_returns_no_delta_without_text() -> None:
    made = ParserManager.get_parser("hermes", enable_auto_tools=True)
    assert made is not None
    parser = made(AutoTokenizer.from_pretrained(CHAT), None)
    asked = ChatCompletionRequest(messages=[{"role": "user", "content": "hi"}])

    def delta_of(text: str, *, finished: bool) -> Any:
        return parser.parse_delta(text, [1], asked, [1], finished=finished)

    some = delta_of("<tool_call>", finished=False)
    assert some.model_dump(exclude_unset=True) == {"content": "<tool_call>"}
    assert delta_of("", finished=False) is None
    assert delta_of("", finished=True) is None  # the end goes with `DeltaMessage()`
