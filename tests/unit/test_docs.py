"""What is written for people is what the code does."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from llmserve import __version__
from llmserve.api.schedule import Schedule
from llmserve.http import routes
from llmserve.registry.config import ModelSpec, ServerSpec, load
from tests.readme import ANSWER, README

ROOT = Path(__file__).parents[2]


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
