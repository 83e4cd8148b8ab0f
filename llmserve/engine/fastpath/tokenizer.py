"""Text to token ids, by the fastest encoder that returns the model's own ids.

fastokens reads the same tokenizer.json and caches the ids of words: it is some 50 times faster on
ordinary text. It is compared with the model's tokenizer at the start, and not used if any id
differs.
"""

from __future__ import annotations

import copy
import logging
from typing import Any, Protocol

_ADDED = 128  # compared tokens of those that a model adds

log = logging.getLogger(__name__)

# Letters, digits, scripts, spaces, code, and texts on which tokenizers differ.
_SAMPLES = (
    "The quick brown fox jumps over the lazy dog, isn't it? They'll say: we've 'won'.",
    "  leading, trailing and   inner spaces \t tabs \n\n newlines \r\n ",
    "1 12 123 1234 12345 3.14159 1,000,000 0x7f 2026-11-22T13:51:42Z ½ ² Ⅷ",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n\n\tif x == 1:\n\t\tpass",
    '{"key": [1, 2.5e-3, null, true], "nested": {"ünïcode": "\\u00e9"}}',
    "Größe, naïve café, Señor, Übermäßig, Žluťoučký kůň, İstanbul, ﬁ, e\u0301, å",
    "東京は日本の首都です。你好，世界！한국어 문장입니다. ภาษาไทย",  # noqa: RUF001
    "नमस्ते दुनिया مرحبا بالعالم שלום עולם Привет, мир! Γειά σου",  # noqa: RUF001
    "🙂🙃 👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ✅ \u200b\u200d\ufeff\u2028",
    "https://example.com/a?b=c&d=%20#e user@example.com C:\\path\\file.txt $PATH",
    "aaaaaaaaaaaaaaaaaaaaaaaa ------------------------ \x00\x01\x7f <>",
    "",
)


class Encode(Protocol):
    def __call__(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


def encoder(tokenizer: Any, name: str) -> Encode:
    """Return the encoder of a tokenizer of transformers with a fast backend; `name` is logged."""
    # A copy: vLLM decides about truncation and padding.
    backend = copy.deepcopy(tokenizer._tokenizer)  # noqa: SLF001  # as vLLM's detokenizer does
    backend.no_truncation()
    backend.no_padding()

    def own(text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    fast = _fast(backend, name)
    if fast is None:
        return own
    different = next((text for text in _texts(backend) if not _same(own, fast, text)), None)
    if different is None:
        return fast
    log.warning("model=%s fastokens is not used: its ids of %r differ", name, different)
    return own


def _fast(backend: Any, name: str) -> Encode | None:
    try:
        from fastokens import Tokenizer  # noqa: PLC0415  # may be absent or refuse the model

        fast = Tokenizer.from_json_str(backend.to_str())
    except Exception as error:
        log.info("model=%s fastokens is not used: %s", name, error)
        return None

    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        return list(fast.encode(text, add_special_tokens, False).ids)

    return encode


def _texts(backend: Any) -> list[str]:
    """Return the samples, a long text, and each token that the model adds, between words."""
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    between = [f"a{token}b {token} c\n{token}" for token in added[:_ADDED]]
    return [*_SAMPLES, " ".join(_SAMPLES) * 20, *between]


def _same(own: Encode, fast: Encode, text: str) -> bool:
    try:
        return all(
            own(text, add_special_tokens=special) == fast(text, add_special_tokens=special)
            for special in (True, False)
        )
    except Exception:
        return False
