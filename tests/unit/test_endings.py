"""docs/endings.md promises a test for each row: they are there, and each file of tests/faults has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "endings.md").read_text("utf-8")


def named() -> set[tuple[str, str]]:
    """The tests that the page names: file and function. `::name` alone means the file that was named before it."""
    found, file = set(), ""
    for path, name in re.findall(r"`([\w/]*\.py)?::(\w+)`", PAGE):
        file = path or file
        found.add((file if "/" in file else f"faults/{file}", name))
    return found


def functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_test_that_is_named_is_there() -> None:
    assert len(named()) > 20
    assert {(file, name) for file, name in named() if name not in functions(TESTS / file)} == set()


def test_every_file_of_fault_tests_has_a_row() -> None:
    files = {f"faults/{path.name}" for path in (TESTS / "faults").glob("test_*.py")}
    assert files <= {file for file, _ in named()}
