"""Token ids to text by table, where a token's text does not depend on its neighbours.

vLLM's detokenizer decodes a window of tokens for every new one (`DecodeStream`, Hugging
Face tokenizers). A byte-level tokenizer only puts bytes together, so the text of a token
that is whole UTF-8 can be looked up. Tokens that hold part of a character, and what
follows until it is whole, go through vLLM's detokenizer as before.
"""

from __future__ import annotations

import json
import logging
import random
from typing import Any

import tokenizers.decoders
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, uses_fast_detokenizer

log = logging.getLogger(__name__)

Table = list[str | None]  # by token id; None: it takes its neighbours to tell

_TRIALS, _LENGTH = 64, 48  # random sequences that the table must decode as DecodeStream does
_PROMPT = 8  # ids of the prompt before each of them
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_TAIL = 8  # ids at the end of a prompt, enough for a character that is not whole
_CROPPED = 64  # ids of a prompt's end that may be left out


class TableDetokenizer(FastIncrementalDetokenizer):
    """`FastIncrementalDetokenizer`, made by vLLM and then given a table."""

    table: Table
    partial: bool  # a character has begun and is not whole

    @classmethod
    def take_over(cls, detokenizer: Any, table: Table) -> bool:
        """Whether it is one that the table stands for.

        Its stream starts without the prompt, see `start_clean`.
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


def start_clean(detokenizer: Any, prompt: list[int] | None) -> None:
    """Keep the prompt out of an answer whose tokenizer has no table.

    vLLM primes a `DecodeStream` with the prompt. Its text counts as written only if it does
    not end in U+FFFD or in part of a character; otherwise the stream's first text holds the
    whole prompt. Without such an end nothing changes: a token's text may depend on the
    prompt where the tokenizer is not byte-level.
    """
    if type(detokenizer) is not FastIncrementalDetokenizer or not prompt:
        return
    end = _clean_end(detokenizer, prompt)
    if end < len(prompt):
        _prime(detokenizer, prompt[:end])


def _clean_end(detokenizer: Any, prompt: list[int]) -> int:
    """How many ids of a prompt decode to a text that ends in a whole character."""
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
    """The table of a tokenizer of transformers; None if it has none. `name` is for the log.

    Takes some tenths of a second.
    """
    if not uses_fast_detokenizer(tokenizer):
        return None
    backend = tokenizer._tokenizer  # noqa: SLF001  # as vLLM's own takes it
    if not _is_byte_level(json.loads(backend.to_str())):
        return None
    table = _table(backend)
    if _agrees(backend, table):
        return table
    log.warning("model=%s its tokens do not decode one by one", name)
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
    """Characters that stand for bytes: GPT-2's `bytes_to_unicode`."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def _agrees(backend: Any, table: Table) -> bool:
    """Whether the table gives what a `DecodeStream` gives, whatever the prompt was.

    Left out are prompts that end in part of a character, see `start_clean`, and U+FFFD itself,
    which a `DecodeStream` takes for part of a character.
    """
    chance = random.Random(0)  # noqa: S311  # the same trials every time
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
            return True  # not UTF-8 in any way: vLLM starts a new stream there
        if text != expected:
            return False
    return True
