"""What a run refuses, what stops it, and how stages follow each other."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from moe_jax.__main__ import main
from moe_jax.config import SourceConfig
from moe_jax.data.commands import build_tokenizer
from moe_jax.errors import UserError
from moe_jax.train import stages, trainer
from moe_jax.train.checkpoint import complete_steps, load_parameters
from moe_jax.train.metrics import read_metrics
from moe_jax.train.stages import run_stages
from tests.train.conftest import VOCAB, write_corpus


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def other_tokenizer(folder: Path) -> Path:
    write_corpus(folder / "other.txt", seed=99)
    text = (folder / "other.txt").read_text()[::-1]
    (folder / "other.txt").write_text(text)
    build_tokenizer((SourceConfig(str(folder / "other.txt")),), VOCAB, folder / "other.json")
    return folder / "other.json"


def test_non_finite_loss_stops_the_run_and_names_step_and_batch(tiny, tmp_path, monkeypatch):
    put_batch, seen = trainer.put_batch, []

    def poison(batch, mesh):
        seen.append(batch)
        if len(seen) == 8:  # a step that would have been saved
            batch = batch | {"loss_mask": batch["loss_mask"] * np.float32(np.nan)}
        return put_batch(batch, mesh)

    monkeypatch.setattr(trainer, "put_batch", poison)
    run = tmp_path / "run"
    with pytest.raises(UserError, match=r"loss is nan at step 8 .*\"next_index\": 7.*step 4 stays"):
        tiny.fit(run)
    assert complete_steps(run) == [4]
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 8))
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["event"] == "non_finite" and last["batch"] == {"next_index": 7}
    monkeypatch.undo()
    tiny.fit(run, "log_every=5")  # mended, it goes on; whatever is saved is also logged
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4, 5, 8, 10, 12]


def test_a_failed_background_save_stops_the_run_at_once(tiny, tmp_path, monkeypatch):
    save = ocp.save_checkpointables_async

    class Failed:
        def result(self):
            raise OSError(28, "No space left on device")

    def fail_at_8(path, *args, **kwargs):
        return Failed() if Path(path).name == "8" else save(path, *args, **kwargs)

    monkeypatch.setattr(ocp, "save_checkpointables_async", fail_at_8)
    with pytest.raises(UserError, match=r"8 failed .*No space left.*the last good one is step 4"):
        tiny.fit(tmp_path / "run")
    assert complete_steps(tmp_path / "run") == [4]
    assert read_metrics(tmp_path / "run")[-1]["step"] < 12
    monkeypatch.undo()
    tiny.fit(tmp_path / "run")
    assert complete_steps(tmp_path / "run") == [8, 12]


def test_run_folder_tells_what_ran(tiny, finished):
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["packages"]["jax"] and environment["devices"] == "1 x cpu"
    assert (finished / "tokenizer.json").read_bytes() == Path(tiny.cfg.data.tokenizer).read_bytes()
    assert not [p for p in finished.iterdir() if p.name.startswith(".") and p.name != ".lock"]


def test_another_config_in_the_folder_is_refused_with_the_differences(tiny, finished):
    before = contents(finished)
    with pytest.raises(UserError, match=r"data.seed was 0, is 1; optimizer.b1 was 0.9, is 0.5"):
        tiny.fit(finished, "data.seed=1", "optimizer.b1=0.5")
    assert contents(finished) == before


def test_options_that_change_no_batch_may_change_on_resume(tiny, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    tiny.fit(run, "log_every=3", "checkpoint.keep=1")
    assert json.loads((run / "config.json").read_text())["log_every"] == 3


@pytest.mark.parametrize("content", ["notes.txt", "config.json"])
def test_a_folder_that_is_no_run_is_refused_and_left_alone(tiny, tmp_path, content):
    (tmp_path / content).write_text("mine")
    with pytest.raises(UserError, match="name another"):
        tiny.fit(tmp_path)
    assert contents(tmp_path) == {content: b"mine"}


def test_a_file_in_place_of_the_run_folder_is_refused(tiny, tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is no run folder"):
        tiny.fit(tmp_path / "run")


def test_a_folder_in_use_is_refused(tiny, tmp_path):
    with (tmp_path / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another run"):
            tiny.fit(tmp_path)


def test_another_tokenizer_is_refused_on_resume_and_as_a_start(tiny, finished, tmp_path):
    other = other_tokenizer(tmp_path)
    run = shutil.copytree(finished, tmp_path / "run")
    before = contents(run)
    with pytest.raises(UserError, match="not the one the checkpoint was trained with"):
        tiny.fit(run, f"data.tokenizer={other}")
    assert contents(run) == before
    with pytest.raises(UserError, match="not the one the checkpoint was trained with"):
        tiny.fit(tmp_path / "next", f"data.tokenizer={other}", f"init_from={finished}")


def test_changed_data_is_refused_on_resume(tiny, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    corpus = tiny.root / "train.txt"
    kept = corpus.read_text()
    try:
        corpus.write_text(kept + " more alpha")
        with pytest.raises(UserError, match="the data changed since the checkpoint"):
            tiny.fit(run)
    finally:
        corpus.write_text(kept)


def test_a_stage_starts_from_parameters_and_biases_only(tiny, finished, tmp_path, monkeypatch):
    started = {}

    def no_loop(cfg, mesh, state, start, *_):
        started.update(state=state, start=start)

    monkeypatch.setattr(trainer, "_loop", no_loop)
    tiny.fit(tmp_path / "next", f"init_from={finished}", "stage=midtrain")
    state, parameters = started["state"], load_parameters(finished)[1]
    assert started["start"] == 0 and int(state.step) == 0
    embedding, bias = state.params["embed"]["embedding"], state.biases["layers"]["ffn"]["router"]
    np.testing.assert_array_equal(embedding, parameters["embed/embedding"])
    np.testing.assert_array_equal(bias["bias"], parameters["layers/ffn/router/bias"])
    assert np.abs(parameters["layers/ffn/router/bias"]).max() > 0


def test_an_unfinished_stage_is_no_start(tiny, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/12")
    with pytest.raises(UserError, match="stopped at step 8 of 12; finish it first"):
        tiny.fit(tmp_path / "next", f"init_from={run}")


def test_stages_follow_each_other_and_complete_ones_are_skipped(tiny, finished, tmp_path, monkeypatch):
    fitted = []

    def fit(cfg, folder):
        fitted.append(cfg.stage)
        return tiny.fit(folder, f"stage={cfg.stage}", f"init_from={cfg.init_from}")

    monkeypatch.setattr(stages, "fit", fit)
    shutil.copytree(finished, tmp_path / "pretrain")
    configs = [tiny.cfg, tiny.variant("stage=midtrain")]
    folders = run_stages(configs, tmp_path)
    assert fitted == ["midtrain"]
    assert folders == [tmp_path / "pretrain", tmp_path / "midtrain"]
    first = read_metrics(folders[1])[0]["loss"]
    assert abs(first - read_metrics(folders[0])[-1]["loss"]) < 0.5
    assert run_stages(configs, tmp_path) == folders and fitted == ["midtrain"]
    with pytest.raises(UserError, match="same name"):
        run_stages([tiny.cfg, tiny.cfg], tmp_path)


def test_evaluation_is_in_bits_of_the_same_bytes(finished, tmp_path, capsys):
    assert main(["evaluate", str(finished), "--json", str(tmp_path / "eval.json")]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert f"{result['nats_per_token']:.4f}" in capsys.readouterr().out
    assert result["step"] == 12 and result["bytes"] > result["tokens"] > 0
    bits = result["nats_per_token"] * result["tokens"] / math.log(2) / result["bytes"]
    assert math.isclose(result["bits_per_byte_model"], bits)
    assert 0 < result["bits_per_byte_xz9"] < 8 and 0 < result["bits_per_byte_gzip9"] < 8
    assert result["nats_per_token"] < 0.8 * math.log(VOCAB)


def test_generation_goes_on_with_a_prompt(finished, capsys):
    command = ["generate", str(finished), "--prompt", "alpha beta", "--max-tokens"]
    assert main([*command, "4"]) == 0
    assert len(capsys.readouterr().out) > 1
    assert main([*command, "100"]) == 2
    assert "ask for fewer tokens" in capsys.readouterr().err
