"""What vLLM's source says, so that a test fails when it says something else."""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


def reads(function: Callable[..., Any], name: str) -> set[str]:
    """The attributes of a variable that a function uses."""
    return {
        node.attr
        for node in ast.walk(_tree(function))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == name
    }


def fingerprint(function: Callable[..., Any]) -> str:
    """A hash of what a function does, without its comments, docstrings and layout."""
    tree = _tree(function)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            del node.body[0]
    return hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:12]


def _tree(function: Callable[..., Any]) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))
