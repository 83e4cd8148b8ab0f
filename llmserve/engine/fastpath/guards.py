"""Which engines, requests and sampling parameters may take the fast path.

Each list names what may. A field that a later vLLM adds is in no list, so a request that
sets it goes vLLM's way. `tests/contract/test_guards.py` compares the lists with vLLM.
"""

from __future__ import annotations

from inspect import isfunction
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.utils.api_utils import should_include_usage
from vllm.parser.abstract_parser import DelegatingParser
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

if TYPE_CHECKING:
    from collections.abc import Container

    from vllm.parser import Parser
    from vllm.v1.engine.async_llm import AsyncLLM

# Fields of vLLM's chat and completion requests that only decide the prompt, the sampling
# parameters or the other arguments of `generate`. vLLM's handler makes those.
FREE = frozenset(
    """
    model messages prompt stream stream_options max_tokens max_completion_tokens seed user
    frequency_penalty presence_penalty repetition_penalty logit_bias temperature top_p top_k min_p
    stop stop_token_ids include_stop_str_in_output ignore_eos min_tokens length_penalty watermarking
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
    allowed_token_ids bad_words response_format structured_outputs add_generation_prompt
    continue_final_message add_special_tokens documents chat_template chat_template_kwargs
    reasoning_effort media_io_kwargs mm_processor_kwargs priority cache_salt request_id session_id
    tool_choice parallel_tool_calls include_reasoning top_logprobs return_tokens_as_token_ids
    """.split()  # noqa: SIM905  # a list would be a page long
)
# Fields that change the events of a stream, and the values that leave them as they are.
PLAIN: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None,),
    "echo": (None, False),
    "tools": (None, []),
    "use_beam_search": (None, False),
    "return_token_ids": (None, False),
    "return_prompt_text": (None, False),
    "suffix": (None,),
    "prompt_embeds": (None,),
}
STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats"})
# Of sampling parameters: those that may have any value in a recipe, whatever the prompt is.
# The rest depends on the prompt, changes the events, or is checked against `max_tokens`.
REPEATED = frozenset(
    """
    n presence_penalty frequency_penalty repetition_penalty temperature watermarking top_p top_k
    min_p seed stop stop_token_ids ignore_eos max_tokens skip_special_tokens
    spaces_between_special_tokens include_stop_str_in_output output_kind skip_clone
    output_text_buffer_length _eos_token_id _all_stop_token_ids _watermarking_skipped logit_bias
    allowed_token_ids
    """.split()  # noqa: SIM905  # a list would be a page long
)
# Of a request to the engine: what a recipe sets, and what it takes from the first request.
ENGINE_FIELDS = frozenset(
    """
    request_id prompt_token_ids sampling_params arrival_time lora_request cache_salt priority
    external_req_id mm_features pooling_params data_parallel_rank
    """.split()  # noqa: SIM905  # a list would be a page long
)


def is_open(serving: Any, client: AsyncLLM) -> bool:
    """Whether this engine and these handlers do nothing that the fast path leaves out."""
    config = client.vllm_config
    return (
        serving is not None
        and steps_aside(getattr(serving, "parser_cls", None))
        and not serving.enable_prompt_tokens_details
        and not serving.enable_force_include_usage
        and not serving.enable_per_request_metrics
        and not getattr(serving, "enable_log_outputs", False)
        and serving.request_logger is None
        and not serving.has_kv_connector
        and config.observability_config.otlp_traces_endpoint is None
        and config.scheduler_config.stream_interval == 1
        and config.speculative_config is None
        and not config.model_config.is_encoder_decoder
        and not config.model_config.skip_tokenizer_init
        and not config.model_config.enable_prompt_embeds  # texts may not hold its placeholder
    )


def steps_aside(parser: type[Parser] | None) -> bool:
    """Whether there is no parser, or one that passes text on where a request has no tools.

    That is what `DelegatingParser` does with `tool_choice: none`, if it is not told to parse
    reasoning and its tool parser is not one that parses everything
    (vllm/parser/abstract_parser.py, `parse_delta` and `_extract_tool_calls_streaming`).
    """
    if parser is None:
        return True
    return (
        parser.__base__ is DelegatingParser
        and not any(map(isfunction, vars(parser).values()))
        and parser.reasoning_parser_cls is None
        and parser.tool_parser_cls is not None
        and not parser.tool_parser_cls.engine_based_streaming
    )


def is_plain(request: Any, params: Any) -> bool:
    """Whether the stream is text of one choice, in chunks that hold nothing else."""
    _, continuous = should_include_usage(request.stream_options, False)
    return (
        isinstance(params, SamplingParams)
        and params.n == 1
        and params.logprobs is None
        and params.prompt_logprobs is None
        and params.stream_interval is None
        and params.detokenize
        and not continuous
        and _sets_only(request, FREE | PLAIN.keys())
        and _sets_only(request.stream_options, STREAM_OPTIONS)
        and all(_is_one_of(getattr(request, name, None), PLAIN[name]) for name in PLAIN)
    )


def is_repeatable(request: Any, prompt: Any, params: SamplingParams) -> bool:
    """Whether all that depends on the prompt is the prompt and `max_tokens`."""
    return (
        prompt.get("type") == "token"
        and request.truncate_prompt_tokens is None
        and "request_id" not in request.model_fields_set
        and _has_defaults(params, SamplingParams(), REPEATED)
    )


def is_known(request: EngineCoreRequest) -> bool:
    """Whether a request to the engine has no more than a recipe can repeat."""
    bare = EngineCoreRequest("", None, None, None, None, 0.0, None, None, None)
    return _has_defaults(request, bare, ENGINE_FIELDS)


def _sets_only(model: Any, names: Container[str]) -> bool:
    """Fields that vLLM does not have mean nothing to it, and may be set."""
    if model is None:
        return True
    fields = type(model).model_fields
    return all(name in names for name in model.model_fields_set if name in fields)


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """`0` is not `False` here: the number asks for logprobs."""
    return any(type(value) is type(each) and value == each for each in allowed)


def _has_defaults(struct: Any, bare: Any, but: Container[str]) -> bool:
    """An empty list is as good as none."""
    return all(
        getattr(struct, name) in (getattr(bare, name), [])
        for name in struct.__struct_fields__
        if name not in but
    )
