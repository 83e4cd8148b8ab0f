"""The chat templates in a model's own files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmserve.checkpoint import files as checkpoint
from llmserve.errors import ModelUnusable, ShapeUnknown
from llmserve.registry import chat_template

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmserve.checkpoint.files import Checkpoint
    from llmserve.registry.spec import ModelSpec

_FILE = "chat_template.jinja"  # replaces the others
_OTHERS = ("tokenizer_config.json", "chat_template.json")


def flaw(spec: ModelSpec) -> str | None:
    """Return why a model's own chat template does not compile, with file and line. Blocks.

    None without a local template, and if the registry has another template or tokenizer.
    """
    is_other = "tokenizer" in spec.engine or spec.engine.get("tokenizer_mode") == "mistral"
    if spec.chat_template is not None or is_other:
        return None
    try:
        files = checkpoint.of(spec, hub=False)
        found = (chat_template.syntax_error(text, where) for where, text in _templates(files))
        return next(filter(None, found), None)
    except ModelUnusable as error:
        return error.message
    except ShapeUnknown:  # not on this machine
        return None


def _templates(files: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield each template with its place."""
    if _FILE in files.sizes:
        yield f"{files.name}: {_FILE}", files.content(_FILE).decode(errors="replace")
        return
    for file in _OTHERS:
        found = files.json(file).get("chat_template")
        named = (
            {each["name"]: each["template"] for each in found} if isinstance(found, list) else {}
        )
        for name, text in (named or {"chat_template": found}).items():
            if isinstance(text, str):
                yield f"{files.name}: {file}: {name}", text
