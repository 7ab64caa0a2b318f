"""The corpus every Python installation carries: the source text of its standard library.

Files are split into train and held-out by a hash of their relative path, so a file never changes sides. Left out,
and why: test packages (half of all bytes, mostly tables of expected values), `encodings` and `pydoc_data`
(generated tables that any compressor memorises), `_sysconfigdata*` (paths of the build machine) and third-party
packages (not the same on two machines).
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from moe_jax.errors import UserError

HELDOUT_PERCENT = 5
_EXCLUDED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
_LONGEST_ANSWER = 600  # characters of a docstring that become an answer

Message = dict[str, str]


def stdlib_files(heldout: bool) -> list[Path]:
    """The files of one side of the split, ordered by hash so that every prefix is a fair sample."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _EXCLUDED]
        for path in (Path(folder, name) for name in names):
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
                digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()
                if (int(digest[:8], 16) % 100 < HELDOUT_PERCENT) == heldout:
                    found.append((digest, path))
    if not found:
        raise UserError(
            f"no standard library source under {root}; install Python with its sources, "
            "or set data.sources to your own files"
        )
    return [path for _, path in sorted(found)]


def stdlib_digest(heldout: bool) -> list:
    """[bytes, sha256 as hex] of one side of the split, relative paths included."""
    root, total, digest = Path(sysconfig.get_path("stdlib")), 0, hashlib.sha256()
    for path in stdlib_files(heldout):
        content = path.read_bytes()
        total += len(content)
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return [total, digest.hexdigest()]


def stdlib_texts(heldout: bool) -> Iterator[str]:
    """The text of each file; the few that are not UTF-8 are left out."""
    for path in stdlib_files(heldout):
        try:
            yield path.read_text("utf-8")
        except UnicodeDecodeError:
            continue


def stdlib_chats(heldout: bool) -> Iterator[list[Message]]:
    """Conversations about real functions; question and wording follow from a hash of the function's name."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in stdlib_files(heldout):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in old modules
                tree = ast.parse(path.read_text("utf-8"))
        except (SyntaxError, ValueError):  # not UTF-8, or not for this version of Python
            continue
        yield from _chats(tree, module)


def _chats(node: ast.AST, scope: str) -> Iterator[list[Message]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _chats(child, f"{scope}.{child.name}")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            documentation = _first_paragraphs(ast.get_docstring(child) or "")
            if documentation:
                yield _chat(f"{scope}.{child.name}", _signature(child), documentation)


def _chat(name: str, signature: str, documentation: str) -> list[Message]:
    """One of three shapes: what does it do; which signature fits this description; both in two turns."""
    dice = hashlib.sha256(name.encode()).digest()
    what = (
        f"What does `{name}` do?",
        f"Explain the Python function `{name}`.",
        f"What is this function for?\n\n```python\n{signature}\n```",
    )[dice[1] % 3]
    which = (
        f"What is the signature of `{name}`?",
        f"Write the signature of `{name}`, which is documented like this:\n\n{documentation}",
    )[dice[2] % 2]
    code = f"```python\n{signature}\n```"
    turns = (((what, documentation),), ((which, code),), ((what, documentation), ("And its signature?", code)))[
        dice[0] % 3
    ]
    return [
        {"role": role, "content": content}
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ]


def _signature(function: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    kind = "async def" if isinstance(function, ast.AsyncFunctionDef) else "def"
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{kind} {function.name}({ast.unparse(function.args)}){returns}:"


def _first_paragraphs(docstring: str) -> str:
    """Whole leading paragraphs up to an example, as many as fit; empty where that is next to nothing."""
    kept = ""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        if len(kept) + len(paragraph) > _LONGEST_ANSWER or paragraph.startswith(">>>"):
            break
        kept += ("\n\n" if kept else "") + paragraph
    return kept.strip() if len(kept) > 20 else ""
