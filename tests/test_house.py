"""Promises about the house itself: sizes, the direction of imports, and what training can do without."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("moe_jax", "configs", "launch", "conversion")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# Pinned, but not installed by `make setup`; the last comes with the one before it.
EXTRAS = {"llama_cpp": ["llama-cpp-python"], "executorch": ["executorch"], "pytorch_tokenizers": ["executorch"]}
PIN = re.compile(r"^([A-Za-z0-9_.-]+)==([0-9]\S*)$", re.MULTILINE)

BLOCKED = """
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "litert_torch", "ai_edge_litert", "litert_lm", "conversion"}:
            raise AssertionError(f"training imports {name}")
sys.meta_path.insert(0, Block())
for package in ("moe_jax", "configs", "launch"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
import moe_jax.__main__, launch.__main__
"""


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_is_longer_than_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def code_lines(text: str) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


def test_the_whole_stays_small_enough_to_read():
    assert sum(code_lines(path.read_text()) for path in SOURCES) <= 15_860


def test_every_module_and_public_function_is_documented():
    bare = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        named = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        nodes = [(path.stem, tree)] + [(n.name, n) for n in named if not n.name.startswith("_")]
        bare += [f"{path.relative_to(ROOT)}:{name}" for name, node in nodes if not ast.get_docstring(node)]
    assert bare == []


def test_training_imports_neither_torch_nor_litert():
    done = subprocess.run([sys.executable, "-c", BLOCKED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_imports_point_one_way():
    forbidden = {
        "moe_jax": {"launch", "conversion"},
        "configs": {"launch", "conversion"},
        "conversion": {"launch", "configs"},
        "launch": {"conversion"},
    }
    for path in SOURCES:
        if path.name == "__main__.py":  # a command line resolves the names that a user types
            continue
        package = path.relative_to(ROOT).parts[0]
        assert not imported(path) & forbidden[package], path


def test_imports_inside_training_point_one_way():
    order = ("ops", "parallel", "model", "train")
    may = {part: {part, *order[: order.index(part)]} for part in order} | {"data": {"data"}}
    may["train"].add("data")
    for part, allowed in may.items():
        for path in (ROOT / "moe_jax" / part).glob("*.py"):
            if path.name == "commands.py":  # a command line again
                continue
            found = set(re.findall(r"^\s*from moe_jax\.(\w+)", path.read_text(), re.MULTILINE)) & may.keys()
            assert found <= allowed, f"{path} imports {found - allowed}"


def test_every_imported_package_is_pinned_exactly():
    pins = {}
    for path in (ROOT / "requirements").glob("*.txt"):
        for name, version in PIN.findall(path.read_text()):
            name = name.lower().replace("_", "-")
            assert name not in pins, f"{name} is pinned twice"
            pins[name] = version
    distributions = EXTRAS | dict(packages_distributions())
    own = {*PACKAGES, "tests", *sys.stdlib_module_names}
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")]:
        for module in imported(path) - own:
            names = {name.lower().replace("_", "-") for name in distributions[module]}
            assert names & pins.keys(), f"{path} imports {module}, which is in no requirements file"


def test_pins_of_the_training_half_need_no_torch():
    train = (ROOT / "requirements/train.txt").read_text()
    names = {name for name, _ in PIN.findall(train)}
    assert "jax" in names and not {n for n in names if "torch" in n or "litert" in n}
    assert "-r requirements/train.txt" in (ROOT / "requirements.txt").read_text()
