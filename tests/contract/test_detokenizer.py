"""The table of texts against Hugging Face's `DecodeStream`, which vLLM uses."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from llmserve.engine.fastpath import detokenizer
from llmserve.engine.fastpath.detokenizer import TableDetokenizer, exclude_prompt, text_table
from tests.contract.support import CHAT, EMBED

TEXTS = [
    "The quick brown fox, isn't it? 12,345.67",
    "東京は日本の首都です 👨‍👩‍👧‍👦 🏳️‍🌈 नमस्ते",
    "\u200b\ufeff  spaces \t\n\n and \x00 \x7f",
]


@cache
def tokenizer(folder: str) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def detokenizer_of(tokens: Any, prompt: list[int], **params: Any) -> Any:
    """vLLM's own, for an answer to `prompt`."""
    request = EngineCoreRequest(
        request_id="r",
        prompt_token_ids=prompt,
        mm_features=None,
        sampling_params=SamplingParams(**params),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=None,
        data_parallel_rank=None,
    )
    return IncrementalDetokenizer.from_new_request(tokens, request)


def by_table(ids: list[int], prompt: list[int] | None = None) -> list[str]:
    table = text_table(tokenizer(str(CHAT)), "chat")
    assert table is not None
    detokenizer = detokenizer_of(tokenizer(str(CHAT)), prompt or [1, 2, 3])
    assert TableDetokenizer.take_over(detokenizer, table)
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
    assert text_table(tokenizer(str(EMBED)), "embed") is None


def test_a_table_that_disagrees_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detokenizer, "_text", lambda token, _: token)
    assert detokenizer.text_table(tokenizer(str(CHAT)), "chat") is None


# --- prompts that end in U+FFFD, or in part of a character

FAMILY = "Family: 👨‍👩‍👧 end \N{REPLACEMENT CHARACTER}"


def crooked() -> list[list[int]]:
    ids = tokenizer(str(CHAT)).encode(FAMILY)
    half = tokenizer(str(CHAT)).encode("half a 🦩")[:-1]
    return [ids, ids + tokenizer(str(CHAT)).all_special_ids[:1], half, half[-2:]]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("shown", [False, True], ids=["skipped", "special tokens shown"])
def test_decode_after_crooked_prompt_is_answer_alone(number: int, *, shown: bool) -> None:
    tokens = tokenizer(str(CHAT))
    table = text_table(tokens, "chat")
    assert table is not None
    detokenizer = detokenizer_of(tokens, crooked()[number], skip_special_tokens=not shown)
    assert TableDetokenizer.take_over(detokenizer, table) is not shown
    answer = "A flamingo 🦩, a family 👨‍👩‍👧."
    pieces = [detokenizer.decode_next(token) for token in tokens.encode(answer)]
    assert "".join(pieces) == answer


@cache
def pieces_of_words() -> Any:
    """A tokenizer whose texts depend on what is before: spaces, and bytes as a fallback."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for piece in ("<unk>", "▁", "▁a", "▁word", "s"):
        vocabulary[piece] = len(vocabulary)
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("end", ["", "\N{REPLACEMENT CHARACTER}", "🦩", "half"])
def test_decode_without_table_is_answer_alone(end: str) -> None:
    tokens = pieces_of_words()
    assert text_table(tokens, "words") is None
    word, a = tokens.convert_tokens_to_ids(["▁word", "▁a"])
    ended = "🦩".encode()[:2] if end == "half" else end.encode()
    prompt = [a, word, *ended]  # a byte's id is its value
    answer = [word, *"🦩".encode(), a]
    detokenizer = detokenizer_of(tokens, prompt)
    exclude_prompt(detokenizer, prompt)
    assert "".join(detokenizer.decode_next(token) for token in answer) == " word🦩 a"


def test_exclude_prompt_prompt_of_whole_text_keeps_stream() -> None:
    prompt = tokenizer(str(CHAT)).encode("whole")
    detokenizer = detokenizer_of(tokenizer(str(CHAT)), prompt)
    before = detokenizer.stream
    exclude_prompt(detokenizer, prompt)
    assert detokenizer.stream is before
