"""Values that name something outside the registry: paths, model folders, templates, secrets."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmserve.registry import yaml_positions

if TYPE_CHECKING:
    from collections.abc import Callable

_KEY_LENGTH = 4096  # characters; many proxies refuse longer header values
# The references of other programs; only `file:` is one here.
_REFERENCE = re.compile(r"\s*(file|env|environ|environment|secret|vault)\s*:", re.IGNORECASE)
_FORMATS = {
    ".gguf": "a GGUF file",
    ".safetensors": "a file of weights",
    ".bin": "a file of weights",
}


class Sources:
    """Resolves values of one registry and reports problems to its document."""

    def __init__(self, file: Path, document: yaml_positions.Document) -> None:
        self._folder = Path(os.path.realpath(file)).parent
        self._document = document

    def path(self, value: str, path: yaml_positions.Path) -> Path | None:
        """A path relative to the registry's folder or a home; None for an unknown home."""
        try:
            return self._folder / Path(value).expanduser()
        except RuntimeError:
            home = value.partition("/")[0]
            self._document.problem(path, f"unknown home {home}; write an absolute path")
            return None

    def folder(self, value: str, path: yaml_positions.Path) -> str:
        """`path` as text; the folder need not exist."""
        return str(self.path(value, path) or value)

    def file(self, value: str, path: yaml_positions.Path) -> Path:
        file = self.path(value, path)
        if file is not None and not _holds(file.is_file):
            self._document.problem(path, f"no such file: {file}")
        return file or Path(value)

    def secret(self, value: Any, path: yaml_positions.Path) -> Any:
        """A secret, or the first line of the file that `file:PATH` names.

        Without surrounding blanks, which a header cannot carry, and without a byte order mark.
        """
        if not isinstance(value, str):
            return value
        secret = value
        if value.startswith("file:"):
            source = self.path(value.removeprefix("file:").strip(), path)
            if source is None:
                return value
            try:
                secret = _first_line(source)
            except (OSError, ValueError) as error:
                self._document.problem(path, f"{source} cannot be read: {_reason(error)}")
                return value
        elif _REFERENCE.match(value):
            self._document.problem(path, "invalid reference; write file:PATH or ${NAME}")
        secret = secret.removeprefix("\ufeff").strip()
        if any(p.path == yaml_positions.dotted(path) for p in self._document.problems):
            return secret
        if not secret:
            self._document.problem(path, "is empty; a key needs at least one character")
        elif not secret.isprintable() or len(secret) > _KEY_LENGTH:
            self._document.problem(
                path,
                f"invalid key; must be one line of at most {_KEY_LENGTH} printable characters",
            )
        return secret

    def models(self, value: Any, path: yaml_positions.Path) -> Any:
        """`model` of a value, and of each value of a mapping."""
        if isinstance(value, dict):
            return {name: self.models(each, (*path, name)) for name, each in value.items()}
        return self.model(value, path) if isinstance(value, str) else value

    def model(self, value: str, path: yaml_positions.Path) -> str:
        """The absolute path of a folder, or a hub name unchanged.

        As in vLLM, an existing folder takes precedence. A name that looks like a path must be
        a folder.
        """
        if not value.strip():
            self._document.problem(path, "is empty; write a folder or a hub name")
            return value
        folder = self.path(value, path)
        if folder is None:
            return value
        if _holds(folder.is_dir):
            return str(folder.resolve())
        if _holds(folder.exists):
            self._document.problem(path, _not_a_folder(folder, path))
        elif value.startswith((".", "/", "~")) or value.count("/") > 1:
            self._document.problem(path, f"no such folder: {folder}")
        return value

    def template(self, value: str, path: yaml_positions.Path) -> str:
        """The text of a template: the value itself if it is Jinja, else the content of a file."""
        if "{" in value or "\n" in value:
            self._check_template(value, "template", path)
            return value
        file = self.file(value, path)
        if not _holds(file.is_file):
            return value
        try:
            text = file.read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            self._document.problem(path, f"{file} cannot be read: {_reason(error)}")
            return value
        self._check_template(text, str(file), path)
        return text

    def _check_template(self, text: str, where: str, path: yaml_positions.Path) -> None:
        from llmserve.registry import chat_template  # noqa: PLC0415  # Jinja takes 50 ms

        if (error := chat_template.syntax_error(text, where)) is not None:
            self._document.problem(path, error)


def _holds(predicate: Callable[[], bool]) -> bool:
    """A predicate of a path; False if the path is too long or may not be read."""
    try:
        return predicate()
    except OSError:
        return False


def _first_line(file: Path) -> str:
    """The first line, cut where it is too long for a key. Raises OSError, UnicodeDecodeError."""
    if file.exists() and not (file.is_file() or file.is_dir()):  # opening a pipe would wait
        raise OSError("not a regular file")
    with file.open(encoding="utf-8") as lines:
        return lines.readline(_KEY_LENGTH + 80)


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    return getattr(error, "strerror", None) or str(error)


def _not_a_folder(file: Path, path: yaml_positions.Path) -> str:
    content = (
        "adapter_config.json and its weights"
        if "loras" in path
        else "config.json and safetensors files"
    )
    return (
        f"{file} is {_FORMATS.get(file.suffix.lower(), 'a file')}; "
        f"must be a folder with {content}, or a hub name"
    )
