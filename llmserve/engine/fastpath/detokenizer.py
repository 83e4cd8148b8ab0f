"""Token ids to text by table, where a token's text does not depend on its neighbours.

vLLM's detokenizer decodes a window of tokens for every new one (`DecodeStream`, Hugging Face
tokenizers). A byte-level tokenizer concatenates bytes, so the text of a token that is valid UTF-8
is in a table. vLLM's detokenizer decodes tokens that hold part of a character, and those after
them until it is whole.
"""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import tokenizers.decoders
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, uses_fast_detokenizer

log = logging.getLogger(__name__)

Table = list[str | None]  # by token id; None: depends on its neighbours

_TRIALS, _LENGTH = 64, 48  # random sequences on which table and DecodeStream must agree
_PROMPT = 8  # ids of the prompt before each
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_TAIL = 8  # ids at the end of a prompt: enough for a partial character
_CROPPED = 64  # ids at a prompt's end that may be dropped


class TableDetokenizer(FastIncrementalDetokenizer):
    """vLLM's `FastIncrementalDetokenizer` with a table."""

    table: Table
    partial: bool  # the last token ended inside a character

    @classmethod
    def take_over(cls, detokenizer: Any, table: Table) -> bool:
        """Add a table; return False for a detokenizer that it does not fit.

        The stream starts without the prompt: see `exclude_prompt`.
        """
        if type(detokenizer) is not FastIncrementalDetokenizer:
            return False
        _prime(detokenizer, [])
        if not (detokenizer.skip_special_tokens and detokenizer.spaces_between_special_tokens):
            return False
        detokenizer.__class__ = cls
        detokenizer.table = table
        detokenizer.partial = False
        return True

    def decode_next(self, next_token_id: int) -> str:
        if not self.partial and next_token_id < len(self.table):
            known = self.table[next_token_id]
            if known is not None:
                return known
        text: str = super().decode_next(next_token_id)
        self.partial = not text
        return text


def exclude_prompt(detokenizer: Any, prompt: list[int] | None) -> None:
    """Keep the prompt out of an answer whose tokenizer has no table.

    vLLM primes a `DecodeStream` with the prompt. If the prompt ends in U+FFFD or in part of a
    character, the stream's first text would contain the whole prompt. Other prompts stay: without
    a byte-level tokenizer a token's text may depend on the prompt.
    """
    if type(detokenizer) is not FastIncrementalDetokenizer or not prompt:
        return
    end = _clean_end(detokenizer, prompt)
    if end < len(prompt):
        _prime(detokenizer, prompt[:end])


def _clean_end(detokenizer: Any, prompt: list[int]) -> int:
    """Return how many ids of a prompt decode to text that ends in a whole character."""
    for end in range(len(prompt), max(0, len(prompt) - _CROPPED), -1):
        tail = prompt[max(0, end - _TAIL) : end]
        text = detokenizer.tokenizer.decode(
            tail, skip_special_tokens=detokenizer.skip_special_tokens
        )
        if text and not text.endswith(_REPLACEMENT):
            return end
    return 0


def _prime(detokenizer: Any, prompt: list[int]) -> None:
    detokenizer.stream = tokenizers.decoders.DecodeStream(
        ids=prompt, skip_special_tokens=detokenizer.skip_special_tokens
    )


def text_table(tokenizer: Any, name: str) -> Table | None:
    """Return the table of a tokenizer of transformers; None without one. `name` is logged.

    Takes some tenths of a second.
    """
    if not uses_fast_detokenizer(tokenizer):
        return None
    backend = tokenizer._tokenizer  # noqa: SLF001  # as vLLM does
    if not _is_byte_level(json.loads(backend.to_str())):
        return None
    table = _table(backend)
    if _agrees(backend, table):
        return table
    log.warning("model=%s no token table: tokens do not decode one by one", name)
    return None


def _is_byte_level(description: dict[str, Any]) -> bool:
    decoder = description.get("decoder") or {}
    parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
    return all(part.get("type") == "ByteLevel" for part in parts)


def _table(backend: Any) -> Table:
    special = {
        token for token, added in backend.get_added_tokens_decoder().items() if added.special
    }
    alphabet = _alphabet()
    size = max(backend.get_vocab().values(), default=-1) + 1
    return ["" if i in special else _text(backend.id_to_token(i), alphabet) for i in range(size)]


def _text(token: str | None, alphabet: dict[str, int]) -> str | None:
    if not token:
        return None
    try:
        known = all(char in alphabet for char in token)
        return bytes(alphabet[char] for char in token).decode() if known else token
    except UnicodeDecodeError:
        return None


def _alphabet() -> dict[str, int]:
    """Return the characters that represent bytes: GPT-2's `bytes_to_unicode`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def _agrees(backend: Any, table: Table) -> bool:
    """Whether table and `DecodeStream` return the same text after random prompts.

    Excluded are prompts that end in part of a character (`exclude_prompt`), and U+FFFD, which a
    `DecodeStream` takes for part of a character.
    """
    chance = random.Random(0)  # noqa: S311  # the same trials each time
    ids = [i for i, text in enumerate(table) if _REPLACEMENT not in (text or "")]
    whole = [i for i in ids if table[i]]
    if not whole:
        return False
    return all(
        _agrees_on(backend, table, chance.choices(whole, k=_PROMPT), chance.choices(ids, k=_LENGTH))
        for _ in range(_TRIALS)
    )


def _agrees_on(backend: Any, table: Table, prompt: list[int], ids: list[int]) -> bool:
    every = tokenizers.decoders.DecodeStream(ids=prompt, skip_special_tokens=True)
    whole = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
    partial = False
    for token in ids:
        try:
            expected = every.step(backend, token) or ""
            text = None if partial else table[token]
            if text is None:
                text = whole.step(backend, token) or ""
                partial = not text
        except Exception:
            return True  # never valid UTF-8: vLLM starts a new stream here
        if text != expected:
            return False
    return True
