"""What may take the fast path, against what this vLLM has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from vllm import SamplingParams
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.renderers import chat_utils, hf
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.engine import EngineCoreRequest

from llmserve.engine.fastpath import guards
from llmserve.engine.fastpath.guards import is_known, is_plain, is_repeatable
from tests.contract.vllm_source import fingerprint, reads

if TYPE_CHECKING:
    from collections.abc import Callable

SAID = "look at what this vLLM does with it, then enter it in llmserve/engine/fastpath/guards.py"

# Fields that go vLLM's way, and those that no answer depends on.
LONG_WAY = {
    *("ec_transfer_params", "kv_transfer_params", "vllm_xargs", "stream_interval"),
    *("repetition_detection", "thinking_token_budget", "routed_experts_prompt_start"),
    *("mm_payload", "return_mm_kwargs", "return_token_offsets"),
}


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_guards_fields_of_requests_are_all_known(kind: Any) -> None:
    known = guards.FREE | guards.PLAIN.keys() | LONG_WAY
    assert set(kind.model_fields) <= known, SAID


def test_guards_list_no_field_that_vllm_lacks() -> None:
    fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
    assert fields == guards.FREE | guards.PLAIN.keys() | LONG_WAY
    assert not (guards.FREE | guards.PLAIN.keys()) & LONG_WAY
    assert set(StreamOptions.model_fields) == guards.STREAM_OPTIONS, SAID
    assert set(EngineCoreRequest.__struct_fields__) >= guards.ENGINE_FIELDS
    assert set(SamplingParams.__struct_fields__) >= guards.REPEATED


def test_guards_name_every_sampling_parameter() -> None:
    rest = set(SamplingParams.__struct_fields__) - guards.REPEATED
    assert rest == {
        *("logprobs", "prompt_logprobs", "flat_logprobs", "logprob_token_ids"),
        *("prompt_logprob_start", "prompt_logprob_token_ids", "detokenize", "stream_interval"),
        *("min_tokens", "bad_words", "_bad_words_token_ids", "structured_outputs", "extra_args"),
        *("repetition_detection", "thinking_token_budget", "routed_experts_prompt_start"),
        *("trace_decode_token_ids", "skip_reading_prefix_cache"),
    }, SAID


GENERATORS: dict[str, tuple[Callable[..., Any], dict[str, set[str]]]] = {
    "chat": (
        OpenAIServingChat.chat_completion_stream_generator,
        {
            "request": {
                *("echo", "include_reasoning", "logprob_token_ids", "logprobs", "n"),
                *("return_prompt_text", "return_token_ids", "return_tokens_as_token_ids"),
                *("stream_options", "tool_choice", "top_logprobs"),
            },
            "self": {
                *("_convert_generation_error_to_streaming_response", "_create_chat_logprobs"),
                *("_include_reasoning_tokens_details", "_make_parser", "_raise_if_error"),
                *("create_streaming_error_response", "enable_force_include_usage"),
                *("enable_log_deltas", "enable_log_outputs", "enable_per_request_metrics"),
                *("enable_prompt_tokens_details", "get_chat_request_role", "parser_cls"),
                *("request_logger", "system_fingerprint"),
            },
            "res": {
                *("encoder_prompt_token_ids", "num_cache_creation_tokens", "num_cached_tokens"),
                *("outputs", "prompt", "prompt_token_ids"),
            },
            "output": {"finish_reason", "index", "logprobs", "stop_reason", "text", "token_ids"},
            "last_res": {"metrics"},
        },
    ),
    "completions": (
        OpenAIServingCompletion.completion_stream_generator,
        {
            "request": {
                *("echo", "logprob_token_ids", "logprobs", "max_tokens", "n", "stream_options"),
                *("return_token_ids", "return_tokens_as_token_ids"),
            },
            "self": {
                *("_convert_generation_error_to_streaming_response", "_raise_if_error"),
                *("_create_completion_logprobs", "_extract_prompt_text"),
                *("create_streaming_error_response", "enable_force_include_usage"),
                *("enable_per_request_metrics", "enable_prompt_tokens_details"),
                "system_fingerprint",
            },
            "res": {
                *("num_cached_tokens", "outputs", "prompt", "prompt_logprobs"),
                "prompt_token_ids",
            },
            "output": {"finish_reason", "index", "logprobs", "stop_reason", "text", "token_ids"},
            "last_res": {"metrics"},
        },
    ),
}


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("of", ["request", "self", "res", "output", "last_res"])
def test_generator_reads_what_the_fast_path_knows(name: str, of: str) -> None:
    generator, known = GENERATORS[name]
    assert reads(generator, of) == known[of], (
        "llmserve/engine/fastpath/chunk_templates.py and guards.py stand for this generator; look at what it reads now"
    )


# Whatever looks at a chat's messages between the request and its template.
READERS: dict[str, tuple[Callable[..., Any], str]] = {
    function.__qualname__: (function, known)
    for function, known in (
        (chat_utils._parse_chat_message_content, "362d5e341f43"),
        (chat_utils._parse_chat_message_content_parts, "608b97f91061"),
        (chat_utils._parse_chat_message_content_part, "c9af04e0c002"),
        (chat_utils._parse_chat_message_content_mm_part, "0a42688d9796"),
        (chat_utils._strip_claude_code_billing_header, "d0ca6d2c9740"),
        (chat_utils._reject_reserved_placeholder_in_text, "b585ce679bdf"),
        (chat_utils._postprocess_messages, "f927bafdf60c"),
        (chat_utils.parse_chat_messages_async, "c750ea48bbe8"),
        (hf.HfRenderer.render_messages_async, "a893891609f2"),
        (hf.safe_apply_chat_template, "ef32a23ae351"),
        (OnlineRenderer.render_chat, "f6917825da37"),
        (OnlineRenderer.preprocess_chat, "447ee4c1b3a4"),
        (ChatCompletionRequest._normalize_messages_before, "d4508f0c4313"),
        (ChatCompletionRequest._materialize_tool_calls_after, "61c7ea65b3eb"),
    )
}


@pytest.mark.parametrize("name", READERS)
def test_reader_of_messages_is_the_one_that_is_known(name: str) -> None:
    function, known = READERS[name]
    assert fingerprint(function) == known, (
        f"llmserve/engine/fastpath/fast_path.py, `Chat`, stands for {name}; look at what it reads in a text now"
    )


# --- the guards themselves


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(
        messages=[{"role": "user", "content": "hi"}], stream=True, **fields
    )


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(prompt="hi", stream=True, **fields)


def test_plain_request_may_go() -> None:
    more: dict[str, Any] = {"stream_options": {"include_usage": True}, "logprobs": False}
    for request in (chat(), completion(), chat(n=1, **more)):
        assert is_plain(request, SamplingParams())
    assert is_plain(chat(echo=False, metadata={"a": None}, store=True), SamplingParams())


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": True},
        {"return_token_ids": True},
        {"return_prompt_text": True},
        {"logprobs": True},
        {"kv_transfer_params": {"do_remote_decode": True}},
        {"thinking_token_budget": 3},
        {"stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    ],
)
def test_plain_request_with_more_in_its_chunks_may_not(fields: dict[str, Any]) -> None:
    assert not is_plain(chat(**fields), SamplingParams())


def test_plain_zero_logprobs_are_logprobs() -> None:
    assert not is_plain(completion(logprobs=0), SamplingParams())


def test_plain_request_with_field_of_later_vllm_may_not() -> None:
    class Later(ChatCompletionRequest):
        return_weight_versions: bool | None = None

    def later(**fields: Any) -> Later:
        return Later(messages=[{"role": "user", "content": "hi"}], **fields)

    assert is_plain(later(), SamplingParams())
    assert not is_plain(later(return_weight_versions=True), SamplingParams())


def test_plain_options_with_field_of_later_vllm_may_not() -> None:
    class Later(StreamOptions):
        include_weights: bool = False

    request = chat()
    request.stream_options = Later(include_usage=True)
    assert is_plain(request, SamplingParams())
    request.stream_options = Later(include_weights=True)
    assert not is_plain(request, SamplingParams())


@pytest.mark.parametrize(
    "params",
    [
        {"min_tokens": 1},
        {"bad_words": ["x"]},
        {"thinking_token_budget": 5},
        {"extra_args": {"a": 1}},
        {"skip_reading_prefix_cache": True},
        {"routed_experts_prompt_start": 1},
    ],
)
def test_repeatable_takes_listed_parameters_alone(params: dict[str, Any]) -> None:
    prompt = {"type": "token"}
    free = SamplingParams(temperature=0.5, stop=["x"], logit_bias={5: 1.0}, bad_words=[])
    assert is_repeatable(chat(), prompt, free)
    assert not is_repeatable(chat(), prompt, SamplingParams(**params))


class Off(SimpleNamespace):
    """An object on which everything else is off."""

    def __getattr__(self, _: str) -> None:
        return None


def test_open_with_embeddings_as_prompts_is_closed() -> None:
    model = Off()
    config = Off(
        observability_config=Off(), scheduler_config=Off(stream_interval=1), model_config=model
    )
    client: Any = Off(vllm_config=config)
    assert guards.is_open(Off(), client)
    model.enable_prompt_embeds = True
    assert not guards.is_open(Off(), client)


def test_known_engine_request_has_listed_fields_alone() -> None:
    request = EngineCoreRequest("r", [1], [], SamplingParams(), None, 1.0, None, "salt", None)
    assert is_known(request)
    request.reasoning_ended = True
    assert not is_known(request)
