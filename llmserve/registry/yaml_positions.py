"""A YAML file as plain values, with the line of each value."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path as FilePath

Path = tuple[int | str, ...]

_NAME = "[A-Za-z_][A-Za-z0-9_]*"
# `$$`, `${NAME}`, or text that resembles a reference.
_ENV = re.compile(
    rf"(?P<escape>\$\$)|\$\{{(?P<name>{_NAME})\}}"
    rf"|(?P<wrong>\$[{{(A-Za-z_]|^%{_NAME}%$)"
)

_INVALID_REFERENCE = (
    "invalid reference; write ${NAME} for an environment variable, $$ for a plain $"
)
_KEPT = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "merge")}  # of YAML 1.1's plain words


@dataclass(frozen=True, order=True)
class Problem:
    line: int
    path: str
    message: str

    def within(self, file: str) -> str:
        where = f"{file}:{self.line}" if self.line else file
        line = f"{where}: {self.path}: {self.message}" if self.path else f"{where}: {self.message}"
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


@dataclass
class Document:
    """The values of a file, their lines, and the problems of the file."""

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    written: dict[Path, str] = field(default_factory=dict)  # values that are not text in YAML

    def problem(self, path: Path, message: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(line(self.lines, path), dotted(path), message))


def line(lines: Mapping[Path, int], path: Path) -> int:
    """The line of `path` or of its nearest ancestor; 0 in an empty file."""
    while path and path not in lines:
        path = path[:-1]
    return lines.get(path, 0)


def dotted(path: Iterable[int | str]) -> str:
    return ".".join(str(step) for step in path)


def read(file: FilePath, *, verbatim: frozenset[str] = frozenset()) -> Document:
    """Read `file`; `${NAME}` in a string is replaced from the environment (`$$` is a plain `$`).

    Keys, and strings under a key in `verbatim`, do not change. For a file that cannot be read or
    parsed, the document has only that problem.
    """
    document = Document()
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        document.problem((), f"cannot be read: {error.strerror}")
        return document
    except UnicodeDecodeError:
        document.problem((), "is not UTF-8 text")
        return document
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None:
            document.value = _Builder(loader, document, verbatim).build(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        document.problems = [Problem(line, "", f"not valid YAML: {error.problem or error.context}")]
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.problems = [Problem(line, "", f"not valid YAML: {error.reason}")]
    except RecursionError:
        document.problems = [Problem(0, "", "not valid YAML: nested too deeply")]
    return document


class _Loader(yaml.SafeLoader):
    """Reads all plain words as text, except true, false, null and decimal numbers.

    PyYAML reads YAML 1.1, with further exceptions: dates, `yes`, octal and sexagesimal numbers.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012  # as the base class has it
        first: [rule for rule in rules if rule[0] in _KEPT]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


class _Builder:
    def __init__(
        self, loader: yaml.SafeLoader, document: Document, verbatim: frozenset[str]
    ) -> None:
        self.loader = loader
        self.document = document
        self.verbatim = verbatim
        self.open: list[yaml.Node] = []
        self.own_keys: dict[int, set[int]] = {}  # of each mapping, without merged keys

    def build(self, node: yaml.Node, path: Path) -> Any:
        self.document.lines[path] = node.start_mark.line + 1
        if node in self.open:
            raise yaml.MarkedYAMLError(
                problem="an anchor contains itself", problem_mark=node.start_mark
            )
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, i)) for i, item in enumerate(node.value)]
            return self._scalar(node, path)
        finally:
            self.open.pop()

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        own = self.own_keys.setdefault(id(node), {id(key) for key, _ in node.value})
        self.loader.flatten_mapping(node)  # `<<: *anchor`; own keys come last and take precedence
        built: dict[str, Any] = {}
        first: dict[str, int] = {}  # own keys; they may repeat merged keys
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be text", problem_mark=key_node.start_mark
                )
            key = key_node.value  # as written: `1.10` is text here
            if key in first:
                self.document.lines[(*path, key)] = line
                self.document.problem((*path, key), f"duplicate key; first on line {first[key]}")
                continue
            if id(key_node) in own:
                first[key] = line
            built[key] = self.build(value_node, (*path, key))
            self.document.lines[(*path, key)] = line
            if "${" in key:
                self.document.problem((*path, key), "references are not allowed in keys")
        return built

    def _construct(self, node: yaml.Node) -> Any:
        try:
            return self.loader.construct_object(node, deep=True)
        except ValueError as error:  # invalid dates and numbers
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        value = self._construct(node)
        if not isinstance(value, str):
            self.document.written[path] = node.value
            return value
        if path and path[-1] in self.verbatim:
            return value
        return _ENV.sub(lambda match: self._expand(match, path), value)

    def _expand(self, match: re.Match[str], path: Path) -> str:
        if match["escape"]:
            return "$"
        name = match["name"]
        if name is None:
            self.document.problem(path, _INVALID_REFERENCE)  # the text may be a secret
            return ""
        if name not in os.environ:
            self.document.problem(path, f"environment variable {name} is not set")
            return ""
        return os.environ[name]
