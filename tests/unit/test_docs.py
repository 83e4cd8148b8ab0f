"""What is written for people is what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from llmserve import __version__
from llmserve.api.schedule import Schedule
from llmserve.http import routes
from llmserve.registry.loader import load
from llmserve.registry.spec import ModelSpec, ServerSpec
from tests import language
from tests.readme import ANSWER, README

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LONGEST_WORDS = 30  # of a sentence

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_OUTPUT = {"", "json"}  # languages of blocks that quote what a program prints
_LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
_HEADING = re.compile(r"^#.*$", re.MULTILINE)
_PARTS = re.compile(r"\n\s*\n|\n\s*(?:-|\d+\.) |\|")
_TARGET = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_MODULE = re.compile(
    r"`((?:api|checkpoint|cli|engine|gpus|http|lifecycle|planning|registry|server)(?:\.[a-z_]+)+)`"
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\**\s+")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_change_log_begins_with_this_version() -> None:
    found = re.search(
        r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert found is not None
    assert found[1] == __version__


def test_the_first_screen_shows_it_all() -> None:
    first = "\n".join(README.splitlines()[:30])
    for shown in ("make up", "curl", "models:", ANSWER):
        assert shown in first


@pytest.mark.parametrize("registry", blocks("yaml"))
def test_registries_of_the_readme_load(
    registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMSERVE_API_KEY", "k")
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "ci").write_text("k2\n", encoding="utf-8")
    for folder in ("models/SmolLM2-135M-Instruct", "models/all-MiniLM-L6-v2", "adapters/legal"):
        (tmp_path / folder).mkdir(parents=True)
    file = tmp_path / "models.yaml"
    file.write_text(registry, encoding="utf-8")
    assert load(file).models


def test_every_key_is_in_the_registry_reference() -> None:
    text = (ROOT / "docs" / "registry.md").read_text(encoding="utf-8")
    for key in (ServerSpec.model_fields | ModelSpec.model_fields).keys() - {"name"}:
        assert f"`{key}`" in text, key


def test_every_field_of_the_schedule_is_in_its_page() -> None:
    text = (ROOT / "docs" / "event-loop.md").read_text(encoding="utf-8")
    for field in dataclasses.fields(Schedule):
        assert f"`{field.name}`" in text, field.name


def test_every_route_is_in_the_readme() -> None:
    shown = re.sub(r"/\{[^}]*\}", "", README)
    for route in routes.table():
        path = re.sub(r"/\{[^}]*\}", "", route.path).removesuffix("/cancel")
        assert path in shown or path == "/score", path


def banned_words(text: str) -> list[str]:
    """Return those of a page: of its prose and of the blocks that are no output."""
    return language.banned_words(
        _BLOCK.sub(lambda block: "" if block[1] in _OUTPUT else block[2], text)
    )


def sentences(text: str) -> list[str]:
    """Those of a page: paragraphs, list items and table cells, without blocks of code."""
    text = _HEADING.sub("\n", _BLOCK.sub("\n", text))
    plain = _LINK.sub(r"\1", language.CODE_SPAN.sub("code", text))
    return [
        sentence
        for part in _PARTS.split(plain)
        for sentence in _SENTENCE_END.split(part.strip())
        if sentence
    ]


def test_banned_words_are_found_in_prose_only() -> None:
    text = "Nobody is\ntold.\n```sh\nup  # whoever asks\n```\n```\ntold\n```\nand `told`"
    assert banned_words(text) == ["Nobody", "told", "whoever"]


def test_sentences_are_those_of_paragraphs_lists_and_cells() -> None:
    text = "# A\nOne `a b`. Two\nlines.\n\n- **B.** [c d](e)\n- f\n\n| g | h. |\n```\nno\n```"
    assert sentences(text) == ["One code.", "Two\nlines.", "- **B.", "c d", "f", "g", "h."]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_no_banned_words(page: Path) -> None:
    assert banned_words(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_sentences_are_short(page: Path) -> None:
    found = sentences(page.read_text(encoding="utf-8"))
    assert [each for each in found if len(each.split()) > LONGEST_WORDS] == []


def anchors(text: str) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for name, anchor in _TARGET.findall(page.read_text(encoding="utf-8")):
        target = page.parent / name if name else page
        assert target.exists(), name
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{name}#{anchor}"


@pytest.mark.parametrize("page", ["architecture", "engine", "glossary"])
def test_modules_of_a_page_exist(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = set(_MODULE.findall(text)) - {f"server.{key}" for key in ServerSpec.model_fields}
    assert named
    for module in named - {"server.log"}:
        path = ROOT / "llmserve" / Path(*module.split("."))
        assert path.is_dir() or path.with_suffix(".py").exists(), module
