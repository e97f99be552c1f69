"""What a docstring or a comment calls by name is there: `such` names are modules, classes,
functions, fields or parameters of the tree.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.product import FOLDERS, ROOT

QUOTED = re.compile(r"(?<!`)`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(\))?`(?!`)")
OUTSIDE = {
    "run_tasks", "SO_RCVTIMEO", "SO_SNDTIMEO", "MSG_WAITALL", "sendfile", "copy_", "hotweights", "vllm", "llm_engine", "LLM", "LLMEngine", "AsyncLLM",
}  # fmt: skip
"""Words of the kernel, of torch and vLLM, and of the command line."""


def sources() -> list[Path]:
    """Every module of the product."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@cache
def known() -> frozenset[str]:
    """Every name that is defined or used anywhere in the product, and its modules and their
    folders.
    """
    found: set[str] = set()
    for path in sources():
        found |= {part.removesuffix(".py") for part in path.relative_to(ROOT).parts}
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case (
                    ast.Name(id=name)
                    | ast.Attribute(attr=name)
                    | ast.arg(arg=name)
                    | ast.keyword(arg=str(name))
                ):
                    found.add(name)
                case (
                    ast.FunctionDef(name=name)
                    | ast.AsyncFunctionDef(name=name)
                    | ast.ClassDef(name=name)
                ):
                    found.add(name)
                case ast.alias(name=name):
                    found |= set(name.split("."))
                case ast.Constant(value=str(text)) if text.isidentifier():
                    found.add(text)
    return frozenset(found)


def prose(text: str) -> Iterator[str]:
    """The docstrings and comments of a module."""
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield node.value.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def quoted() -> list[tuple[str, str]]:
    """Module and name, for every name that some prose quotes."""
    return sorted(
        {(str(path.relative_to(ROOT)), name) for path in sources() for text in prose(path.read_text()) for name in QUOTED.findall(text)}
    )  # fmt: skip


@pytest.mark.timeout(300)  # it reads the whole tree
def test_a_name_in_prose_is_a_name_of_the_tree() -> None:
    found = quoted()
    assert len(found) > 300
    missing = [
        (place, name) for place, name in found if not set(name.split(".")) <= known() | OUTSIDE
    ]
    assert missing == []
