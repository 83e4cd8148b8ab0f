"""How many tokens a prompt has that is too long.

vLLM cuts such a prompt just beyond what fits, so its refusal does not know. The tokenizer
goes through the whole text in any case; here it keeps the ids of up to LIMIT tokens.
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


def exact(message: str) -> str:
    """vLLM's words without the doubt that does not apply, and with the one that does."""
    return _CONTAINS.sub(_contains, message)


def _contains(found: re.Match[str]) -> str:
    doubt = "at least " if int(found[1]) > LIMIT else ""
    return f"contains {doubt}{found[1]} input tokens"


def _whole(encode_kwargs: Callable[[TokenizeParams], dict[str, Any]]) -> Any:
    @wraps(encode_kwargs)
    def get_encode_kwargs(self: TokenizeParams) -> dict[str, Any]:
        kwargs = encode_kwargs(self)
        fits = kwargs.get("max_length")
        if self.truncate_prompt_tokens is None and fits is not None:
            kwargs["max_length"] = max(fits, LIMIT + 1)
        return kwargs

    return get_encode_kwargs


def count_whole_prompts() -> None:
    """For all engines of this process: the class is vLLM's only place for it."""
    if not hasattr(TokenizeParams.get_encode_kwargs, "__wrapped__"):
        TokenizeParams.get_encode_kwargs = _whole(TokenizeParams.get_encode_kwargs)
