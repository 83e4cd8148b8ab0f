"""The number of tokens of a prompt that is too long.

vLLM truncates such a prompt just above the limit, so its error message has no exact count. The
tokenizer reads the whole text anyway; here it keeps the ids of up to LIMIT tokens. For /tokenize,
where vLLM has no limit, it keeps no more either.
"""

from __future__ import annotations

import re
from functools import wraps
from typing import TYPE_CHECKING, Any

from vllm.renderers.params import TokenizeParams

if TYPE_CHECKING:
    from collections.abc import Callable

LIMIT = 500_000
_CONTAINS = re.compile(r"contains (?:at least )?(\d+) input tokens")


def corrected(message: str) -> str:
    """Return vLLM's message with "at least" only where the count is a lower bound."""
    return _CONTAINS.sub(_contains, message)


def _contains(found: re.Match[str]) -> str:
    bound = "at least " if int(found[1]) > LIMIT else ""
    return f"contains {bound}{found[1]} input tokens"


def _counting_whole(encode_kwargs: Callable[[TokenizeParams], dict[str, Any]]) -> Any:
    @wraps(encode_kwargs)
    def get_encode_kwargs(self: TokenizeParams) -> dict[str, Any]:
        kwargs = encode_kwargs(self)
        if self.truncate_prompt_tokens is None:
            kwargs["max_length"] = max(kwargs["max_length"] or 0, LIMIT + 1)
            kwargs["truncation"] = True
        return kwargs

    return get_encode_kwargs


def count_whole_prompts() -> None:
    """Count whole prompts in all engines of this process: the method belongs to the class."""
    if not hasattr(TokenizeParams.get_encode_kwargs, "__wrapped__"):
        TokenizeParams.get_encode_kwargs = _counting_whole(TokenizeParams.get_encode_kwargs)
