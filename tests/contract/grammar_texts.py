"""Random texts of the grammars that xgrammar compiles."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import Any

import xgrammar as xgr

# One token a character, so that random texts end soon.
VOCABULARY = [*'{}[]",:\\-+.0159aAbBcgiyokelnrtfsuxX_ \n@é', "</s>"]
ENDS = frozenset('"}],')
LENGTH = 300


@cache
def tokenizer() -> xgr.TokenizerInfo:
    return xgr.TokenizerInfo(
        [each.encode() for each in VOCABULARY], stop_token_ids=[len(VOCABULARY) - 1]
    )


def texts(schema: Any, count: int, seed: int) -> list[str]:
    """Some texts that xgrammar allows."""
    compiled = xgr.GrammarCompiler(tokenizer(), cache_enabled=False).compile_json_schema(
        json.dumps(schema)
    )
    chance = random.Random(seed)
    found = (text_of(compiled, chance) for _ in range(count))
    return [text for text in found if text is not None]


def text_of(compiled: xgr.CompiledGrammar, chance: random.Random) -> str | None:
    matcher = xgr.GrammarMatcher(compiled)
    mask = xgr.allocate_token_bitmask(1, len(VOCABULARY))
    text = ""
    for _ in range(LENGTH):
        matcher.fill_next_token_bitmask(mask)
        bits = [int(word) & 0xFFFFFFFF for word in mask[0]]
        allowed = [n for n in range(len(VOCABULARY)) if bits[n // 32] >> n % 32 & 1]
        if not allowed:
            return None
        ends = [n for n in allowed if VOCABULARY[n] in ENDS or n == len(VOCABULARY) - 1]
        token = chance.choice(ends if ends and chance.random() < 0.5 else allowed)
        assert matcher.accept_token(token)
        if matcher.is_terminated():
            return text
        text += VOCABULARY[token]
    return None
