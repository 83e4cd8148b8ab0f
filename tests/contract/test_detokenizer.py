"""The table of texts against Hugging Face's `DecodeStream`, which vLLM uses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from tokenizers.decoders import DecodeStream

from tests.contract.conftest import CHAT, EMBED

TEXTS = [
    "The quick brown fox, isn't it? 12,345.67",
    "東京は日本の首都です 👨‍👩‍👧‍👦 🏳️‍🌈 नमस्ते",
    "\u200b\ufeff  spaces \t\n\n and \x00 \x7f",
]


@cache
def tokenizer(folder: str) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


def by_table(ids: list[int]) -> list[str]:
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    from llmserve.detokenizer import ByTable, text_table

    table = text_table(tokenizer(str(CHAT)), "chat")
    assert table is not None
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        mm_features=None,
        sampling_params=SamplingParams(),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    detokenizer: Any = IncrementalDetokenizer.from_new_request(tokenizer(str(CHAT)), request)
    assert ByTable.take_over(detokenizer, table)
    return [detokenizer.decode_next(token) for token in ids]


def by_stream(ids: list[int]) -> list[str]:
    backend = tokenizer(str(CHAT))._tokenizer
    stream = DecodeStream(ids=[1, 2, 3], skip_special_tokens=True)
    return [stream.step(backend, token) or "" for token in ids]


@pytest.mark.parametrize("text", TEXTS)
def test_each_piece_is_what_a_decode_stream_gives(text: str) -> None:
    ids = tokenizer(str(CHAT)).encode(text)
    assert by_table(ids) == by_stream(ids)
    assert "".join(by_table(ids)) == text


def test_the_rest_of_a_character_that_was_begun_is_waited_for() -> None:
    ids = tokenizer(str(CHAT)).encode("a 🦩 b")
    special = tokenizer(str(CHAT)).all_special_ids[0]
    begun = ids[:3]
    assert "" in by_table(begun)
    assert by_table([*begun, special, *ids[3:]]) == by_stream([*begun, special, *ids[3:]])


def test_a_tokenizer_that_is_not_byte_level_has_no_table() -> None:
    from llmserve.detokenizer import text_table

    assert text_table(tokenizer(str(EMBED)), "embed") is None


def test_a_table_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmserve import detokenizer

    monkeypatch.setattr(detokenizer, "_text", lambda token, _: token)
    assert detokenizer.text_table(tokenizer(str(CHAT)), "chat") is None
