"""Text to token ids and back for /tokenize and /detokenize, without stalling the event loop."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any

from vllm.entrypoints.serve.tokenize.protocol import TokenizeResponse
from vllm.entrypoints.serve.tokenize.serving import ServingTokenization
from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin
from vllm.utils.async_utils import make_async

from llmserve.engine import token_count
from llmserve.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request
    from tokenizers import Tokenizer
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse
    from vllm.renderers.base import BaseRenderer


class BoundedTokenization(ServingTokenization):
    """vLLM's handler of both endpoints, with at most token_count.LIMIT tokens in an answer."""

    async def create_tokenize(
        self, request: Any, raw_request: Request
    ) -> TokenizeResponse | ErrorResponse:
        """Return the ids of a text or chat. Raises RequestError if there are more.

        The strings come from a thread: vLLM looks them up one by one on the event loop.
        """
        with_strings = request.return_token_strs
        request.return_token_strs = False
        answer = await super().create_tokenize(request, raw_request)
        if not isinstance(answer, TokenizeResponse):
            return answer
        if answer.count > token_count.LIMIT:
            raise RequestError(
                f"The text has more than {token_count.LIMIT} tokens, the limit of one answer. "
                "Send it in several requests.",
                param="messages" if hasattr(request, "messages") else "prompt",
            )
        if with_strings:
            convert = self.renderer.get_tokenizer().convert_ids_to_tokens
            answer.token_strs = await asyncio.to_thread(convert, answer.tokens)
        return answer


class BatchDecoder:
    """A tokenizer's backend whose `decode` lets other threads run.

    `Tokenizer.decode` holds the GIL, a tenth of a second for 390,000 ids; `decode_batch`
    releases it. Source: bindings/python/src/tokenizer.rs of tokenizers.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        (text,) = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


def release_gil(renderer: BaseRenderer[Any]) -> None:
    """Make `renderer` decode with a copy of its tokenizer that has a BatchDecoder.

    The copy is of the class below vLLM's pool of tokenizers: `decode_batch` needs no pool.
    Another kind of tokenizer keeps its own `decode`.
    """
    tokenizer: Any = renderer.get_tokenizer()
    if isinstance(tokenizer, ThreadSafeHFTokenizerMixin):
        shared = copy.copy(tokenizer)
        shared.__class__ = type(tokenizer).__bases__[0]
        shared._tokenizer = BatchDecoder(tokenizer._tokenizer)  # noqa: SLF001  # as transformers
        decode = make_async(shared.decode, renderer._executor)  # noqa: SLF001  # test_handlers.py
        renderer._async_tokenizer_decode = decode  # noqa: SLF001  # test_handlers.py
