"""Token ids to text for /detokenize, without holding the GIL."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from vllm.tokenizers.hf import ThreadSafeHFTokenizerMixin
from vllm.utils.async_utils import make_async

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer
    from vllm.renderers.base import BaseRenderer


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
