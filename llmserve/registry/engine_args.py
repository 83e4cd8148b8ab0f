"""What the installed vLLM offers, known without importing it.

`import vllm` takes seconds and pulls in torch; `llmserve check` must answer at once.
So the fields of `AsyncEngineArgs` (`vllm/engine/arg_utils.py` and the files its type
names come from) and the names of the parsers are read from vLLM's source as text.
Contract tests hold the result against the real classes.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import typing
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, TypeAdapter

_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {unit.upper(): 2 ** (10 * (i + 1)) for i, unit in enumerate("kmgt")}


def human_int(value: object) -> object:
    """`32k` is 32,000 and `32K` 32,768, as on vLLM's command line; `auto` is -1.

    Source: vllm/utils/argparse_utils.py, human_readable_int_or_auto.
    """
    if isinstance(value, bool):  # YAML's `yes`
        raise ValueError("must be a number")  # noqa: TRY004  # what pydantic catches
    if not isinstance(value, str):
        return value
    if value == "auto":
        return -1
    number, unit = value[:-1], value[-1:]
    if unit in _UNITS and number.replace(".", "", 1).isdigit():
        return int(float(number) * _UNITS[unit])
    return value


class EngineFields:
    """Name and type of each engine argument.

    Types that only exist in vLLM (its config classes) are taken as they come and
    checked when the engine is built.
    """

    def __init__(self, root: Path) -> None:
        module = _parse(root / "engine" / "arg_utils.py")
        self._types = _Types(root, module)
        self._annotations = {
            item.target.id: item.annotation
            for statement in module.body
            if isinstance(statement, ast.ClassDef)
            and statement.name in ("EngineArgs", "AsyncEngineArgs")
            for item in statement.body
            if isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and not item.target.id.startswith("_")
        }

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._annotations)

    def type(self, name: str) -> Any:
        return self._types.resolve(self._annotations[name])

    def validate(self, name: str, value: object) -> Any:
        """`value` as the argument's type. Raises pydantic's ValidationError."""
        return TypeAdapter(self.type(name)).validate_python(value)


@cache
def engine_fields() -> EngineFields | None:
    """The engine arguments of the installed vLLM; None where there is none."""
    root = _vllm_root()
    return EngineFields(root) if root else None


@cache
def parser_names(kind: Literal["tool_parsers", "reasoning"]) -> frozenset[str] | None:
    """The parsers that the installed vLLM registers; None where there is none."""
    root = _vllm_root()
    if root is None:
        return None
    for statement in _parse(root / kind / "__init__.py").body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return frozenset(ast.literal_eval(key) for key in statement.value.keys if key)
    return None


def _vllm_root() -> Path | None:
    spec = importlib.util.find_spec("vllm")  # finds a top-level package without importing it
    return Path(spec.origin).parent if spec and spec.origin else None


class _Types:
    """Turns annotations into types, looking up aliases where the module imported them from."""

    def __init__(self, root: Path, module: ast.Module) -> None:
        self.root = root
        self.module = module
        self.sources = {
            alias.asname or alias.name: statement.module
            for statement in module.body
            if isinstance(statement, ast.ImportFrom) and statement.module
            for alias in statement.names
        }

    def resolve(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Constant):
            return (
                self.resolve(ast.parse(node.value, mode="eval").body)
                if isinstance(node.value, str)
                else node.value
            )
        if isinstance(node, ast.BinOp):
            return self._union(self.resolve(node.left), self.resolve(node.right))
        if isinstance(node, ast.Subscript):
            return self._generic(node)
        if isinstance(node, ast.Name):
            return self._named(node.id)
        return Any

    @staticmethod
    def _union(left: Any, right: Any) -> Any:
        return Any if Any in (left, right) else typing.Union[left, right]  # noqa: UP007  # built at run time

    def _generic(self, node: ast.Subscript) -> Any:
        name = ast.unparse(node.value)
        if name == "Literal":
            return self._literal(node.slice)
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        arguments = [self.resolve(element) for element in inner]
        if name in ("list", "set"):
            return getattr(builtins, name)[arguments[0]]
        if name == "dict":
            return dict[arguments[0], arguments[1]]  # type: ignore[valid-type]  # built at run time
        return Any

    def _literal(self, node: ast.expr) -> Any:
        choices: list[Any] = []
        for element in node.elts if isinstance(node, ast.Tuple) else [node]:
            if isinstance(element, ast.Constant):
                choices.append(element.value)
            elif nested := typing.get_args(self.resolve(element)):
                choices.extend(nested)
            else:  # a name that is no alias of choices: vLLM itself will check
                return Any
        return Literal[tuple(choices)]

    def _named(self, name: str) -> Any:
        if name == "int":
            return Annotated[int, BeforeValidator(human_int)]
        if name in ("str", "float", "bool", "dict"):
            return getattr(builtins, name)
        module = self.sources.get(name)
        if module is None:
            return self.alias(self.module, name)
        return self._imported(module, name) if module.startswith("vllm.config.") else Any

    def _imported(self, module: str, name: str) -> Any:
        tree = _parse(self.root.parent / (module.replace(".", "/") + ".py"))
        return _Types(self.root, tree).alias(tree, name)

    def alias(self, tree: ast.Module, name: str) -> Any:
        """`Name = Literal[...]` or a union of such; anything else is not ours to check."""
        for statement in tree.body:
            if isinstance(statement, ast.Assign):
                target: ast.expr = statement.targets[0]
            elif isinstance(statement, ast.AnnAssign):
                target = statement.target
            else:
                continue
            named = isinstance(target, ast.Name) and target.id == name
            if named and isinstance(statement.value, ast.Subscript | ast.BinOp):
                return self.resolve(statement.value)
        return Any


@cache
def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))
