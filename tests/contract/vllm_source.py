"""What an installed package's source says, so that a test fails when it says something else.

Source is parsed where it is installed and never imported: vLLM's wheels for CPUs and for CUDA
hold the same. A target is `package.module:Class.method`, or `package.module:function.inner`.
"""

from __future__ import annotations

import ast
import hashlib
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_PINS = Path(__file__).with_name("vllm_source.toml")
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class Pin(NamedTuple):
    """A definition that a file of ours depends on, and the fingerprint it had when we read it."""

    file: str
    target: str
    fingerprint: str


def pins() -> Iterator[Pin]:
    for file, targets in tomllib.loads(_PINS.read_text(encoding="utf-8")).items():
        for target, known in targets.items():
            yield Pin(file, target, known)


def definition(target: str) -> ast.AST:
    """Raises LookupError for a definition, or a module, that is not there."""
    module, _, names = target.partition(":")
    found: ast.AST = _tree(module)
    for name in names.split("."):
        found = _inner(found, name, target)
    return found


def _inner(node: ast.AST, name: str, target: str) -> ast.AST:
    """The last definition of a name counts: those before it are overloads."""
    below = [each for each in ast.walk(node) if isinstance(each, _Definition) and each is not node]
    found = [each for each in below if each.name == name]
    if not found:
        raise LookupError(f"{target} is not in the installed source")
    return found[-1]


@cache
def _tree(module: str) -> ast.Module:
    package, *rest = module.split(".")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise LookupError(f"{package} is not in the environment")
    path = Path(spec.origin).parent.joinpath(*rest)
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.is_file():
        raise LookupError(f"{module} is not in the installed source")
    return ast.parse(source.read_text(encoding="utf-8"))


def fingerprint(target: str) -> str:
    """A hash of a definition, without its comments, docstrings and layout."""
    return hashlib.sha256(_normalized(definition(target)).encode()).hexdigest()[:12]


def _normalized(node: ast.AST) -> str:
    tree = ast.parse(ast.unparse(node))  # a copy: trees are kept
    for each in ast.walk(tree):
        if isinstance(each, _Definition) and ast.get_docstring(each) is not None:
            each.body[0] = ast.Pass()
    return ast.unparse(tree)


def reads(target: str, name: str) -> set[str]:
    """The attributes of a variable that a function uses."""
    return {node.attr for node in _attributes(target, name)}


def writes(target: str) -> set[str]:
    """The attributes of `self` that a class assigns."""
    return {node.attr for node in _attributes(target, "self") if isinstance(node.ctx, ast.Store)}


def _attributes(target: str, name: str) -> Iterator[ast.Attribute]:
    for node in ast.walk(definition(target)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name:
            yield node


def header_reads(target: str) -> set[str]:
    """The headers that a class gets from its request: their names, or constants of them."""
    return {
        ast.unparse(node.args[0]).strip("'")
        for node in ast.walk(definition(target))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("headers.get")
    }
