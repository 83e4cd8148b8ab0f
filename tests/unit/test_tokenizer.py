from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from llmserve.engine.fastpath.tokenizer import encoder

if TYPE_CHECKING:
    from collections.abc import Callable

START = 1_000_000  # the id of a token before every text


class Model:
    """A tokenizer of transformers: a character is its number.

    Its file says that texts are cut; transformers takes that back when it is asked.
    """

    def __init__(self) -> None:
        self._tokenizer = self
        self.asked: list[str] = []
        self.limit: int | None = 4
        self.padded = True

    def __deepcopy__(self, _: Any) -> Model:
        again = Model()
        again.asked = self.asked
        return again

    def no_truncation(self) -> None:
        self.limit = None

    def no_padding(self) -> None:
        self.padded = False

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return {n: SimpleNamespace(content=token) for n, token in enumerate(("<s>", "</s>"))}

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        self.asked.append(text)
        ids = ids_of(text, add_special_tokens)[: self.limit]
        return SimpleNamespace(ids=[*ids, 0] if self.padded else ids)

    def to_str(self) -> str:
        return "the file"


def ids_of(text: str, special: bool) -> list[int]:
    return [START] * special + [ord(character) for character in text]


class Fast:
    """fastokens, with what `encode` makes of a text."""

    def __init__(self, made: Callable[[str, bool], list[int]]) -> None:
        self._made = made
        self.asked: list[str] = []
        self.read: list[str] = []

    def from_json_str(self, text: str) -> Fast:
        self.read.append(text)
        return self

    def encode(self, text: str, special: bool, _: bool) -> Any:
        self.asked.append(text)
        return SimpleNamespace(ids=self._made(text, special))


def installed(
    monkeypatch: pytest.MonkeyPatch, made: Callable[[str, bool], list[int]] = ids_of
) -> Fast:
    fast = Fast(made)
    monkeypatch.setitem(sys.modules, "fastokens", SimpleNamespace(Tokenizer=fast))
    return fast


def test_fastokens_that_gives_the_same_ids_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model, fast = Model(), installed(monkeypatch)
    encode = encoder(model, "chat")
    assert fast.read == ["the file"]
    assert set(fast.asked) == set(model.asked)
    model.asked.clear()
    assert encode("hé", add_special_tokens=True) == [START, ord("h"), ord("é")]
    assert encode("hé", add_special_tokens=False) == [ord("h"), ord("é")]
    assert model.asked == []


def differing(of: str) -> Callable[[str, bool], list[int]]:
    """Other ids for texts that hold `of`."""
    return lambda text, special: ids_of(text, special) + [0] * (of in text)


@pytest.mark.parametrize(
    "made",
    [
        differing("東"),
        differing("👩"),
        differing("नमस्ते"),
        differing("\n\n"),
        differing("  "),
        differing("<s>"),
        differing("</s>"),
        lambda text, special: ids_of(text, special) or [0],
        lambda text, _: ids_of(text, False),
        lambda text, _: ids_of(text, True),
    ],
    ids=[
        *("CJK", "emoji", "hindi", "newlines", "spaces", "special", "last special", "nothing"),
        *("never a start", "always a start"),
    ],
)
def test_fastokens_that_differs_in_one_thing_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    made: Callable[[str, bool], list[int]],
) -> None:
    caplog.set_level("WARNING")  # whatever other tests have left
    fast = installed(monkeypatch, made)
    encode = encoder(Model(), "chat")
    assert "model=chat fastokens is not used: its ids of" in caplog.text
    fast.asked.clear()
    assert encode("hi", add_special_tokens=True) == ids_of("hi", True)
    assert fast.asked == []


def raising(error: Exception) -> Callable[..., Any]:
    def made(*_: Any) -> Any:
        raise error

    return made


def test_fastokens_that_fails_on_a_text_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, raising(ValueError("no")))
    assert encoder(Model(), "chat")("hi", add_special_tokens=False) == ids_of("hi", False)


def test_fastokens_that_refuses_the_model_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    refusing = SimpleNamespace(from_json_str=raising(ValueError("unsupported model type")))
    monkeypatch.setitem(sys.modules, "fastokens", SimpleNamespace(Tokenizer=refusing))
    assert encoder(Model(), "chat")("hi", add_special_tokens=True) == ids_of("hi", True)
    assert "fastokens is not used: unsupported model type" in caplog.text


def test_texts_are_neither_cut_nor_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    model = Model()
    assert encoder(model, "chat")("a long text", add_special_tokens=False) == ids_of(
        "a long text", False
    )
    assert model.limit == 4  # the model's own is left as it is


def test_without_fastokens_the_model_s_own_tokenizer_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert encoder(Model(), "chat")("hi", add_special_tokens=False) == ids_of("hi", False)
