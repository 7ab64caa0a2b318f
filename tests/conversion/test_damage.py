"""A disk that lost a sector: what follows the bytes of a bundle answers as before, or says that it is damaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conversion import chat_experts, readback, roofline
from conversion.litert.engine import Engine
from moe_jax.config import ModelConfig
from moe_jax.errors import UserError

SECTOR, STEP = 512, 3


def damaged(whole: Path, folder: Path) -> Iterator[Path]:
    """Copies of the bundle, each with zeros in the place of one of its sectors."""
    raw = whole.read_bytes()
    for number in range(0, len(raw) // SECTOR, STEP):
        lost = slice(number * SECTOR, (number + 1) * SECTOR)
        if any(raw[lost]):
            path = folder / f"{number}.litertlm"
            path.write_bytes(raw[: lost.start] + bytes(SECTOR) + raw[lost.stop :])
            yield path
            path.unlink()


def answer(ask: Callable[[Path], Any], path: Path) -> Any:
    """What it says, or the sentence for the user."""
    try:
        return ask(path)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("exported", "form"), [("moe", "sparse"), ("moe", "kernel")], indirect=["exported"])
def test_a_lost_sector_gives_a_sound_answer_or_a_sentence(exported, form, tmp_path):
    whole = exported.bundle if form == "sparse" else exported.again(tmp_path, form)
    source = exported.weights
    expected = {n: (source.int4(n).codes, source.scales(n)) for n in source.int4_names()}

    def compare(path: Path) -> readback.Findings:
        return readback.compare(readback.sections(path).tflite, expected, path)

    def config_of(path: Path) -> ModelConfig:
        return roofline.config_of(path)

    clean, config = compare(whole), config_of(whole)
    told = {compare: 0, config_of: 0}
    for path in damaged(whole, tmp_path):
        found, shown = answer(compare, path), answer(config_of, path)
        assert isinstance(found, str) or found == clean or found.mismatches, path
        assert isinstance(shown, str) or shown == config, path
        for ask, said in ((compare, found), (config_of, shown)):
            told[ask] += f"{path} is damaged (" in str(said)
    assert min(told.values()) > 2


@pytest.mark.parametrize("exported", ["dense"], indirect=True)
@pytest.mark.parametrize("load", [Engine, chat_experts.Experts])
def test_no_engine_is_given_what_cannot_be_followed(exported, tmp_path, load):
    raw = exported.bundle.read_bytes()
    start = raw.index(exported.tflite.read_bytes())
    (tmp_path / "m.litertlm").write_bytes(raw[:start] + b"\xff" * 4 + raw[start + 4 :])
    with pytest.raises(UserError, match=r"m\.litertlm is damaged \(.+\); export it again"):
        load(tmp_path / "m.litertlm", 1)
