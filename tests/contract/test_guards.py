"""What may take the fast path, against what this vLLM has."""

from __future__ import annotations

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import create_model
from vllm import SamplingParams
from vllm.config import ModelConfig, ObservabilityConfig, SchedulerConfig, VllmConfig
from vllm.entrypoints.generate.base.protocol import StreamOptions
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.parser.abstract_parser import DelegatingParser
from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest

from llmserve.engine.fastpath import guards, known_fields
from llmserve.engine.fastpath.guards import is_known, is_plain, is_repeatable
from llmserve.engine.fastpath.output_processor import StreamingOutputProcessor
from llmserve.engine.fastpath.step_handler import StepHandler
from tests.contract.vllm_source import header_reads, reads, writes

HINT = "look at what this vLLM does with it; then enter it in fastpath/known_fields.py"

# Fields that go vLLM's way, and those that no answer depends on.
LONG_WAY = {
    *("ec_transfer_params", "kv_transfer_params", "vllm_xargs", "stream_interval"),
    *("repetition_detection", "thinking_token_budget", "routed_experts_prompt_start"),
    *("return_mm_kwargs", "return_token_offsets"),
}


@pytest.mark.parametrize("kind", [ChatCompletionRequest, CompletionRequest])
def test_guards_fields_of_requests_are_all_known(kind: Any) -> None:
    known = known_fields.REQUEST_FIELDS | LONG_WAY
    assert set(kind.model_fields) <= known, HINT


def test_guards_list_no_field_that_vllm_lacks() -> None:
    fields = {*ChatCompletionRequest.model_fields, *CompletionRequest.model_fields}
    assert fields == known_fields.REQUEST_FIELDS | LONG_WAY
    assert not known_fields.REQUEST_FIELDS & LONG_WAY
    assert set(StreamOptions.model_fields) == known_fields.STREAM_OPTIONS, HINT
    assert set(EngineCoreRequest.__struct_fields__) >= known_fields.ENGINE_FIELDS
    assert set(SamplingParams.__struct_fields__) >= known_fields.REPEATED


def test_guards_name_every_sampling_parameter() -> None:
    rest = set(SamplingParams.__struct_fields__) - known_fields.REPEATED
    assert rest == {
        *("logprobs", "prompt_logprobs", "flat_logprobs", "logprob_token_ids"),
        *("prompt_logprob_start", "prompt_logprob_token_ids", "detokenize", "stream_interval"),
        *("min_tokens", "bad_words", "_bad_words_token_ids", "structured_outputs", "extra_args"),
        *("repetition_detection", "thinking_token_budget", "routed_experts_prompt_start"),
        *("trace_decode_token_ids", "skip_reading_prefix_cache"),
    }, HINT


CHAT = "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"
COMPLETION = "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion"
BASES = (
    "vllm.entrypoints.generate.base.serving:GenerateBaseServing",
    "vllm.entrypoints.serve.engine.serving:BaseServing",
)
# Attributes of the handlers that must be off, since `HANDLER` lacks them.
OFF = {
    *("enable_prompt_tokens_details", "enable_force_include_usage", "enable_per_request_metrics"),
    *("enable_log_outputs", "request_logger", "has_kv_connector"),
    *("_include_reasoning_tokens_details", "supports_browsing", "browser_tool"),
    *("supports_code_interpreter", "python_tool"),
}


def test_guards_name_every_attribute_of_the_handlers() -> None:
    found = set[str]().union(*map(writes, (CHAT, COMPLETION, *BASES)))
    assert found == known_fields.HANDLER | OFF, HINT


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        (VllmConfig, known_fields.CONFIG | {"speculative_config"}),
        (ObservabilityConfig, known_fields.OBSERVABILITY | {"otlp_traces_endpoint"}),
        (SchedulerConfig, known_fields.SCHEDULER),
        (ModelConfig, known_fields.MODEL | {"skip_tokenizer_init", "enable_prompt_embeds"}),
    ],
)
def test_guards_name_every_field_of_the_config(kind: Any, known: frozenset[str]) -> None:
    assert {each.name for each in fields(kind)} == known, HINT


@pytest.mark.parametrize("kind", known_fields.KNOWN, ids=lambda kind: kind.__name__)
def test_guards_name_every_field_of_an_output(kind: Any) -> None:
    assert set(guards._fields_of(kind)) == known_fields.KNOWN[kind], HINT


def test_handlers_read_the_headers_that_are_known() -> None:
    assert set[str]().union(*map(header_reads, (CHAT, COMPLETION, *BASES))) == {
        *("X-Request-Id", "X-data-parallel-rank", "SESSION_ID_HEADER", "PRIORITY_HEADER"),
    }, "fast_path._HEADERS names them; look at what this one does"


GENERATORS: dict[str, tuple[str, dict[str, set[str]]]] = {
    "chat": (
        f"{CHAT}.chat_completion_stream_generator",
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
        f"{COMPLETION}.completion_stream_generator",
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
        "fastpath/chunk_templates.py stands for this generator; look at what it reads now"
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


def later(kind: Any, *, default: bool = False) -> Any:
    """A class as of a vLLM with one more field."""
    return create_model("Later", __base__=kind, weight_versions=(bool, default))


def test_plain_request_with_field_of_later_vllm_may_not() -> None:
    kind = later(ChatCompletionRequest)
    assert is_plain(kind(messages=[]), SamplingParams())
    assert not is_plain(kind(messages=[], weight_versions=True), SamplingParams())
    is_on = later(ChatCompletionRequest, default=True)
    assert not is_plain(is_on(messages=[]), SamplingParams())


def test_plain_options_with_field_of_later_vllm_may_not() -> None:
    request, kind = chat(), later(StreamOptions)
    request.stream_options = kind(include_usage=True)
    assert is_plain(request, SamplingParams())
    request.stream_options = kind(weight_versions=True)
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


class LaterParams(SamplingParams):
    """As of a vLLM with one more sampling parameter."""

    weight_versions: bool = False


@pytest.mark.parametrize("is_on", [False, True])
def test_plain_parameters_of_later_vllm_may_not(*, is_on: bool) -> None:
    params = LaterParams(weight_versions=is_on)
    assert is_plain(chat(), params) is not is_on
    assert is_repeatable(chat(), {"type": "token"}, params) is not is_on


def test_repeatable_takes_listed_keys_of_a_prompt_alone() -> None:
    prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": [1], "prompt": "a"}
    assert is_repeatable(chat(), prompt | {"prompt_token_offsets": None}, SamplingParams())
    assert not is_repeatable(chat(), prompt | {"kv_hints": {}}, SamplingParams())


class Off(SimpleNamespace):
    """An object on which everything else is off."""

    def __getattr__(self, _: str) -> None:
        return None


def engine(**model: Any) -> Any:
    config = Off(
        observability_config=Off(),
        scheduler_config=Off(stream_interval=1),
        model_config=Off(**model),
    )
    return Off(vllm_config=config)


def test_open_with_embeddings_as_prompts_is_closed() -> None:
    assert guards.is_open(Off(), engine())
    assert not guards.is_open(Off(), engine(enable_prompt_embeds=True))


def test_open_with_attribute_of_later_vllm_that_is_on_is_closed() -> None:
    handlers = Off(system_fingerprint="known", enable_weight_versions=False)
    assert guards.is_open(handlers, engine(served_model_name="known"))
    handlers.enable_weight_versions = True
    assert not guards.is_open(handlers, engine())
    assert not guards.is_open(Off(), engine(enable_weight_versions=True))
    for part in ("observability_config", "scheduler_config"):
        client = engine()
        getattr(client.vllm_config, part).weight_versions = "all"
        assert not guards.is_open(Off(), client)
    client = engine()
    client.vllm_config.weight_version_config = Off()
    assert not guards.is_open(Off(), client)


def test_open_tells_why_it_is_closed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger=guards.log.name):
        guards.is_open(Off(enable_weight_versions=True), engine(served_model_name="chat"))
    assert "model=chat no fast path: enable_weight_versions" in caplog.text


@pytest.mark.parametrize("kind", known_fields.KNOWN, ids=lambda kind: kind.__name__)
def test_open_with_field_of_later_vllm_is_closed(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = sorted(known_fields.KNOWN[kind])
    monkeypatch.setitem(known_fields.KNOWN, kind, known_fields.KNOWN[kind] - {first})
    assert not guards.is_open(Off(), engine())


def test_output_with_field_of_later_vllm_is_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    known = known_fields.KNOWN
    core = Off(output_processor=SimpleNamespace(), renderer=Off(), engine_core=object())
    client: Any = core
    assert StepHandler.is_complete(client)
    for kind in (EngineCoreOutput, EngineCoreOutputs):
        monkeypatch.setitem(known, kind, known[kind] - {"stop_reason", "timestamp"})
    assert not StepHandler.is_complete(client)
    StreamingOutputProcessor.take_over(client)
    assert type(client.output_processor) is SimpleNamespace


def test_parser_with_attribute_of_later_vllm_does_not_step_aside() -> None:
    class Known(DelegatingParser):
        reasoning_parser_cls = None
        tool_parser_cls = Hermes2ProToolParser

    class Later(DelegatingParser):
        reasoning_parser_cls = None
        tool_parser_cls = Hermes2ProToolParser
        adds_weight_versions = True

    assert guards.passes_text_through(Known)
    assert not guards.passes_text_through(Later)


def test_known_engine_request_has_listed_fields_alone() -> None:
    request = EngineCoreRequest("r", [1], [], SamplingParams(), None, 1.0, None, "salt", None)
    assert is_known(request)
    request.reasoning_ended = True
    assert not is_known(request)


def test_known_engine_request_of_later_vllm_may_not() -> None:
    class Later(EngineCoreRequest):
        weight_versions: bool = False

    bare: Any = ("r", [1], [], SamplingParams(), None, 1.0, None, None, None)
    assert is_known(Later(*bare))
    assert not is_known(Later(*bare, weight_versions=True))
