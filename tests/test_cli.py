"""Each command teaches with --help, and each bad input ends in one sentence and status 2."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import configs
import launch.__main__
from moe_jax.__main__ import main
from moe_jax.command_line import guarded
from moe_jax.files import write_bytes

CONFIG = "demo_pretrain"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch):
    """Training in this process must not tell the children of later tests where to keep programs."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")


def sentence(capsys, *words: str, entry=main) -> str:
    """The one line on standard error of a command that must end with status 2."""
    assert entry(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_help_teaches_without_importing_jax():
    code = "import sys; from moe_jax.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for word in ("tokenizer", "train", "evaluate", "generate", "python -m moe_jax train CONFIG --run"):
        assert word in result.stdout


def test_training_imports_neither_torch_nor_litert():
    code = "import sys, moe_jax.train.stages, moe_jax.train.evaluate, moe_jax.generate\n"
    code += "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'ai_edge_litert', 'litert_torch')]\n"
    code += "assert not bad, bad"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command", ["configs", "train", "params", "evaluate", "inspect", "generate", "tokenizer", "tokenize", "batch"]
)
def test_each_command_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"Example:\n  python -m moe_jax {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["--max-tokens=0", "--temperature=-1", "--top-p=0", "--top-p=5", "--seed=-1", "--seed=4294967296"]
)
def test_a_number_out_of_range_is_refused_by_its_option(capsys, option):
    with pytest.raises(SystemExit) as stop:
        main(["generate", "runs/none", "--prompt", "a", option])
    assert stop.value.code == 2
    assert f"argument {option.partition('=')[0]}: '" in capsys.readouterr().err


def test_a_folder_or_a_path_below_a_file_cannot_take_numbers(capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path, tmp_path / "file/p.json"):
        assert main(["params", CONFIG, "--json", str(path)]) == 2
        assert capsys.readouterr().err.endswith("; name another place for --json\n")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "mine")]


def test_a_full_disk_is_told_also_where_the_system_names_no_file(capsys):
    def fill(_: object) -> None:
        with open("/dev/full", "w") as file:
            file.write("x")

    assert guarded(fill, None) == 2
    assert capsys.readouterr().err == "error: No space left on device; make room\n"


def test_a_reader_that_has_enough_ends_a_command_quietly():
    command = f"{sys.executable} -m moe_jax configs | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert len(done.stdout) == 1 and done.stderr == "" and done.returncode in (0, 141)
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "moe_jax", "configs"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_an_interrupt_is_one_word_and_the_status_that_a_shell_knows(capsys):
    def wait(_):
        raise KeyboardInterrupt

    assert guarded(wait, None) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_configs_are_listed_with_their_purpose(capsys):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(configs.registered())


def test_all_options_of_a_config_are_listed_as_they_are_typed(capsys):
    assert main(["configs", "demo_sft", "steps=7", "model.moe=none"]) == 0
    words = capsys.readouterr().out.splitlines()
    assert {"steps=7", "model.moe=none", "data.sources.0.path=stdlib:chat"} <= set(words)
    assert configs.load("demo_sft", words) == configs.load("demo_sft", ["steps=7", "model.moe=none"])


def test_an_option_of_the_config_with_dashes_is_mended(capsys):
    with pytest.raises(SystemExit):
        main(["params", CONFIG, "--steps=4"])
    assert "an option of the config is written steps=4" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["params", CONFIG, "--steps", "4"])
    assert "an option of the config is written steps=4" in capsys.readouterr().err


def test_what_a_bucket_answers_is_one_sentence(capsys):
    class Refused(Exception):
        __module__ = "gcsfs.retry"

    def read(_: object) -> None:
        raise Refused("no such\nbucket")

    assert guarded(read, None) == 2
    assert capsys.readouterr().err.startswith("error: a bucket cannot be reached (no such bucket); check")


def test_a_prompt_that_is_no_utf8_and_a_screen_that_is_none_are_no_traceback(tmp_path):
    command = [sys.executable, "-m", "moe_jax", "generate", str(tmp_path), "--prompt", b"\xff"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 2 and done.stderr.endswith(b"argument --prompt: the text is not UTF-8\n")
    environment = os.environ | {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "moe_jax", "configs", "demo_sft", "init_from=é"]
    done = subprocess.run(command, capture_output=True, check=False, env=environment)
    assert done.returncode == 0 and b"init_from=" in done.stdout


def test_params_are_written_as_json_too(capsys, tmp_path):
    assert main(["params", CONFIG, "--json", str(tmp_path / "p.json"), "model.num_layers=2"]) == 0
    result = json.loads((tmp_path / "p.json").read_text())
    assert f"{result['active']:,} active" in capsys.readouterr().out
    assert 0 < result["active"] < result["total"] and result["train_flops_per_token"] > 0


def test_unknown_configs_and_options_suggest_the_nearest(capsys, tmp_path):
    run = ["--run", str(tmp_path / "run")]
    assert "did you mean 'demo_pretrain'" in sentence(capsys, "train", "demo_pretrian", *run)
    assert "did you mean 'data.seq_len'" in sentence(capsys, "train", CONFIG, *run, "data.seqlen=3")
    assert "a whole number" in sentence(capsys, "train", CONFIG, "steps=soon", *run)
    assert "cannot be read as JSON" in sentence(capsys, "params", str(tmp_path / "no.json"))
    (tmp_path / "other.json").write_text('{"version": 1}')
    other = sentence(capsys, "params", str(tmp_path / "other.json"))
    assert f"{tmp_path}/other.json is no config: unknown option 'version'" in other
    assert f"is a folder; name a config, or as one {tmp_path}/config.json" in sentence(
        capsys, "params", str(tmp_path)
    )
    launched = sentence(capsys, "local", CONFIG, *run, "setps=1", entry=launch.__main__.main)
    assert "did you mean 'steps'" in launched
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, words",
    [
        ("model.num_heads=5", "num_heads 5 is not a multiple"),
        ("quant=default model.moe.expert_width=40", "is not a multiple of the quantisation group 32"),
        ("mesh.data=7", "does not fit"),
        ("data.sources.0.path=nowhere/*.txt", "nowhere"),
        ("data.sources.0.path=EMPTY", "empty"),
        ("data.sources.0.path=LATIN1", "UTF-8"),
        ("data.sources.0.path=SHORT", "less than one batch"),
        ("data.tokenizer=nowhere.json", "no tokenizer at nowhere.json"),
        ("data.tokenizer=LATIN1", "no sound tokenizer.json"),
        ("model.vocab_size=64", "set model.vocab_size to 262"),
        ("init_from=nowhere", "no complete checkpoint"),
        ("checkpoint.keep_best=True data.heldout.0.path=absent/*.txt", "absent"),
    ],
)
def test_bad_training_input_is_refused_before_anything_is_written(
    capsys, tmp_path, small_tokenizer, override, words
):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "LATIN1").write_bytes("é".encode("latin-1") * 99)
    (tmp_path / "SHORT").write_text("a few words")
    files = {name: str(tmp_path / f"{name}.txt") for name in ("EMPTY", "LATIN1", "SHORT")}
    for name, path in files.items():
        (tmp_path / name).rename(path)
        override = override.replace(f"={name}", f"={path}")
    (tmp_path / "text.txt").write_text("some words to train on\n" * 2000)
    options = [f"data.sources.0.path={tmp_path / 'text.txt'}", f"data.tokenizer={small_tokenizer}"]
    options += ["data.seq_len=64", "data.global_batch_size=8", "data.cache_dir=", "mesh.fsdp=-1"]
    options += override.split()
    error = sentence(capsys, "train", CONFIG, "--run", str(tmp_path / "run"), *options)
    assert words in error, error
    assert not (tmp_path / "run/config.json").exists()
    # The folder is as good as none: the command's next try gets as far as this one.
    assert words in sentence(capsys, "train", CONFIG, "--run", str(tmp_path / "run"), *options)


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "text.txt").write_text("some words to train on\n" * 50)
    options = [f"data.sources.0.path={folder / 'text.txt'}", "model.vocab_size=262"]
    path = folder / "tokenizer.json"
    assert main(["tokenizer", CONFIG, *options, f"data.tokenizer={path}"]) == 0
    return path


def test_an_existing_tokenizer_is_kept(capsys, small_tokenizer):
    before = small_tokenizer.read_bytes()
    assert "overwrite" in sentence(capsys, "tokenizer", CONFIG, f"data.tokenizer={small_tokenizer}")
    assert small_tokenizer.read_bytes() == before


def test_tokens_are_made_ahead_of_a_run(capsys, small_tokenizer, tmp_path):
    text = small_tokenizer.parent / "text.txt"
    options = [f"data.sources.0.path={text}", f"data.heldout.0.path={text}", f"data.tokenizer={small_tokenizer}"]
    assert main(["tokenize", CONFIG, *options, f"data.cache_dir={tmp_path}/tokens"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and all(line.startswith(f"{text}: 1 documents, ") for line in said)
    assert len(list((tmp_path / "tokens").iterdir())) == 1
    assert "name the folder" in sentence(capsys, "tokenize", CONFIG, *options, "data.cache_dir=")
    assert "is 261" in sentence(capsys, "tokenize", CONFIG, *options, "model.vocab_size=261")


def test_what_is_no_checkpoint_cannot_be_inspected(capsys, tmp_path):
    assert "neither a run folder" in sentence(capsys, "inspect", str(tmp_path))


@pytest.mark.parametrize("command", [["evaluate"], ["generate", "--prompt", "x"]])
def test_a_run_without_a_checkpoint_is_refused(capsys, tmp_path, command):
    assert "train it first" in sentence(capsys, *command, str(tmp_path))


def test_unknown_words_are_refused():
    for words in (["train", CONFIG, "--run", "r", "--fast"], ["inspect", "r", "a=b"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 2


def test_a_disk_that_is_full_in_a_write_says_what_was_written(capsys, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")  # of write(2), which knows no names

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    assert main(["params", CONFIG, "--json", str(tmp_path / "p.json")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/p.json: No space left on device; make room\n"


def test_a_full_disk_is_one_sentence(capsys, monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device", str(tmp_path / "p.json"))

    monkeypatch.setattr("moe_jax.files.write_bytes", full)
    assert main(["params", CONFIG, "--json", str(tmp_path / "p.json")]) == 2
    assert "No space left on device" in capsys.readouterr().err


def test_files_are_replaced_whole_or_not_at_all(tmp_path):
    write_bytes(tmp_path / "a/b.json", b"old")
    with pytest.raises(TypeError):
        write_bytes(tmp_path / "a/b.json", "no bytes")  # type: ignore[arg-type]
    assert (tmp_path / "a/b.json").read_bytes() == b"old"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.json"]


def test_a_place_for_figures_that_cannot_be_is_told_before_the_work(tmp_path, capsys):
    (tmp_path / "file").touch()
    for name in (".", "file/x.json"):
        assert guarded(pytest.fail, argparse.Namespace(json=str(tmp_path / name))) == 2
        assert capsys.readouterr().err.endswith("; name another place for --json\n")
    for name in ("/dev/null", str(tmp_path / "new/x.json"), "gs://nobody/x.json"):
        assert guarded(lambda _: 0, argparse.Namespace(json=name)) == 0


IN_COLLECTOR = """
import gc, os, signal, sys, time
from moe_jax.command_line import heed_interrupts
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
heed_interrupts()
def collected(phase, _):
    if phase == "start":
        gc.callbacks.remove(collected)
        os.kill(os.getpid(), {number})
        sum(range(10))  # where the handler runs, and Python drops what it raises
gc.callbacks.append(collected)
gc.collect()
time.sleep(30)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_a_signal_that_falls_into_the_garbage_collectors_callback_is_not_lost(number, status):
    command = [sys.executable, "-c", IN_COLLECTOR.format(number=int(number))]
    done = subprocess.run(command, capture_output=True, timeout=25)
    assert done.returncode == status, done.stderr
