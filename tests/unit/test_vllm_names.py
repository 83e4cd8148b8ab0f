"""llmserve/engine/README.md names all of vLLM that we use, and what is private elsewhere."""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement

from tests.contract.vllm_source import pins

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "llmserve"
README = PACKAGE / "engine" / "README.md"
# Packages whose modules are their own: what is public is in the package itself.
INNER = {
    "aiohttp",
    "jinja2",
    "prometheus_client",
    "sse_starlette",
    "transformers",
    "uvicorn",
    "zmq",
}
# Public in spite of their names, or the standard library's and torch's, with tests of their own
# (test_parent_watch.py, test_zygote.py).
NOT_THEIRS = {
    ("os", "_exit"),
    ("sample", "_replace"),
    ("process", "_config"),
    ("atexit", "_run_exitfuncs"),
    ("forkserver._forkserver", "_inherited_fds"),
    ("forkserver", "_forkserver"),
    ("resource_tracker._resource_tracker", "_fd"),
    ("resource_tracker", "_resource_tracker"),
    ("self", "_fds"),
    ("spawn", "_main"),
    ("torch.cuda", "_is_in_bad_fork"),
    ("util", "_finalizer_registry"),
    ("util", "_run_after_forkers"),
}
COPIED = (
    "copied",
    "matched",
    "listed",
    "source read",
    "through",
)  # uses without a name in our code
DISTRIBUTIONS = {"zmq": "pyzmq", "pydantic_core": "pydantic"}  # pydantic pins its core


class Row(NamedTuple):
    module: str
    name: str
    file: str
    use: str
    pin: str


@cache
def rows() -> tuple[Row, ...]:
    lines = README.read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| `")]
    return tuple(
        Row(module.strip("`"), name, *rest)
        for module, names, *rest in cells
        for name in re.findall(r"`([^`]+)`", names)
    )


@cache
def trees() -> dict[str, ast.Module]:
    return {
        str(file.relative_to(PACKAGE)): ast.parse(file.read_text(encoding="utf-8"))
        for file in PACKAGE.rglob("*.py")
    }


def imports() -> set[tuple[str, str, str]]:
    """Module, name and file: all of vLLM's, and of others what is private or of an inner module."""
    return {
        (node.module, each.name, file)
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for each in node.names
        if _is_theirs(node.module, each.name)
    }


def _is_theirs(module: str, name: str) -> bool:
    package, *inner = module.split(".")
    private = any(part.startswith("_") for part in (*inner, name))
    return package == "vllm" or (package in INNER and (bool(inner) or private))


def private_names() -> set[tuple[str, str]]:
    """Name and file: private attributes that no class or function of ours has."""
    ours = set[str]().union(*map(_bound, trees().values()))
    return {
        (node.attr, file)
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and re.match("_[^_]", node.attr)
        and (node.attr not in ours or ast.unparse(node.value) == "super()")
        and (ast.unparse(node.value), node.attr) not in NOT_THEIRS
    }


def _bound(tree: ast.Module) -> set[str]:
    """Names that are defined: functions, variables, and attributes of `self`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self":
            found |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return found


def _words(tree: ast.Module) -> set[str]:
    """Names and words of strings, as they are in the code."""
    found: set[str] = set()
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg", "module"):
            found.add(str(getattr(node, field, "")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(re.findall(r"\w+", node.value))
    return found


def test_each_import_has_a_row() -> None:
    known = {(row.module, row.name, row.file) for row in rows()}
    assert sorted(imports() - known) == [], "enter them in llmserve/engine/README.md"


def test_each_private_name_has_a_row() -> None:
    known = {(row.name.rpartition(".")[2], row.file) for row in rows()}
    assert sorted(private_names() - known) == [], "enter them in llmserve/engine/README.md"


def test_each_row_is_used() -> None:
    found = imports()
    unused = []
    for row in rows():
        if any(word in row.use for word in COPIED):
            is_used = row.file in trees()
        elif "." in row.name:
            is_used = row.name.rpartition(".")[2] in _words(trees()[row.file])
        else:
            is_used = (row.module, row.name, row.file) in found
        if not is_used:
            unused.append(row)
    assert unused == [], "these rows of llmserve/engine/README.md name nothing in the code"


def test_each_row_has_its_pin() -> None:
    hashed = {pin.target.replace(":", ".") for pin in pins()}
    tests = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    without = [
        row
        for row in rows()
        if not row.pin
        or not all(
            _is_hashed(row, hashed) if each == "hash" else each in tests
            for each in row.pin.split(", ")
        )
    ]
    assert without == [], "these rows of llmserve/engine/README.md name no pin that there is"


def _is_hashed(row: Row, hashed: set[str]) -> bool:
    """Of a class the hash of any part: it is made of the parts that we use."""
    name = f"{row.module}.{row.name}"
    owner = name.rpartition(".")[0] if "." in row.name else name
    return any(each in {name, owner} or each.startswith(f"{owner}.") for each in hashed)


@cache
def requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["inner"]]
    return {made.name: made for made in map(Requirement, lines)}


PACKAGES = sorted({row.module.partition(".")[0] for row in rows()} | {"starlette"})


@pytest.mark.parametrize("package", [each for each in PACKAGES if each != "vllm"])
@pytest.mark.parametrize("lock", ["cpu", "cuda"])
def test_package_with_private_names_has_an_upper_bound(package: str, lock: str) -> None:
    name = DISTRIBUTIONS.get(package, package.replace("_", "-"))
    specifier = requirements()[name].specifier
    assert any(each.operator in {"<", "==", "~="} for each in specifier), name
    locked = re.search(
        rf"^{name}==([\w.]+)", (ROOT / "requirements" / f"{lock}.lock").read_text(), re.MULTILINE
    )
    assert locked is not None
    assert locked[1] in specifier, name
