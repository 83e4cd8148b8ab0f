"""The README's first answer is no close call, in whatever way a machine rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.contract.support import CHAT
from tests.readme import ANSWER, ASKED, REPLY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN = 1.0  # nats; between two CPUs a logit in bfloat16 differs by some tenths


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(CHAT)
    return loaded


def prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    text = tokenizer.apply_chat_template(
        ASKED["messages"], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """With the token that ends it."""
    tokens = tokenizer(ANSWER, add_special_tokens=False)["input_ids"]
    return [*tokens, tokenizer.eos_token_id]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_of_the_first_answer_is_far_ahead(
    tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(CHAT, dtype=dtype).eval()
    asked, said = prompt(tokenizer), answer(tokenizer)
    with torch.no_grad():
        logits = model(torch.tensor([asked + said])).logits[0].float()
    # The logits at a place are those of the token after it.
    margins = [_margin(logits[len(asked) - 1 + n], token) for n, token in enumerate(said)]
    assert min(margins) >= MARGIN, margins


def _margin(logits: torch.Tensor, token: int) -> float:
    """Of a token over the best of all others."""
    others = logits.clone()
    others[token] = -torch.inf
    return float(logits[token] - others.max())


def test_the_readme_counts_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    asked, said = len(prompt(tokenizer)), len(answer(tokenizer))
    assert REPLY["usage"] == {
        "prompt_tokens": asked,
        "total_tokens": asked + said,
        "completion_tokens": said,
    }
    assert said <= ASKED["max_tokens"]
    assert ASKED["temperature"] == 0
