"""The fast path: a client receives what vLLM's own generators write.

Three ways lead to an answer: vLLM's generator (`Box.vllm_path`), vLLM's handler with our stream
(the first request of a kind), and a template with our stream (those after it).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import logging
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from pydantic import create_model
from vllm import SamplingParams
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.renderers import chat_utils
from vllm.v1.metrics.loggers import StatLoggerManager

from llmserve.api.context import RequestContext
from llmserve.api.endpoint_id import EndpointId
from llmserve.engine.endpoint_handlers import HANDLERS
from llmserve.engine.fastpath.output_processor import StreamingOutputProcessor
from llmserve.engine.metrics import EngineMetrics
from llmserve.engine.request_validation import bounded
from llmserve.lifecycle.timings import LifecycleTimings
from llmserve.registry.spec import ModelSpec
from tests.contract.fake_core import DIES_AT_ONCE, FAILS, PREEMPTED, SILENT, TRIPLES
from tests.contract.fast_path_box import (
    EMOJI,
    FOX,
    Box,
    assert_same,
    boxed,
    prompt,
    seen,
    user,
)
from tests.contract.support import CHAT, CHATS, COMPLETIONS, events, services_of
from tests.fakes import soon, until
from tests.listening import listening

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

    from starlette.types import Receive, Scope, Send
    from vllm.v1.engine import EngineCoreRequest


FOX_ID = 16438  # " fox"
CJK = "東京は日本の首都です。你好世界。한국어"
INDIC = "नमस्ते दुनिया مرحبا بالعالم שלום"
SPECIAL = "one<|im_end|>\n<|im_start|>two<|endoftext|>three"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
FAMILY = f"Family: 👨‍👩‍👧 end {REPLACEMENT}"
QUOTES = 'a "quoted" \\ back\tslash </script> \x7f é'


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def box() -> AsyncIterator[Box]:
    async with boxed() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def parsing() -> AsyncIterator[Box]:
    """A server whose model has a parser of tool calls."""
    async with boxed(tool_call_parser="hermes") as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_known(request: pytest.FixtureRequest) -> None:
    for name in {"box", "parsing"} & set(request.fixturenames):
        request.getfixturevalue(name).forget()


# --- what a client sees


@dataclass
class Case:
    """What is asked, and what must be in the answer.

    `kept`: whether it leaves a template. `broken`: whether its tokens are no UTF-8.
    """

    path: str
    body: dict[str, Any]
    holds: str = ""
    finish: str = "length"
    kept: bool = True
    broken: bool = False


STOP: dict[str, Any] = {"stop": ["never", "ck bro"], "finish": "stop"}
STOP_ID: dict[str, Any] = {"stop_token_ids": [FOX_ID], "finish": "stop"}
INCLUDE: dict[str, Any] = {"include_stop_str_in_output": True}
SHOWN: dict[str, Any] = {"skip_special_tokens": False}
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
SAMPLES = {"plain": FOX, "emoji": EMOJI, "CJK": CJK, "indic and arabic": INDIC, "quotes": QUOTES}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    ", three at a time": {"seed": TRIPLES},
    ", preempted": {"seed": PREEMPTED},
}
# Of both endpoints: the text, and fields of the body and of the `Case`.
COMMON: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name}{variant}": (text, more | {"holds": text})
    for name, text in SAMPLES.items()
    for variant, more in VARIANTS.items()
} | {
    "stop": (FOX, STOP | {"holds": "The qui"}),
    "stop, three at a time": (FOX, STOP | {"seed": TRIPLES}),
    "stop, included": (FOX, STOP | INCLUDE | {"holds": "quick bro"}),
    "stop inside emoji": (EMOJI, {"stop": ["🇯🇵 a"], "finish": "stop"}),
    "stop that never comes": (EMOJI, {"stop": "a long stop string", "holds": EMOJI}),
    "stop id": (FOX, STOP_ID | {"holds": "quick brown"}),
    "stop id, included": (FOX, STOP_ID | INCLUDE | {"holds": "brown fox"}),
    "stop id, three at a time": (FOX, STOP_ID | {"seed": TRIPLES}),
    "usage": (EMOJI, USAGE),
    "usage and stop": (FOX, STOP | USAGE),
    "one token": (FOX, {"max_tokens": 1}),
    "special tokens": (SPECIAL, {}),
    "special tokens shown": (SPECIAL, SHOWN),
    "special tokens shown, close": (SPECIAL, SHOWN | {"spaces_between_special_tokens": False}),
    "sampling": (
        FOX,
        {"temperature": 0.3, "top_p": 0.9, "top_k": 7, "presence_penalty": 0.5}
        | {"user": "me", "seed": 7, "holds": FOX},
    ),
    "alias": (FOX, {"model": "alias", "holds": FOX}),
    "structured": (FOX, {"structured_outputs": {"choice": ["yes", "no"]}, "kept": False}),
    "at least": (FOX, {"min_tokens": 3, "kept": False}),
}


def of_both(path: str, ask: Any) -> Iterator[tuple[str, Case]]:
    for name, (text, more) in COMMON.items():
        expected = {key: more[key] for key in ("holds", "finish", "kept") if key in more}
        body = {key: value for key, value in more.items() if key not in expected}
        yield f"{path.split('/')[2]}, {name}", Case(path, ask(text) | body, **expected)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  " + FOX},
    {"role": "assistant", "content": EMOJI},
    {"role": "user", "content": CJK + "\n"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": FOX}]}]
# The prompt ends inside a character, and the answer begins with the rest of it.
SPLIT: dict[str, Any] = {"prompt": [235, 118, 504, 321, 231, 10813], "max_tokens": 20}
HALF: dict[str, Any] = {"prompt": [504, 10813, 235], "max_tokens": 20}
# U+FFFD is the text of part of a character, and here a character of the prompt's own.
CROOKED: dict[str, Any] = {"prompt": FAMILY, "max_tokens": 20}
BROKEN: dict[str, Any] = {"kept": False, "broken": True}
CHAT_ALONE = {
    "max_completion_tokens": Case(
        CHATS, {"messages": user(FOX)["messages"], "max_completion_tokens": 50}
    ),
    "turns": Case(CHATS, {"messages": CONVERSATION, "max_tokens": 200}, EMOJI),
    "parts": Case(CHATS, {"messages": PARTS, "max_tokens": 80}, FOX),
    "JSON": Case(CHATS, user(FOX) | {"response_format": {"type": "json_object"}}, kept=False),
}
COMPLETIONS_ALONE = {
    "ids": Case(
        COMPLETIONS, {"prompt": [504, 2365, 6354], "max_tokens": 8}, "The quick brown", kept=False
    ),
    "a split character": Case(COMPLETIONS, SPLIT, **BROKEN),
    "a split character, three at a time": Case(COMPLETIONS, SPLIT | {"seed": TRIPLES}, **BROKEN),
    "half a character": Case(COMPLETIONS, HALF, **BROKEN),
    "half a character, preempted": Case(COMPLETIONS, HALF | {"seed": PREEMPTED}, **BROKEN),
    "a prompt that ends in U+FFFD": Case(COMPLETIONS, CROOKED, broken=True),
    "U+FFFD and special tokens": Case(COMPLETIONS, CROOKED | SHOWN, broken=True),
    "no limit": Case(COMPLETIONS, {"prompt": FOX}, FOX),
}
CASES = {
    **dict(of_both(CHATS, user)),
    **dict(of_both(COMPLETIONS, prompt)),
    **{f"chat, {name}": case for name, case in CHAT_ALONE.items()},
    **{f"completions, {name}": case for name, case in COMPLETIONS_ALONE.items()},
}


@pytest.mark.parametrize("name", CASES)
async def test_a_stream_is_the_same_on_all_ways(box: Box, name: str) -> None:
    await same_on_all_ways(box, CASES[name])


# A call of a tool that nobody offered is text.
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
UNPARSED = {name: case for name, case in CASES.items() if case.path == CHATS} | {
    "chat, a call": Case(CHATS, user(CALL) | {"max_tokens": 60}, holds=CALL),
    "chat, no tools": Case(CHATS, user(FOX) | {"tool_choice": "none"}, holds=FOX),
}


@pytest.mark.parametrize("name", UNPARSED)
async def test_fast_path_stream_with_unused_parser_is_unchanged(parsing: Box, name: str) -> None:
    await same_on_all_ways(parsing, UNPARSED[name])


async def same_on_all_ways(box: Box, case: Case) -> None:
    body = case.body | {"stream": True}
    start = box.written
    with box.vllm_path():
        expected = seen(await box.ask(case.path, body))
    asked = await box.core("last_request")
    assert box.written == start, "vLLM's path is vLLM's alone"
    assert expected.status == 200
    assert case.holds in expected.text
    assert (REPLACEMENT in expected.text) == case.broken
    assert f'"finish_reason":"{case.finish}"'.encode() in b"".join(expected.frames)

    for known in (False, case.kept):
        before = box.written
        with box.handler_calls() as calls:
            got = seen(await box.ask(case.path, body))
        assert_same(got, expected)
        assert await box.core("last_request") == asked
        assert box.written > before, "the fast path was not taken"
        assert len(calls) == (0 if known else 1)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("shown", [False, True])
async def test_prompt_that_ends_in_ufffd_stays_out_of_answer(
    box: Box, *, streamed: bool, shown: bool
) -> None:
    tokens = len(box.serving.engine.client.renderer.tokenizer.encode(FAMILY))
    body = {"prompt": FAMILY, "max_tokens": tokens + 1, "stream": streamed}
    reply = await box.ask(COMPLETIONS, body | {"skip_special_tokens": not shown})
    text = seen(reply).text if streamed else reply.json()["choices"][0]["text"]
    assert text == FAMILY + "Family"  # the fake core says the prompt, and begins again


WHOLE = {
    "plain": user(FOX),
    "emoji": user(EMOJI),
    "emoji, three at a time": user(EMOJI) | {"seed": TRIPLES},
    "stop": user(FOX) | {"stop": ["ck bro"]},
    "stop, included": user(FOX) | {"stop": ["ck bro"], "include_stop_str_in_output": True},
    "stop id": user(FOX) | {"stop_token_ids": [FOX_ID]},
    "one token": user(FOX) | {"max_tokens": 1},
    "token ids": user(FOX) | {"max_tokens": 9, "return_token_ids": True},
    "logprobs": user(FOX) | {"max_tokens": 9, "logprobs": True},
    "two": user(FOX) | {"n": 2},
}


@pytest.mark.parametrize("name", WHOLE)
async def test_fast_path_whole_answer_is_vllms(
    box: Box, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmserve.engine.fastpath import output_processor as outputs

    got = (await box.ask(CHATS, WHOLE[name])).json()
    monkeypatch.setattr(outputs, "_is_final_only", lambda _: False)
    expected = (await box.ask(CHATS, WHOLE[name])).json()
    assert expected["usage"]["completion_tokens"] > 0
    del got["created"], expected["created"]
    assert got == expected


async def test_fast_path_whole_answer_without_stop_is_final_only(
    box: Box,
) -> None:
    from llmserve.engine.fastpath.output_processor import FinalOnlyRequestState

    async def kind(**more: Any) -> type:
        body = user(FOX) | {"seed": SILENT} | more
        asking = asyncio.ensure_future(box.ask(CHATS, body))
        states = box.serving.engine.client.output_processor.request_states
        await until(lambda: len(states) == 1)
        (state,) = states.values()
        asking.cancel()
        await asyncio.wait({asking})
        await until(lambda: not states)
        return type(state)

    assert await kind() is FinalOnlyRequestState
    assert await kind(stop=["x"]) is not FinalOnlyRequestState


# --- statistics


def test_metrics_logger_is_the_only_one(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vllm.v1.metrics.loggers")  # as in a server
    figures = EngineMetrics("chat")
    manager = StatLoggerManager(
        box.serving.engine.client.vllm_config, [0], custom_stat_loggers=[figures.logger_class]
    )
    assert len(manager.stat_loggers) == 2
    client: Any = SimpleNamespace(logger_manager=manager)
    figures.take_over(client)
    (logger,) = manager.stat_loggers
    assert isinstance(logger, figures.logger_class)


# --- request templates


async def asked_by_template(box: Box, path: str, body: dict[str, Any]) -> bool:
    with box.handler_calls() as calls:
        reply = await box.ask(path, body)
    assert reply.status_code == 200, reply.text
    return not calls


async def test_template_takes_text_seed_and_limit_of_each_body(box: Box) -> None:
    first = user("one") | {"stream": True, "seed": 1, "max_tokens": 2}
    assert not await asked_by_template(box, CHATS, first)
    for seed, limit in ((2, 3), (99, 4)):
        body = user(f"text {seed}") | {"stream": True, "seed": seed, "max_tokens": limit}
        assert await asked_by_template(box, CHATS, body)
        last = await box.core("last_request")
        assert (last["seed"], last["max_tokens"]) == (seed, limit)


@pytest.mark.parametrize(
    ("path", "prompts", "more"),
    [
        (CHATS, (user("one"), user(CJK)), {}),
        (CHATS, (user("one"), user(EMOJI)), {"max_tokens": 5, "seed": 7, "stop": ["x", "yz"]}),
        (CHATS, (user("one"), user(INDIC)), {"temperature": 0.3, "top_p": 0.9, "top_k": 5}),
        (CHATS, (user("one"), user("two")), {"logit_bias": {"5": 1.0}, "ignore_eos": True}),
        (CHATS, (user("one"), user("two")), {"stop_token_ids": [7], "include_stop_str_in_output": True}),
        (CHATS, (user("one"), user("two")), {"priority": 3, "cache_salt": "s", "user": "me"}),
        (COMPLETIONS, (prompt("one"), prompt(FOX)), {"min_p": 0.1, "presence_penalty": 0.5}),
        (COMPLETIONS, (prompt("one"), prompt(SPECIAL)), {"add_special_tokens": False}),
        (COMPLETIONS, (prompt("one"), prompt(FOX)), {"repetition_penalty": 1.1, "n": 1}),
    ],
)  # fmt: skip
async def test_template_request_equals_vllms(
    box: Box,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    prompts: tuple[dict[str, Any], dict[str, Any]],
    more: dict[str, Any],
) -> None:
    given: list[EngineCoreRequest] = []
    add = StreamingOutputProcessor.add_request

    def added(outputs: StreamingOutputProcessor, request: EngineCoreRequest, *rest: Any) -> None:
        given.append(copy.copy(request))
        add(outputs, request, *rest)

    monkeypatch.setattr(StreamingOutputProcessor, "add_request", added)
    first, second = ({"max_tokens": 3} | each | more | {"stream": True} for each in prompts)
    box.forget()
    assert not await asked_by_template(box, path, first)
    assert await asked_by_template(box, path, second)
    box.forget()
    assert not await asked_by_template(box, path, second)
    _, ours, vllms = given
    for request in (ours, vllms):
        assert request.external_req_id is not None
        assert re.fullmatch(re.escape(request.external_req_id) + "-[0-9a-f]{8}", request.request_id)
        request.request_id = ""
        request.arrival_time = 0.0
    assert ours == vllms


@pytest.mark.parametrize(
    "other",
    [
        {"temperature": 0.5},
        {"seed": 1},
        {"user": "me"},
        {"max_completion_tokens": 5},
        {"stream_options": {"include_usage": True}},
        {"model": "alias"},
        {"unknown": 1},
        {"chat_template_kwargs": {"x": 1}},
    ],
)
async def test_a_body_with_another_field_is_not_served_by_a_template(
    box: Box, other: dict[str, Any]
) -> None:
    body = user(FOX) | {"stream": True, "max_tokens": 4}
    await box.ask(CHATS, body)
    assert await asked_by_template(box, CHATS, body)
    assert not await asked_by_template(box, CHATS, body | other)


@pytest.mark.parametrize("value", [True, 1, 1.0, "1", [1], {"a": 1}])
async def test_values_that_look_alike_are_different_fields(box: Box, value: Any) -> None:
    body = user(FOX) | {"stream": True, "max_tokens": 2}
    await box.ask(CHATS, body | {"unknown": None})
    assert not await asked_by_template(box, CHATS, body | {"unknown": value})


# A template that tells the order of a document's keys, and of an argument's.
ORDERED = (
    "{% for d in documents or [] %}{% for k, v in d.items() %}[{{ k }}={{ v }}]{% endfor %}"
    "{% endfor %}{% for k, v in (more or {}).items() %}[{{ k }}={{ v }}]{% endfor %}"
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
)


@asynccontextmanager
async def with_template(box: Box, template: str) -> AsyncIterator[Box]:
    """The same engine behind handlers that use another chat template."""
    spec = ModelSpec(
        name="chat",
        model=str(CHAT),
        aliases=("alias",),
        engine={"max_model_len": 2048},
        chat_template=template,
    )
    serving = await box.serving.changed(spec)
    made = Box(await services_of([spec], {"chat": serving}), serving)
    async with made.client:
        yield made


@pytest.mark.parametrize(
    "more",
    [
        {"documents": [{"title": "T", "text": "X"}]},
        {"chat_template_kwargs": {"more": {"a": 1, "b": 2}}},
    ],
)
async def test_template_of_other_key_order_is_not_shared(box: Box, more: dict[str, Any]) -> None:
    body = user(FOX) | {"stream": True, "max_tokens": 2}
    ((name, value),) = more.items()
    turned = json.loads(json.dumps(more), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    async with with_template(box, ORDERED) as ordered:
        for _ in range(2):
            prompts = []
            for asking in (body | {name: value}, body | turned):
                await ordered.ask(CHATS, asking)
                prompts.append((await box.core("last_request"))["prompt_token_ids"])
            assert prompts[0] != prompts[1]


def test_template_of_one_adapter_is_not_anothers(box: Box) -> None:
    for fast_path in box.serving._fast_paths.values():
        prompt = {fast_path._adapter.prompt: FOX, "model": "legal"}
        keys = {fast_path._key(prompt, name) for name in ("legal", "medical", "chat")}
        assert len(keys) == 3


BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=0f3a;"


@pytest.mark.parametrize("rest", ["", "\nBe brief.", "\n", "\n" + BILLING + "\nmore"])
@pytest.mark.parametrize("as_part", [False, True])
async def test_billing_header_is_dropped_whatever_is_known(
    box: Box, rest: str, *, as_part: bool
) -> None:
    def body(system: str) -> dict[str, Any]:
        content = [{"type": "text", "text": system}] if as_part else system
        messages = [{"role": "system", "content": content}, {"role": "user", "content": FOX}]
        return {"messages": messages, "max_tokens": 2, "stream": True}

    with box.vllm_path():
        await box.ask(CHATS, body(BILLING + rest))
    expected = await box.core("last_request")
    await box.ask(CHATS, body("known"))
    assert await asked_by_template(box, CHATS, body("also " + BILLING))
    assert not await asked_by_template(box, CHATS, body(BILLING + rest))
    assert await box.core("last_request") == expected


@pytest.mark.parametrize("role", [["user"], {}, 1, None])
async def test_role_that_is_no_string_is_refused(box: Box, role: Any) -> None:
    await box.ask(CHATS, user(FOX) | {"stream": True, "max_tokens": 4})
    message = {"role": role, "content": FOX}
    reply = await box.ask(CHATS, {"messages": [message], "stream": True, "max_tokens": 4})
    assert reply.status_code == 400


async def test_a_body_with_a_limit_and_one_without_share_no_template(box: Box) -> None:
    limited = {"prompt": FOX, "max_tokens": 3, "stream": True}
    unlimited = {"prompt": FOX, "stream": True}
    for _ in range(2):
        for body, limit in ((limited, 3), (unlimited, 16)):
            await box.ask(COMPLETIONS, body)
            assert (await box.core("last_request"))["max_tokens"] == limit


async def test_template_ignores_fields_that_vllm_ignores(box: Box) -> None:
    """`max_completion_tokens` is no field of completions, and 16 is their limit anyway."""
    body = {"prompt": FOX, "stream": True}
    await box.ask(COMPLETIONS, body | {"max_completion_tokens": 16})
    await box.ask(COMPLETIONS, body | {"max_completion_tokens": 5})
    assert (await box.core("last_request"))["max_tokens"] == 16


async def test_other_roles_and_shapes_of_a_message_are_vllms(box: Box) -> None:
    body = user(FOX) | {"stream": True, "max_tokens": 4}
    await box.ask(CHATS, body)
    for message in (
        {"role": "user", "content": [{"type": "text", "text": "x"}] * 2},
        {"role": "user", "content": "x", "name": "me"},
        {"role": "developer", "content": "x"},
    ):
        assert not await asked_by_template(box, CHATS, body | {"messages": [message]})


@pytest.mark.parametrize(
    "name", ["x-vllm-priority", "x-vllm-later", "traceparent", "x-data-parallel-rank"]
)
async def test_a_header_that_vllm_reads_is_vllms(box: Box, name: str) -> None:
    body = {"model": "chat", "prompt": FOX, "stream": True, "max_tokens": 2}
    await box.ask(COMPLETIONS, body)
    with box.handler_calls() as calls:
        await box.client.post(COMPLETIONS, json=body, headers={name: "0"})
    assert calls == ["completions"]


async def test_what_a_header_asked_for_is_not_learned(box: Box) -> None:
    body = {"model": "chat", "prompt": FOX, "stream": True, "max_tokens": 2, "top_p": 0.123}
    await box.client.post(COMPLETIONS, json=body, headers={"x-session-id": "mine"})
    assert not await asked_by_template(box, COMPLETIONS, body)
    assert await asked_by_template(box, COMPLETIONS, body)


async def test_a_long_prompt_says_nothing_of_its_kind(box: Box) -> None:
    body = {"model": "chat", "stream": True, "max_tokens": 2, "top_p": 0.456}
    assert not await asked_by_template(
        box, COMPLETIONS, body | {"prompt": "the quick brown fox " * 420}
    )
    assert not await asked_by_template(box, COMPLETIONS, body | {"prompt": FOX})
    assert await asked_by_template(box, COMPLETIONS, body | {"prompt": FOX})


async def test_a_body_that_is_nested_deep_is_answered(box: Box) -> None:
    deep: Any = []
    for _ in range(300):
        deep = [deep]
    body = user("hi") | {"stream": True, "max_tokens": 2, "metadata": deep}
    for _ in range(2):
        assert not await asked_by_template(box, CHATS, body)


async def test_the_last_kinds_of_requests_are_remembered(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmserve.engine.fastpath import request_templates

    monkeypatch.setattr(request_templates, "_TEMPLATES", 2)
    bodies = [{"prompt": "x", "max_tokens": 1, "stream": True, "user": str(n)} for n in range(3)]
    for body in bodies:
        await box.ask(COMPLETIONS, body)
    assert not await asked_by_template(box, COMPLETIONS, bodies[0])
    assert await asked_by_template(box, COMPLETIONS, bodies[2])


# --- what a later vLLM adds


async def leaves_by(box: Box, body: dict[str, Any]) -> list[bool]:
    """Whether each of two such chats leaves by the fast path."""
    ways = []
    for _ in range(2):
        before = box.written
        reply = await box.ask(CHATS, user(FOX) | {"stream": True, "max_tokens": 4} | body)
        assert reply.status_code == 200
        ways.append(box.written > before)
    return ways


async def test_chat_with_field_of_later_vllm_goes_vllms_way(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: Any = {"return_weight_versions": (bool | None, None)}
    later = create_model("Later", __base__=ChatCompletionRequest, **added)
    handler = replace(HANDLERS[EndpointId.CHAT_COMPLETIONS], request=bounded(later))
    monkeypatch.setitem(HANDLERS, EndpointId.CHAT_COMPLETIONS, handler)
    box.forget()
    assert await leaves_by(box, {}) == [True, True]
    assert await leaves_by(box, {"return_weight_versions": True}) == [False, False]


async def test_chat_with_parameter_of_later_vllm_goes_vllms_way(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = msgspec.defstruct("Later", [("weight_versions", bool, False)], bases=(SamplingParams,))
    make = ChatCompletionRequest.to_sampling_params

    def with_more(request: Any, *arguments: Any) -> Any:
        known = msgspec.structs.asdict(make(request, *arguments))
        return later(**known, weight_versions=request.user == "all")

    monkeypatch.setattr(ChatCompletionRequest, "to_sampling_params", with_more)
    box.forget()
    assert await leaves_by(box, {"user": "some"}) == [True, True]
    assert await leaves_by(box, {"user": "all"}) == [False, False]


async def test_chat_of_handler_with_flag_of_later_vllm_goes_vllms_way(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = EndpointId.CHAT_COMPLETIONS
    handler = box.serving._state.openai_serving_chat
    for is_on in (False, True):
        monkeypatch.setattr(handler, "enable_weight_versions", is_on, raising=False)
        monkeypatch.setitem(box.serving._fast_paths, name, box.serving._new_fast_path(name, None))
        assert await leaves_by(box, {}) == [not is_on] * 2


# --- prompts of random conversations

CONSTANTS = [
    chat_utils._CLAUDE_CODE_BILLING_HEADER,
    chat_utils.PROMPT_EMBEDS_PLACEHOLDER_TOKEN,
    *chat_utils.MODALITY_PLACEHOLDERS_MAP.values(),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "{{ messages }}", "{% raw %}", "</think>"),
    *("\n", "\r\n", " ", "\t", "\x00", "\ufeff", REPLACEMENT, EMOJI, CJK, "'\"\\", "x" * 300),
]
TEXTS = st.lists(
    st.sampled_from(CONSTANTS) | st.text("aZ1 .,\n中é\u00a0\u200b🙂", min_size=1, max_size=8),
    min_size=1,
    max_size=5,
).map("".join)
CONTENTS = TEXTS | TEXTS.map(lambda text: [{"type": "text", "text": text}])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENTS}
    ),
    min_size=1,
    max_size=5,
)
KINDS: list[dict[str, Any]] = [
    {},
    {"add_special_tokens": True},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"documents": [{"title": "T", "text": "X"}]},
    {"temperature": 0.0, "stop": ["x"]},
]
LOOPS = (
    "{%- set ns = namespace(n=0) -%}{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}"
    "{{ ns.n }}{{ m.role }}={{ m.content | tojson }}|{{ m.content.split('\n')[0] | trim }}"
    "{%- endfor -%}{%- if add_generation_prompt %}A:{% endif -%}"
)


@pytest.mark.parametrize("template", [None, LOOPS], ids=["its own", "another"])
async def test_prompt_of_template_is_vllms_for_any_conversation(
    box: Box, template: str | None
) -> None:
    """Whatever the texts hold: what vLLM looks at in them, too."""
    drawn: list[list[dict[str, Any]]] = []

    @given(MESSAGES)
    def draw(messages: list[dict[str, Any]]) -> None:
        drawn.append(messages)

    draw()
    way = contextlib.nullcontext(box) if template is None else with_template(box, template)
    async with way as asked:
        known = {n: await template_of(asked, kind) for n, kind in enumerate(KINDS)}
        taken = 0
        for number, messages in enumerate(drawn):
            kind, known_template = KINDS[number % len(KINDS)], known[number % len(KINDS)]
            plain = known_template.adapter.plain(messages)
            ready = None
            if plain is not None:
                with contextlib.suppress(ValueError):  # of a text that fastokens refuses
                    ready = known_template.request(plain, {"max_tokens": 1}, "id")
            if ready is not None:
                taken += 1
                expected = await rendered(asked, kind | {"messages": messages})
                assert ready.request.prompt_token_ids == expected, messages
    assert taken > len(drawn) / 3


async def template_of(box: Box, kind: dict[str, Any]) -> Any:
    await box.ask(CHATS, user(FOX) | kind | {"max_tokens": 1, "stream": True})
    return next(
        reversed(box.serving._fast_paths[EndpointId.CHAT_COMPLETIONS]._templates.kept.values())
    )


async def rendered(box: Box, body: dict[str, Any]) -> list[int] | None:
    """The prompt that vLLM makes of a chat; None if it refuses it."""
    handler = box.serving._fast_paths[EndpointId.CHAT_COMPLETIONS]._serving
    made = await handler.render_chat_request(ChatCompletionRequest(model="chat", **body))
    if not isinstance(made, tuple):
        return None
    ids: list[int] = made[1][0]["prompt_token_ids"]
    return ids


# --- errors

LONG_TEXT = "word " * 3000
BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt too long": (CHATS, user("word " * 1500) | {"max_tokens": 4}),
    "prompt far too long": (CHATS, user(LONG_TEXT)),
    "text too long": (COMPLETIONS, {"prompt": "one two " * 1000, "max_tokens": 4}),
    "no messages": (CHATS, {"messages": []}),
    "a message that is no object": (CHATS, {"messages": ["hi"], "max_tokens": 8}),
    "no content": (CHATS, {"messages": [{"role": "user"}], "max_tokens": 8}),
    "an empty content": (CHATS, user("") | {"max_tokens": 8}),
    "content that is null": (
        CHATS,
        {"messages": [{"role": "user", "content": None}], "max_tokens": 8},
    ),
    "an unknown role": (
        CHATS,
        {"messages": [{"role": "robot", "content": "hi"}], "max_tokens": 8},
    ),
    "no tokens": (CHATS, user(FOX) | {"max_tokens": 0}),
    "fewer than no tokens": (CHATS, user(FOX) | {"max_tokens": -1}),
    "a limit that is no number": (CHATS, user(FOX) | {"max_tokens": "many"}),
    "a limit that is half a number": (CHATS, user(FOX) | {"max_tokens": 1.5}),
    "a seed beyond 64 bits": (CHATS, user(FOX) | {"seed": 2**63}),
    "a seed beyond 64 bits, completions": (COMPLETIONS, prompt(FOX) | {"seed": 2**64 - 1}),
    "a limit that leaves no room for a text": (COMPLETIONS, prompt("one two " * 990)),
    "a limit that leaves no room for a chat": (CHATS, user("one two " * 980)),
    "a limit of just the context": (COMPLETIONS, {"prompt": "one two " * 990, "max_tokens": 2048}),
    "a limit above the context": (COMPLETIONS, {"prompt": "one two " * 990, "max_tokens": 2049}),
    "a limit beyond the context": (CHATS, user(FOX) | {"max_tokens": 99_999}),
    "a limit beyond 32 bits": (CHATS, user(FOX) | {"max_tokens": 2**40}),
    "a limit beyond 64 bits": (CHATS, user(FOX) | {"max_tokens": 2**64 - 1}),
    "a temperature below zero": (CHATS, user(FOX) | {"temperature": -1}),
    "no prompt": (COMPLETIONS, {"max_tokens": 4}),
    "an empty prompt": (COMPLETIONS, {"prompt": "", "max_tokens": 4}),
    "too many logprobs": (COMPLETIONS, prompt(FOX) | {"logprobs": 99}),
}


@pytest.mark.parametrize("name", BAD)
async def test_template_leaves_error_messages_unchanged(box: Box, name: str) -> None:
    path, body = BAD[name]
    body = body | {"stream": True}
    with box.vllm_path():
        expected = await box.ask(path, body)
    fresh = await box.ask(path, body)
    box.forget()
    good = (user(FOX) if path == CHATS else prompt(FOX)) | {"stream": True}
    for known in ({"max_tokens": 4}, {"max_tokens": 4, "seed": 1}):
        await box.ask(path, good | known)
        assert await asked_by_template(box, path, good | known)
    templated = await box.ask(path, body)
    for got in (fresh, templated):
        assert got.status_code == expected.status_code, got.text
        if expected.status_code == 200:
            assert_same(seen(got), seen(expected))
        else:
            assert got.json() == expected.json()
            assert got.headers == expected.headers


async def test_fast_path_failed_request_ends_as_vllms(box: Box) -> None:
    body = user(FOX) | {"seed": FAILS, "stream": True}
    with box.vllm_path():
        *_, expected, end = events((await box.ask(CHATS, body)).text)
    assert end == "[DONE]"
    assert expected["error"]["code"] == "engine_error"
    with box.handler_calls() as calls:
        for _ in range(2):
            reply = await box.ask(CHATS, body)
            first, *_, failure, done = events(reply.text)
            assert reply.status_code == 200
            assert first["choices"][0]["delta"]["role"] == "assistant"
            assert (failure, done) == (expected, end)
    assert len(calls) == 1
    assert await box.core("running") == 0


async def read(stream: AbstractAsyncContextManager[httpx.Response], began: asyncio.Event) -> str:
    """The text of a stream; `began` is set at its first part."""
    async with stream as reply:
        parts = []
        async for part in reply.aiter_text():
            parts.append(part)
            began.set()
        return "".join(parts)


async def test_fast_path_dead_engine_gives_event_or_503() -> None:
    restarts = LifecycleTimings(first_restart_s=0.01)  # each new start finds it dead
    long = {"model": "chat", "prompt": FOX, "max_tokens": 1900, "stream": True}
    killing = {"model": "chat", "prompt": "die", "seed": DIES_AT_ONCE, "stream": True}
    async with (
        boxed(timings=restarts) as box,
        listening(box.app) as url,
        httpx.AsyncClient(timeout=30) as client,
    ):
        reading = []
        for way in (box.vllm_path(), contextlib.nullcontext(), contextlib.nullcontext()):
            began = asyncio.Event()
            with way:
                stream = client.stream("POST", url + COMPLETIONS, json=long)
                reading.append(asyncio.create_task(read(stream, began)))
                await soon(began.wait(), 60)
        refused = await client.post(url + COMPLETIONS, json=killing)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_dead"
        for task in reading:
            *_, failure, done = [part for part in (await soon(task, 60)).split("\n\n") if part]
            assert done == "data: [DONE]"
            assert json.loads(failure[6:])["error"]["code"] == "engine_dead"
        # By template, for the first time, and by vLLM's generator.
        later = [await box.ask(COMPLETIONS, long) for _ in range(2)]
        later.append(await box.ask(COMPLETIONS, long | {"user": "me"}))
        with box.vllm_path():
            later.append(await box.ask(COMPLETIONS, long))
        for reply in later:  # it is being started again
            code = reply.json()["error"]["code"]
            assert (reply.status_code, code in {"model_not_ready", "engine_dead"}) == (503, True)


# --- what goes vLLM's path

LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "two choices": (CHATS, user(FOX) | {"n": 2, "max_tokens": 8}),
    "logprobs": (COMPLETIONS, prompt(FOX) | {"logprobs": 1}),
    "logprobs of a chat": (CHATS, user(FOX) | {"logprobs": True, "top_logprobs": 1}),
    "echo": (COMPLETIONS, prompt(FOX) | {"echo": True}),
    "token ids": (COMPLETIONS, prompt(FOX) | {"return_token_ids": True}),
    "token ids of a chat": (CHATS, user(FOX) | {"return_token_ids": True}),
    "usage all the time": (
        CHATS,
        user(FOX) | {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ),
    "tools": (
        CHATS,
        user(FOX)
        | {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    ),
    "two prompts": (COMPLETIONS, {"prompt": [FOX, CJK], "max_tokens": 40}),
}


TOOL = {"type": "function", "function": {"name": "f"}}
PARSED: dict[str, dict[str, Any]] = {
    "tools": {"tools": [TOOL]},
    "tools that are not to be called": {"tools": [TOOL], "tool_choice": "none"},
    "hidden reasoning": {"include_reasoning": False},
}


@pytest.mark.parametrize("name", PARSED)
async def test_what_a_parser_may_change_goes_the_vllm_path(parsing: Box, name: str) -> None:
    before = parsing.written
    for _ in range(2):
        reply = await parsing.ask(CHATS, user(FOX) | PARSED[name] | {"stream": True})
        assert FOX in seen(reply).text
    assert parsing.written == before


def test_passes_text_through_needs_delegating_parser() -> None:
    from vllm.parser import ParserManager
    from vllm.tool_parsers import ToolParserManager

    from llmserve.engine.fastpath.guards import passes_text_through

    def parser(tools: str | None, reasoning: str = "") -> Any:
        return ParserManager.get_parser(tools, reasoning, enable_auto_tools=True)

    assert passes_text_through(None)
    assert passes_text_through(parser("hermes"))
    assert passes_text_through(parser("llama3_json"))
    assert not passes_text_through(parser("hermes", "qwen3"))
    assert not passes_text_through(parser(None, "qwen3"))
    assert not passes_text_through(parser("kimi_k3"))
    assert not passes_text_through(parser("hf"))
    engine_based = [
        name
        for name in ToolParserManager.list_registered()
        if ToolParserManager.get_tool_parser(name).engine_based_streaming
    ]
    assert engine_based
    assert not any(passes_text_through(parser(name)) for name in engine_based)


@pytest.mark.parametrize("name", LONG)
async def test_what_is_more_than_text_goes_the_vllm_path(box: Box, name: str) -> None:
    path, body = LONG[name]
    before = box.written
    for _ in range(2):
        reply = await box.ask(path, body | {"stream": True})
        assert reply.status_code == 200, reply.text
        *chunks, done = events(reply.text)
        assert done == "[DONE]"
        texts = dict.fromkeys(range(2), "")
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice.get("text") or choice.get("delta", {}).get(
                    "content", ""
                )
        assert texts[0]
        if "two" in name:
            assert texts[1]
        else:
            assert FOX in texts[0]
    assert box.written == before


async def test_what_vllm_adds_on_the_vllm_path_is_there(box: Box) -> None:
    path, body = LONG["usage all the time"]
    *chunks, _ = events((await box.ask(path, body | {"stream": True})).text)
    assert all(chunk["usage"]["total_tokens"] > 0 for chunk in chunks)
    path, body = LONG["logprobs of a chat"]
    *chunks, _ = events((await box.ask(path, body | {"stream": True})).text)
    assert any(chunk["choices"][0]["logprobs"] for chunk in chunks)
    path, body = LONG["token ids"]
    *chunks, _ = events((await box.ask(path, body | {"stream": True})).text)
    ids = [token for chunk in chunks for token in chunk["choices"][0]["token_ids"]]
    assert len(ids) == body["max_tokens"]


# --- clients that leave


@pytest.mark.parametrize("known", [False, True], ids=["first", "by template"])
@pytest.mark.parametrize("silent", [False, True], ids=["in mid-stream", "before the first token"])
async def test_a_client_that_leaves_has_its_request_aborted(
    box: Box, known: bool, silent: bool
) -> None:
    body = {"model": "chat", "prompt": FOX, "max_tokens": 2000, "stream": True, "seed": 1}
    if known:
        await box.ask(COMPLETIONS, body | {"max_tokens": 1})
        assert await asked_by_template(box, COMPLETIONS, body | {"max_tokens": 1})
    before = await box.core("aborted")
    asking = body | {"seed": SILENT if silent else 1}
    async with listening(box.app) as url, httpx.AsyncClient(timeout=30) as client:
        if silent:
            waiting = asyncio.ensure_future(client.post(url + COMPLETIONS, json=asking))
            await box.until_core("running", differs_from=0)
            waiting.cancel()
            await asyncio.wait({waiting})
        else:
            async with client.stream("POST", url + COMPLETIONS, json=asking) as reply:
                await anext(reply.aiter_bytes())
        await box.until_core("aborted", differs_from=before)
    assert await box.core("aborted") == before + 1
    assert await box.core("running") == 0
    assert not box.serving.engine.client.output_processor.request_states
    await until(lambda: box.services.pool.models["chat"].slots.in_flight == 0)


async def test_a_request_that_ended_is_not_aborted(box: Box) -> None:
    before = await box.core("aborted")
    for _ in range(2):
        await box.ask(COMPLETIONS, prompt(FOX) | {"stream": True})
    assert await box.core("aborted") == before


async def test_a_stop_string_ends_the_request_in_the_engine(box: Box) -> None:
    before = await box.core("aborted")
    body = {"prompt": FOX, "stop": ["ck bro"], "max_tokens": 2000, "stream": True}
    await box.ask(COMPLETIONS, body)
    await box.until_core("aborted", differs_from=before)
    assert await box.core("running") == 0


async def test_concurrent_streams_get_their_own_texts(box: Box) -> None:
    async def ask(n: int) -> None:
        text = f"number {n} {EMOJI}"
        body = {"prompt": text, "max_tokens": 150, "stream": True, "seed": (1, TRIPLES)[n % 2]}
        answer = seen(await box.ask(COMPLETIONS, body)).text
        assert answer.startswith(text)
        assert REPLACEMENT not in answer

    await asyncio.gather(*(ask(n) for n in range(24)))


# --- figures

# Observed once per step of the engine, of which there are more when it is told to stop.
_PER_STEP = "vllm:iteration_tokens_total"


def counted(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """How counters, the counts of histograms, and sums of tokens have grown."""
    return {
        name: value - before.get(name, 0.0)
        for name, value in after.items()
        if name.startswith("vllm:") and not name.startswith(_PER_STEP)
        if re.search(r"(_total|_count)( |$)|tokens\w*_sum$", name)
    }


async def test_vllms_figures_grow_alike_on_all_ways(box: Box) -> None:
    bodies = [
        (CHATS, user(FOX) | {"stream": True}),
        (CHATS, user(EMOJI) | {"stream": True, "seed": TRIPLES}),
        (COMPLETIONS, prompt(FOX) | {"stream": True, "stop": ["ck bro"]}),
        (COMPLETIONS, prompt(FOX) | {"stream": True, "stop_token_ids": [FOX_ID]}),
        (COMPLETIONS, {"prompt": FOX, "stream": True, "max_tokens": 1}),
        (CHATS, user(FOX)),
        (CHATS, user(FOX) | {"seed": TRIPLES}),
    ]

    async def growth() -> dict[str, float]:
        before = box.figures()
        for path, body in bodies:
            await box.ask(path, body)
        return counted(before, box.figures())

    with box.vllm_path(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("llmserve.engine.fastpath.output_processor._is_final_only", lambda _: False)
        expected = await growth()
    for name, least in {
        "vllm:generation_tokens_total": 300,
        "vllm:prompt_tokens_total": 100,
        "vllm:time_to_first_token_seconds_count": len(bodies),
        "vllm:inter_token_latency_seconds_count": 200,
        "vllm:e2e_request_latency_seconds_count": len(bodies),
        "vllm:request_success_total stop": 2,
    }.items():
        assert expected[name] >= least, name
    assert await growth() == expected
    assert await growth() == expected


async def test_inter_token_latencies_sum_to_decode_time(box: Box) -> None:
    def sums() -> tuple[float, float]:
        figures = box.figures()
        return (
            figures["vllm:inter_token_latency_seconds_sum"],
            figures["vllm:request_decode_time_seconds_sum"],
        )

    before = sums()
    await asyncio.gather(
        *(box.ask(CHATS, user(f"{FOX} {n}") | {"stream": n % 3 > 0}) for n in range(9))
    )
    gaps, decoding = (after - start for after, start in zip(sums(), before, strict=True))
    assert gaps == pytest.approx(decoding)
    assert gaps > 0


async def test_the_buckets_of_the_inter_token_latency_hold_every_token(box: Box) -> None:
    await box.ask(CHATS, user(FOX) | {"stream": True})
    (family,) = [
        f for f in box.serving.registry.collect() if f.name == "vllm:inter_token_latency_seconds"
    ]
    samples = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    top = samples["vllm:inter_token_latency_seconds_bucket", "+Inf"]
    assert top == samples["vllm:inter_token_latency_seconds_count", None] > 0


# --- the context of a request


async def context_and_usage(box: Box, path: str, body: dict[str, Any]) -> tuple[Any, Any]:
    """What the request's context counts, and what its answer does: tokens in and out."""
    scopes: list[Any] = []

    async def recording(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        await box.app(scope, receive, send)

    transport = httpx.ASGITransport(recording)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        reply = await client.post(path, json={"model": "chat"} | body)
    assert reply.status_code == 200, reply.text
    context = RequestContext.of(scopes[0])
    usage = _usage_in(events(reply.text) if body.get("stream") else [reply.json()])
    counts = [usage.get(f"{old}_tokens", usage.get(f"{new}_tokens")) for old, new in _NAMES]
    return [context.prompt_tokens, context.generated_tokens], counts


_NAMES = (("prompt", "input"), ("completion", "output"))


def _usage_in(found: list[Any]) -> dict[str, Any]:
    """The keys of the last `usage`; of a stream of /v1/messages the last has both counts."""
    parts = [
        part for each in found if isinstance(each, dict) for part in (each, each.get("response"))
    ]
    usages: list[dict[str, Any]] = [part["usage"] for part in parts if part and part.get("usage")]
    return usages[-1]


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHATS, user(FOX) | {"max_tokens": 3}),
        (COMPLETIONS, {"prompt": FOX, "max_tokens": 3}),
        ("/v1/messages", user(FOX) | {"max_tokens": 3}),
        ("/v1/responses", {"input": FOX, "max_output_tokens": 3}),
    ],
    ids=["chat", "completions", "messages", "responses"],
)
async def test_context_counts_the_tokens_of_the_answers_usage(
    box: Box, path: str, body: dict[str, Any], streamed: bool
) -> None:
    body = body | {"stream": streamed}
    if streamed and path in {CHATS, COMPLETIONS}:
        body["stream_options"] = {"include_usage": True}
    for _ in range(2):  # the second by template, where there is one
        context, usage = await context_and_usage(box, path, body)
        assert context == usage
        assert None not in usage
    with box.vllm_path():
        context, _ = await context_and_usage(box, path, body)
    assert context == usage


# --- the names of vLLM's and prometheus_client's that this rests on


async def test_a_requests_state_has_what_outputs_reads(box: Box) -> None:
    from vllm.v1.engine.output_processor import OutputProcessor

    processor = box.serving.engine.client.output_processor
    assert isinstance(processor, OutputProcessor)
    asking = asyncio.ensure_future(box.ask(CHATS, user(FOX) | {"seed": SILENT}))
    await until(lambda: bool(processor.request_states))
    (state,) = processor.request_states.values()
    parts = {
        "state": (
            state,
            "request_id is_prefilling detokenizer stats queue output_kind parent_req "  # noqa: ISC004
            "streaming_input logprobs_processor prompt_len make_request_output",
        ),
        "stats": (state.stats, "num_generation_tokens last_token_ts arrival_time"),
        "detokenizer": (
            state.detokenizer,
            "token_ids stop decode_next update get_next_output_text stream"  # noqa: ISC004
            " skip_special_tokens spaces_between_special_tokens",
        ),
        "logprobs": (state.logprobs_processor, "num_logprobs num_prompt_logprobs"),
    }
    asking.cancel()
    await asyncio.wait({asking})
    await until(lambda: not processor.request_states)
    missing = [
        f"{name}.{field}"
        for name, (owner, fields) in parts.items()
        for field in fields.split()
        if not hasattr(owner, field)
    ]
    assert not missing, (
        f"llmserve/engine/fastpath/output_processor.py uses what this vLLM has moved: {missing}"
    )


def test_a_steps_statistics_have_what_outputs_writes() -> None:
    from vllm.v1.metrics.stats import IterationStats

    stats = IterationStats()
    assert stats.num_generation_tokens == 0
    assert stats.inter_token_latencies_iter == []
    # Ours are kept beside its own.
    assert hasattr(stats, "__dict__"), (
        "llmserve/engine/fastpath/output_processor.py keeps its gaps there"
    )


def test_a_histogram_takes_many_as_it_takes_one() -> None:
    from prometheus_client import CollectorRegistry, Histogram

    from llmserve.engine.metrics import WeightedHistogram

    bounds = (0.1, 0.5, 1.0)
    registries = CollectorRegistry(), CollectorRegistry()
    ours = WeightedHistogram("h", "H", ("model",), registry=registries[0], buckets=bounds).labels(
        "m"
    )
    theirs = Histogram("h", "H", ("model",), registry=registries[1], buckets=bounds).labels("m")
    values = ((7.0, 5), (0.05, 3), (0.1, 2), (0.11, 1), (1.0, 4), (0.2, 0))
    for n, (value, count) in enumerate((*values, *values)):
        if n < len(values):
            ours.observe_many(value, count)
        for _ in range(count):
            theirs.observe(value)
            if n >= len(values):
                ours.observe(value)
    assert len(ours._pending) == 15

    def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
        return {
            (sample.name, sample.labels.get("le", "")): sample.value
            for family in registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    for _ in range(2):  # and not again at the next look
        assert samples(registries[0]) == pytest.approx(samples(registries[1]))


async def test_every_histogram_of_the_engine_is_entered_in_time(box: Box) -> None:
    """One that is not would remember every value until somebody looks at its figures."""
    from llmserve.engine.metrics import WeightedHistogram

    (logger,) = box.serving.engine.client.logger_manager.stat_loggers
    collectors = set(box.serving.registry._collector_to_names)
    histograms = [each for each in collectors if isinstance(each, WeightedHistogram)]
    children = [child for each in histograms for child in each._metrics.values()]
    immediate = {"llmserve_stream_lag_seconds"}
    entered = set(map(id, logger._histograms))
    assert len(children) > 10
    assert {c._name for c in children if id(c) not in entered} == immediate
    await box.ask(COMPLETIONS, prompt(FOX) | {"stream": True})
    logger._metrics.record_pending()
    assert not any(child._pending for child in logger._histograms)
