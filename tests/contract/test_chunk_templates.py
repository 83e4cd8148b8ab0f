"""Events from templates, to the byte: with and without a parser between."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager

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
        delta = {} if bare else {"content": text}
        end, done, rest = answer.last(text, "stop", None, 1, 1).split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        assert choice_of(end)["delta"] == delta
        middle = answer.middle(text)
        assert middle == b"" if bare else choice_of(middle)["delta"] == delta


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
