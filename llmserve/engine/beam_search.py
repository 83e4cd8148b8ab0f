"""Fields of a request that vLLM's beam search drops."""

from __future__ import annotations

from typing import Any

from llmserve.errors import RequestError

# `BeamSearchParams` has no field for them. A seed changes nothing: beam search does not sample.
DROPPED = frozenset(
    {"allowed_token_ids", "bad_words", "frequency_penalty", "logit_bias", "logprob_token_ids"}
    | {"min_p", "min_tokens", "presence_penalty", "prompt_logprobs", "repetition_detection"}
    | {"repetition_penalty", "spaces_between_special_tokens", "stop", "stop_token_ids", "top_k"}
    | {"thinking_token_budget", "top_p", "vllm_xargs", "kv_transfer_params", "ec_transfer_params"}
    | {"routed_experts_prompt_start"}
)
_CONSTRAINTS = ("structured_outputs", "response_format")


def check_beam_search(request: Any) -> None:
    """Raises RequestError for a field that beam search would drop."""
    if not getattr(request, "use_beam_search", False):
        return
    names = DROPPED | (set(_CONSTRAINTS) if hasattr(request, "structured_outputs") else set())
    for name in sorted(names):
        if _is_set(request, name):
            raise _refused(name)
    if getattr(request, "tools", None) and _constrains_calls(request):
        raise _refused("tools")


def _is_set(request: Any, name: str) -> bool:
    """Whether a field has another value than without it."""
    value, field = getattr(request, name, None), type(request).model_fields.get(name)
    if value is None or field is None or getattr(value, "type", None) == "text":
        return False
    neutral = request._DEFAULT_SAMPLING_PARAMS.get(name)  # noqa: SLF001  # no public name of it
    return value not in (neutral, field.get_default(call_default_factory=True), [], {}, "")


def _constrains_calls(request: Any) -> bool:
    """Whether `tools` lead to a constraint: forced, strict or single calls."""
    if request.tool_choice in ("auto", "none", None):
        is_strict = any(tool.function.strict for tool in request.tools)
        return request.tool_choice != "none" and (is_strict or not request.parallel_tool_calls)
    return True


def _refused(name: str) -> RequestError:
    return RequestError(
        f"`{name}` cannot be used with `use_beam_search`, which would ignore it. Remove one of "
        "them.",
        param=name,
    )
