from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.errors import ModelNotFound
from llmserve.registry.names import ModelNames
from tests.fakes import spec

NAMES = st.lists(st.text(min_size=1, max_size=12), unique=True, min_size=1, max_size=20)


def test_a_model_is_found_by_its_name_aliases_and_adapters() -> None:
    registry = ModelNames([spec("chat", aliases=["gpt-4o"], loras={"sql": "/loras/sql"})])
    assert [registry.find(name).name for name in ("chat", "gpt-4o", "sql")] == ["chat"] * 3
    assert registry.public_names() == ["chat", "gpt-4o", "sql"]


def test_names_are_exact() -> None:
    with pytest.raises(ModelNotFound, match="did you mean `chat`"):
        ModelNames([spec("chat")]).find("Chat")


def test_a_hidden_model_is_found_but_never_named() -> None:
    registry = ModelNames([spec("chat"), spec("draft", hidden=True, aliases=["draft-2"])])
    assert registry.find("draft-2").name == "draft"
    assert registry.public_names() == ["chat"]
    with pytest.raises(ModelNotFound) as missing:
        registry.find("draftt")
    assert "draft`?" not in missing.value.message
    assert missing.value.message.endswith("models here: chat.")


@given(NAMES, st.integers(1, 4))
def test_every_public_name_leads_to_the_model_that_carries_it(names: list[str], each: int) -> None:
    groups = [names[i : i + each] for i in range(0, len(names), each)]
    registry = ModelNames([spec(first, aliases=rest) for first, *rest in groups])
    assert registry.public_names() == names
    for group in groups:
        assert {registry.find(name).name for name in group} == {group[0]}


@given(NAMES, st.text(max_size=12))
def test_any_other_name_is_refused_with_the_names_there_are(names: list[str], other: str) -> None:
    registry = ModelNames([spec(name) for name in names])
    if other in names:
        assert registry.find(other).name == other
        return
    with pytest.raises(ModelNotFound) as missing:
        registry.find(other)
    assert all(name in missing.value.message for name in names)
