"""Prose of the code and of the pages, and the words that it does not use.

`python -m tests.language [PACKAGE ...]` lists what `tests/unit/test_language.py` refuses.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
CODE = ROOT / "llmserve"
# Packages, and the modules beside them.
PACKAGES = sorted({f.relative_to(CODE).parts[0].removesuffix(".py") for f in CODE.rglob("*.py")})

# Words that hide the subject, personify a program, or have another word in the glossary.
BANNED = re.compile(
    r"\b("
    r"who(m|so)?ever|(no|some|any|every)body"
    r"|tells?|telling|told|says?|saying|said|by way of"
    r"|(gives?|given|giving|gave) way|(comes?|came|coming) back|(is|are) left|once more|anew"
    r"|(in|the) line for|(waits?|stands?|stood) in( the)? line|(short|long) way|recipes?"
    r"|others hold|who has|is none|nothing more|more than nothing"
    r"|turns? of the (event )?loop|(has|have|had) a turn|(its|their|the loop's) turns?"
    r")\b",
    re.IGNORECASE,
)
CODE_SPAN = re.compile(r"`[^`\n]+`")
# Texts that are no words of ours: samples, and quotes of vLLM and of standards.
QUOTED = ("They'll say: we've 'won'.",)


class Prose(NamedTuple):
    line: int
    text: str


class Finding(NamedTuple):
    path: Path
    line: int
    words: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.words}"


def banned_words(text: str) -> list[str]:
    """Return the banned words of a text, in order, except those in backquotes."""
    for quote in QUOTED:
        text = text.replace(quote, "")
    return [found[0] for found in BANNED.finditer(CODE_SPAN.sub("", text))]


def prose(source: str) -> Iterator[Prose]:
    """Yield the docstrings, the comments and the other strings of more than one word.

    A string is part of a message if it has a space. Comments on successive lines are one text.
    Fields of f-strings are no constants.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield Prose(node.lineno, " ".join(node.value.split()))
    yield from _comments(source)


def _comments(source: str) -> Iterator[Prose]:
    block, last = Prose(0, ""), 0  # the comment on lines of its own, and the last of these
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("# ")
        if token.line.strip() != token.string:
            yield Prose(line, text)
        elif line == last + 1:
            block, last = Prose(block.line, f"{block.text} {text}"), line
        else:
            yield block
            block, last = Prose(line, text), line
    yield block


def findings(package: str) -> list[Finding]:
    """Return the banned words of a package or a module of llmserve, by file and line."""
    folder = CODE / package
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    return [
        Finding(file.relative_to(ROOT), each.line, word)
        for file in files
        for each in prose(file.read_text(encoding="utf-8"))
        for word in banned_words(each.text)
    ]


if __name__ == "__main__":
    for package in sys.argv[1:] or PACKAGES:
        found = findings(package)
        print(f"{package}: {len(found)}", *found, sep="\n  ")
