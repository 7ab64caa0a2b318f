"""What the documents tell a reader to type is what the programs take."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import configs
from moe_jax.command_line import parse

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS.append(ROOT / "conversion/kernel/README.md")
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def commands(document: Path) -> list[list[str]]:
    """The words of every `python -m` in a block of code, without comments, pipes and what follows `&&`."""
    text = document.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    blocks += re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    found = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.split(line.strip(), comments=True) if "python -m " in line else []
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ">")), len(words))
            if words[:2] == ["python", "-m"]:
                found.append(words[2:end])
            words = words[end + 1 :]
    return found


def mentioned(document: Path) -> list[list[str]]:
    """The words of every `python -m` within a sentence or a table, which may leave options out."""
    return [shlex.split(words) for words in re.findall(r"`python -m ([^`]+)`", document.read_text())]


def parser_of(package: str) -> Any:
    return importlib.import_module(f"{package}.__main__")._parser()


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_of_a_document_is_one_that_the_program_takes(document):
    for package, *words in commands(document):
        if package in ("pip", "tests"):
            continue
        arguments = parse(parser_of(package), words)
        if getattr(arguments, "config", None) in configs.registered():
            configs.load(arguments.config, getattr(arguments, "overrides", []))


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_command_that_a_document_mentions_exists(document, capsys):
    for module, *words in mentioned(document):
        if "." in module:
            assert importlib.util.find_spec(module), module
            continue
        with pytest.raises(SystemExit, match=r"^0$"):
            parser_of(module).parse_args([*words[:1], "--help"])
        shown = capsys.readouterr().out
        assert all(word in shown for word in words if word.startswith("--")), words


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_no_command_of_a_document_is_missed(document):
    assert len(commands(document)) + len(mentioned(document)) == document.read_text().count("python -m ")


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_link_within_the_repository_leads_to_a_file(document):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_swift_examples_import_foundation_where_they_use_it():
    examples = re.findall(r"```swift\n(.*?)```", (ROOT / "docs/phone.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        if re.search(r"\b(URL|NS[A-Z]\w+)\b", example):
            assert "import Foundation\n" in example
