"""One call from a run folder to a bundle; what cannot be exported is refused and nothing is left behind."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conversion import readback, verify, weights
from conversion.__main__ import main
from conversion.export import export, export_random
from conversion.litert import container
from moe_jax.data import chat
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.errors import UserError
from moe_jax.files import location
from moe_jax.train.catalogue import checkpoint_path, remove
from tests.conversion.conftest import DENSE, MOE, write_run
from tests.conversion.folders import flip_largest

SMALL = dataclasses.replace(DENSE, num_layers=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def add(first, second):\n    return first + second\n"] * 3, 270)


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("small"), SMALL, tokenizer, steps=2)


@pytest.fixture(scope="module")
def float_run(tokenizer, tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("float"), SMALL, tokenizer, quant=None)


@pytest.fixture(scope="module")
def made(run, tmp_path_factory) -> dict[str, Any]:
    said: list[str] = []
    output = tmp_path_factory.mktemp("exported") / "made" / "m.litertlm"
    report = export(run, output, step=1, prefill=(4,), say=said.append)
    return report | {"said": said, "folder": output.parent}


def test_a_checkpoint_that_goes_while_it_is_exported_makes_no_bundle_of_zeros(tokenizer, tmp_path):
    (tmp_path / "run").mkdir()
    folder = write_run(tmp_path / "run", SMALL, tokenizer, steps=2)

    def train_on(line: str) -> None:
        if "codes and scales" in line:
            remove(checkpoint_path(folder, 2))

    with pytest.raises(UserError, match=r"checkpoints/2 was removed while it was read, .* run the same command"):
        export(folder, tmp_path / "out/m.litertlm", say=train_on)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_folder_may_have_any_name(run, made, tokenizer, tmp_path):
    """A URL of it would lead elsewhere: %41 is A, # ? and | end a path."""
    for name, steps in (("x%41#b?c|d", 1), ("xA", 2)):
        (tmp_path / name).mkdir()
        write_run(tmp_path / name, SMALL, tokenizer, steps=steps)
    export(tmp_path / "x%41#b?c|d", tmp_path / "odd.litertlm")
    export(tmp_path / "xA", tmp_path / "first.litertlm", step=1)
    export(tmp_path / "xA", tmp_path / "second.litertlm")
    odd, first, second = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("odd", "first", "second"))
    assert odd == first != second


def test_a_checkpoint_becomes_a_bundle_and_a_safetensors_file_beside_it(run, made):
    parts = readback.sections(made["folder"] / "m.litertlm")
    assert parts.metadata.max_num_tokens == made["context"] == 64 and made["prefill"] == [4]
    assert parts.metadata.jinja_prompt_template == chat.CHAT_TEMPLATE
    told, own = parts.metadata, parts.tokenizer
    special = [told.start_token, told.pad_token, *told.stop_tokens]
    assert [list(token.token_ids.ids) for token in special] == [[own.bos], [own.pad], [own.end], [own.eot]]
    assert parts.tokenizer.fingerprint == Tokenizer.load(run / "tokenizer.json").fingerprint
    assert {p.name for p in made["folder"].iterdir()} == {"m.litertlm", "m.safetensors"}
    saved, want = (weights.load_safetensors(made["folder"] / "m.safetensors"), weights.random(SMALL))
    for name in want.int4_names():
        assert (saved.packed(name) == want.packed(name)).all()
    assert len(made["said"]) == 4
    assert made["mismatches"] == 0 and made["codes_checked"] == sum(
        want.int4(n).codes.size for n in want.int4_names()
    )
    assert made["sha256"] == hashlib.sha256((made["folder"] / "m.litertlm").read_bytes()).hexdigest()


def test_a_prefill_that_the_context_cannot_hold_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="--prefill 4096 is more than the context of 64; ask for at most that"):
        export(run, tmp_path / "m.litertlm", prefill=(4, 4096))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_held_to_the_checkpoint_of_the_step_that_is_named(run, made):
    bundle, sizes = made["folder"] / "m.litertlm", {"texts": 1, "tokens": 6, "probes": 1, "threads": 1}
    right, wrong = (verify.verify(run, bundle, step=step, **sizes) for step in (1, 2))
    assert right["export"]["mismatches"] == 0 and right["parity"]["engine_tokens"] == 6
    assert wrong["export"]["mismatches"] > 0 and wrong["parity"] == {}


def test_a_bundle_that_does_not_hold_its_source_is_not_kept(run, made, tmp_path, monkeypatch):
    for name in ("m.litertlm", "m.safetensors"):
        (tmp_path / name).write_text("mine")
    other = bytes(container.tflite(made["folder"] / "m.litertlm"))  # of step 1
    monkeypatch.setattr("conversion.litert.lower.export_tflite", lambda _, path, *a, **b: path.write_bytes(other))
    with pytest.raises(UserError, match=r"m\.litertlm does not hold its source \(.* differ\); check the disk"):
        export(run, tmp_path / "m.litertlm", step=2, prefill=(4,), overwrite=True)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"m.litertlm": "mine", "m.safetensors": "mine"}


def test_a_checkpoint_that_is_not_what_was_written_is_not_exported(tokenizer, tmp_path, capsys):
    damaged = write_run(tmp_path, SMALL, tokenizer)
    flip_largest(damaged)
    before = sorted(tmp_path.iterdir())
    for command, name in (("export", "m.litertlm"), ("gguf", "m.gguf"), ("export-hf", "hf")):
        assert main([command, str(damaged), str(tmp_path / name)]) == 2
        assert re.search(r"error: checkpoint .* damaged \(.* is not what was written", capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["m.litertlm", "m.safetensors"])
def test_an_existing_output_is_kept(run, tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"{name} exists.*--overwrite"):
        export(run, tmp_path / "m.litertlm")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["mine"]


def test_a_failed_overwrite_leaves_the_old_files_and_nothing_else(run, tmp_path):
    output = tmp_path / "m.litertlm"
    for name in ("m.litertlm", "m.safetensors"):
        (tmp_path / name).write_text("mine")
    # A limit on file size fails the same write calls as a full disk, and needs no disk to fill.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
        with pytest.raises(UserError, match=rf"cannot write {output}: .*make room"):
            export(run, output, prefill=(4,), overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"m.litertlm": "mine", "m.safetensors": "mine"}


def test_a_run_without_quantisation_is_refused_with_the_way_out(float_run, tmp_path):
    with pytest.raises(UserError, match=r"sft run without quantisation.*--quantize-float"):
        export(float_run, tmp_path / "m.litertlm")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_the_checkpoints_is_refused(run, tmp_path):
    other = Tokenizer.train(["while True:\n    pass\n" * 2] * 3, 266)
    other.save(tmp_path / "other.json")
    with pytest.raises(UserError, match="not the one the checkpoint was trained with"):
        export(run, tmp_path / "m.litertlm", tokenizer=tmp_path / "other.json")
    assert [p.name for p in tmp_path.iterdir()] == ["other.json"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": 4096}, "context 4096"),
        ({"experts": "few"}, "sparse, kernel, dense"),
        ({"step": 7}, "no complete checkpoint of step 7"),
    ],
)
def test_options_that_cannot_be_are_refused(run, tmp_path, options, words):
    with pytest.raises(UserError, match=words):
        export(run, tmp_path / "m.litertlm", **options)
    assert not list(tmp_path.iterdir())


def test_an_output_of_another_kind_and_a_folder_that_is_no_run_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"\.litertlm"):
        export(run, tmp_path / "m.bin")
    with pytest.raises(UserError, match="no complete checkpoint"):
        export(tmp_path, tmp_path / "m.litertlm")


def test_a_folder_is_named_after_the_run_that_it_is_asked_of(run, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("conversion.export.export", lambda source, output, **_: asked.append(str(output)) or {})
    monkeypatch.chdir(run)
    for source in (".", str(run), f"../{run.name}/"):
        assert main(["export", source, "--out", "bundles"]) == 0
    assert asked == [f"bundles/{run.name}.litertlm"] * 3
    monkeypatch.undo()
    for name in (".", "/", ""):
        assert main(["export", str(run), name]) == 2
        assert "end its name in .litertlm" in capsys.readouterr().err


@pytest.mark.parametrize(("context", "lengths"), [(8, [8]), (32, [16]), (64, [16]), (128, [16]), (512, [16, 128])])
def test_random_weights_of_the_seed_are_lowered_for_prompts_of_at_most_a_quarter_of_the_context(
    run, tmp_path, monkeypatch, context, lengths
):
    """Where that leaves none, for the shortest, or for as much as the context holds."""
    lowered = []

    def stop(source, *given, **_):
        lowered.append((source, *given[1:]))
        raise UserError("enough")  # the rest takes seconds

    monkeypatch.setattr("conversion.litert.lower.export_tflite", stop)
    config = dataclasses.replace(SMALL, max_position_embeddings=512)
    options = {"tokenizer": run / "tokenizer.json", "context": context, "seed": context}
    with pytest.raises(UserError, match="enough"):
        export_random(config, tmp_path / "m.litertlm", **options)
    ((source, *given),) = lowered
    assert given == [context, lengths]
    name = source.int4_names()[0]
    assert (source.packed(name) == weights.random(config, context).packed(name)).all()


def test_a_tokenizer_with_more_entries_than_random_weights_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"270 entries but model\.vocab_size is 269"):
        few = dataclasses.replace(SMALL, vocab_size=269)
        export_random(few, tmp_path / "m.litertlm", tokenizer=run / "tokenizer.json")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_file_may_have_any_name(run, made, tmp_path):
    shutil.copy(run / "tokenizer.json", tmp_path / "0a1b2c")
    again = export(run, tmp_path / "m.litertlm", step=1, prefill=(4,), tokenizer=tmp_path / "0a1b2c")
    assert again["sha256"] == made["sha256"]


def test_a_run_in_a_bucket_is_exported_to_a_disk_alone(run, made, tokenizer, tmp_path, bucket, capsys):
    (tmp_path / "sparse").mkdir()
    sparse = write_run(tmp_path / "sparse", dataclasses.replace(MOE, num_layers=1), tokenizer)
    for folder, name in ((run, "dense"), (sparse, "sparse")):
        for path in folder.rglob("*"):
            if path.is_file():
                (location(f"{bucket}/{name}") / path.relative_to(folder)).write_bytes(path.read_bytes())
    there = export(f"{bucket}/dense", tmp_path / "there.litertlm", step=1, prefill=(4,))
    assert there["sha256"] == made["sha256"]
    for command, name in (("gguf", "m.gguf"), ("export-hf", "hf")):
        for source, folder in ((str(sparse), "here"), (f"{bucket}/sparse", "there")):
            (tmp_path / folder).mkdir(exist_ok=True)
            assert main([command, source, str(tmp_path / folder / name)]) == 0
    for path in (tmp_path / "here").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "there" / path.relative_to(tmp_path / "here")).read_bytes()
    for words in (
        ["export", str(run), f"{bucket}/m.litertlm"],
        ["export-hf", str(run), f"{bucket}/hf"],
        ["gguf", str(run), f"{bucket}/m.gguf"],
        ["import", str(run), f"{bucket}/run"],
    ):
        assert main(words) == 2
        assert "is in a bucket; name a place on a disk" in capsys.readouterr().err


def test_an_export_that_is_ended_leaves_no_half_written_file(tmp_path):
    words = ["export", "demo_qat", "--random-weights", "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "conversion", *words], stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob("out/.demo_qat*/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait() == 143
    assert list((tmp_path / "out").iterdir()) == []
