"""Examples in docs/ that nothing here can compile: at least what they use is imported."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_swift_examples_import_foundation_where_they_use_it():
    examples = re.findall(r"```swift\n(.*?)```", (DOCS / "phone.md").read_text(), re.DOTALL)
    assert examples
    for example in examples:
        if re.search(r"\b(URL|NS[A-Z]\w+)\b", example):
            assert "import Foundation\n" in example
