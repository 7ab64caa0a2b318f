"""Each command teaches with --help, writes what it measures, and ends bad input in one sentence and status 2."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest

from conversion.__main__ import main

KINDS = pytest.mark.parametrize("exported", ["moe"], indirect=True)


def test_help_teaches_without_importing_torch_jax_or_litert():
    code = "import sys; from conversion.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "heavy = {'jax', 'torch', 'litert_torch', 'litert_lm', 'ai_edge_litert'}\n"
    code += "assert not heavy & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in ("export", "verify", "bench", "chat"):
        assert f"python -m conversion {command} runs/demo" in done.stdout


COMMANDS = (
    "export", "verify", "import", "export-hf", "gguf", "bench", "bench-layer", "roofline", "chat"
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0 and f"python -m conversion {command} " in capsys.readouterr().out


@KINDS
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["export", "{none}", "{none}/m.litertlm"], "no complete checkpoint"),
        (["export", "{run}", "{bundle}"], "exists"),
        (["verify", "{run}", "{none}"], "cannot read"),
        (["verify", "{none}", "{bundle}"], "no complete checkpoint"),
        (["verify", "{run}", "{run}/heldout.txt"], "no .litertlm bundle"),
        (["bench", "{run}/heldout.txt"], "no .litertlm bundle"),
        (["verify", "{none}", "{none}", "--json", "{run}"], "is a folder"),  # before anything else
        (["bench", "{none}", "--profile", "{run}"], "name another place for --profile"),
        (["bench", "{bundle}", "--prefill", "64", "--decode", "9"], "context of 64"),
        (["bench", "{bundle}", "--prefill", "1,8"], "go below 2"),
        (["bench", "{bundle}", "--text", "{none}/*.txt", "--prefill", "8", "--decode", "4"], "no file"),
        (["chat", "{run}/heldout.txt", "--prompt", "x"], "no .litertlm bundle"),
        (["chat", "{bundle}", "--prompt", "word " * 100], "context"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_status_2(run_dir, exported, tmp_path, capsys, words, sentence):
    places = {"run": run_dir, "bundle": exported.bundle, "none": tmp_path / "none"}
    assert main([word.format(**places) for word in words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        "export run m.litertlm --seed -1", "export run m.litertlm --context 0", "export run m.litertlm --step -1",
        "export run m.litertlm --prefill 16,0", "gguf run m.gguf --seed -1", "gguf run m.gguf --step -1",
        "export-hf run out --step -1", "verify run m.litertlm --tokens 0", "verify run m.litertlm --texts 0",
        "verify run m.litertlm --probes 0", "verify run m.litertlm --threads 0", "bench m.litertlm --texts 0",
        "bench m.litertlm --threads 0", "bench m.litertlm --decode -1", "bench m.litertlm --prefill 0",
        "bench m.litertlm --contexts 256,-1", "bench-layer --threads 0", "bench-layer --tokens 0",
        "bench-layer --num-experts 0", "bench-layer --seconds nan", "chat m.litertlm --top-p 5",
        "chat m.litertlm --temperature -1", "chat m.litertlm --threads 0", "chat m.litertlm --max-tokens 0",
        "chat m.litertlm --seed -1",
    ],
)  # fmt: skip
def test_a_number_that_cannot_be_is_refused_by_its_option(words, capsys):
    with pytest.raises(SystemExit) as done:
        main(words.split())
    option = next(word for word in words.split() if word.startswith("--"))
    assert done.value.code == 2 and f"argument {option}: " in capsys.readouterr().err


@KINDS
def test_verify_ends_with_status_1_and_the_name_of_what_differs(run_dir, exported, tmp_path, capsys):
    name = "model.layers.0.self_attn.o_proj"
    raw = bytearray(exported.bundle.read_bytes())
    raw[raw.index(np.ascontiguousarray(exported.weights.packed(name)).tobytes())] ^= 1
    (tmp_path / "m.litertlm").write_bytes(raw)
    words = [str(run_dir), str(tmp_path / "m.litertlm"), "--json", str(tmp_path / "v.json")]
    assert main(["verify", *words]) == 1
    assert f"failed: rung 1 (codes and scales): {name}: 1 of" in capsys.readouterr().err
    result = json.loads((tmp_path / "v.json").read_text())
    assert result["export"]["mismatches"] == 1 and result["export"]["codes_checked"] > 0


@KINDS
def test_bench_writes_the_speeds_of_both_bundles(run_dir, exported, tmp_path):
    sizes = ["--texts", "2", "--prefill", "8", "--decode", "6", "--threads", "1"]
    paths = [str(exported.bundle), "--dense", str(exported.bundle), "--json", str(tmp_path / "s.json")]
    assert main(["bench", *paths, "--text", str(run_dir / "heldout.txt"), *sizes]) == 0
    speed = json.loads((tmp_path / "s.json").read_text())["speed"]
    for name in ("decode_tok_s", "prefill_tok_s", "dense_decode_tok_s", "dense_prefill_tok_s"):
        assert speed[name] > 0
    assert speed["decode_speedup"] > 0 and speed["prefill_speedup"] > 0


@KINDS
def test_chat_answers_a_prompt_and_every_line_of_a_conversation(exported, capsys, monkeypatch):
    assert main(["chat", str(exported.bundle), "--prompt", "add", "--max-tokens", "3"]) == 0
    once = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO("add\n\nadd\n"))
    assert main(["chat", str(exported.bundle), "--max-tokens", "3"]) == 0
    both = capsys.readouterr().out
    assert once.strip() and both.startswith(once) and len(both) > len(once)


def test_bench_layer_measures_the_shape_that_is_asked_for(tmp_path):
    shape = {"d-model": 64, "expert-width": 32, "num-experts": 5, "num-experts-per-tok": 2}
    words = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    rest = ["--tokens", "1,128", "--seconds", "0", "--threads", "1", "--json", str(tmp_path / "layer.json")]
    assert main(["bench-layer", *words, *rest]) == 0
    found = json.loads((tmp_path / "layer.json").read_text())
    assert found["shape"] == dict(zip("DFEK", shape.values(), strict=True))
    assert found["decode_over_dense"] > 0 and found["prefill128_over_dense"] > 0


def test_executorch_asks_for_its_package_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("conversion.executorch.command.find_spec", lambda name: None)
    words = ["executorch", "mobilemoe_s", str(tmp_path / "m.pte"), "--random-weights"]
    assert main(words) == 2
    assert "pip install -r requirements/executorch.txt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["export", "mobilemoe_s", "--random-weights", "--out", "o", "--step", "5"],
            "--step means nothing to random",
        ),
        (["export", "runs/a", "m.litertlm", "--seed", "3"], "--seed means nothing to a run"),
        (
            ["gguf", "mobilemoe_s", "m.gguf", "--random-weights", "--quantize-float"],
            "--quantize-float means nothing",
        ),
        (["executorch", "runs/a", "m.pte", "--seed", "1"], "--seed means nothing to a run"),
    ],
)
def test_an_option_that_would_be_passed_over_is_refused(words, sentence, capsys):
    assert main(words) == 2
    assert sentence in capsys.readouterr().err


def test_the_output_may_stand_behind_options(capsys, tmp_path):
    assert main(["export", str(tmp_path), "--context", "64", str(tmp_path / "m.wrong")]) == 2
    assert "end its name in .litertlm" in capsys.readouterr().err
