"""Stages follow each other: what the next takes over, what counts as finished, what is skipped."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from moe_jax.errors import Preempted, UserError
from moe_jax.overrides import apply
from moe_jax.parallel.mesh import single_device_mesh
from moe_jax.train import stages, trainer
from moe_jax.train.checkpoint import complete_steps, final_checkpoint, load_parameters
from moe_jax.train.metrics import read_metrics
from moe_jax.train.stages import run_stages
from tests.train.test_trainer import events, stopped_after


def test_a_stage_starts_from_parameters_and_biases_only(tiny, finished, tmp_path, monkeypatch):
    started = {}

    def no_loop(self, start, _):
        started.update(state=self.state, start=start)

    monkeypatch.setattr(trainer._Trainer, "_train", no_loop)
    tiny.fit(tmp_path / "next", f"init_from={finished}", "stage=midtrain")
    state, parameters = started["state"], load_parameters(finished)[1]
    assert started["start"] == 0 and int(state.step) == 0
    embedding, bias = state.params["embed"]["embedding"], state.biases["layers"]["ffn"]["router"]
    np.testing.assert_array_equal(embedding, parameters["embed/embedding"])
    np.testing.assert_array_equal(bias["bias"], parameters["layers/ffn/router/bias"])
    assert np.abs(parameters["layers/ffn/router/bias"]).max() > 0
    assert not events(tmp_path / "next", "model_changed")


def test_a_stage_that_computes_something_else_with_its_start_says_so(tiny, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer._Trainer, "_train", lambda *_: None)
    options = ["model.rope.theta=10000", "model.moe.num_experts_per_tok=1", "model.moe.dispatch=drop_and_pad"]
    tiny.fit(tmp_path / "next", f"init_from={finished}", *options)
    (event,) = events(tmp_path / "next", "model_changed")
    assert event["changes"] == {"model.rope.theta": [500000.0, 10000.0], "model.moe.num_experts_per_tok": [2, 1]}
    said = capsys.readouterr().err
    assert f"starting from {finished} as another model: " in said and "num_experts_per_tok was 2, is 1" in said


def test_an_unfinished_stage_is_no_start_as_is_told_before_any_text_is_read(tiny, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "make_train_iterator", None)
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/12")
    with pytest.raises(UserError, match="stopped at step 8 and has no final checkpoint; finish it"):
        tiny.fit(tmp_path / "next", f"init_from={run}")
    assert not (tmp_path / "next").exists()


def test_a_started_stage_needs_its_start_no_more(tiny, finished, tmp_path, monkeypatch):
    with pytest.raises(Preempted):
        stopped_after(monkeypatch, 2, lambda: tiny.fit(tmp_path / "next", f"init_from={finished}"))
    tiny.fit(tmp_path / "next", "init_from=gone", "steps=4")
    assert complete_steps(tmp_path / "next")[-1] == 4


def test_a_run_ended_early_is_finished_and_one_extended_is_not(tiny, finished, tmp_path, monkeypatch):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/12")
    eight = tiny.variant("steps=8")
    assert not trainer.is_complete(eight, run)
    tiny.fit(run, "steps=8")
    assert trainer.is_complete(eight, run) and final_checkpoint(run).name == "8"
    with pytest.raises(Preempted):
        stopped_after(monkeypatch, 9, lambda: tiny.fit(run, "steps=16"))
    with pytest.raises(UserError, match=r"stopped at step 1\d and has no final checkpoint; finish it"):
        tiny.fit(tmp_path / "next", f"init_from={run}")


def test_a_notice_while_a_stage_ends_keeps_the_next_from_starting(tiny, tmp_path, monkeypatch):
    configs = [tiny.variant("data.global_batch_size=8", f"stage={stage}") for stage in ("pretrain", "midtrain")]
    with pytest.raises(Preempted, match="SIGTERM: pretrain is complete"):
        stopped_after(monkeypatch, 12, lambda: run_stages(configs, tmp_path))
    assert complete_steps(tmp_path / "pretrain")[-1] == 12 and not (tmp_path / "midtrain").exists()
    assert run_stages(configs, tmp_path)[1] == tmp_path / "midtrain"
    assert complete_steps(tmp_path / "midtrain")[-1] == 12


def test_complete_stages_may_have_had_other_data_where_that_is_said(tiny, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "pretrain")
    other = [tiny.variant("data.max_bytes=20000")]
    with pytest.raises(UserError, match=r"data\.max_bytes was 0, is 20000"):
        run_stages(other, tmp_path)
    assert run_stages(other, tmp_path, new_data=True) == [tmp_path / "pretrain"]


def test_stages_follow_each_other_and_complete_ones_are_skipped(tiny, finished, tmp_path, monkeypatch):
    fitted = []

    def fit(cfg, folder, **options):
        fitted.append(cfg.stage)
        return tiny.fit(folder, f"stage={cfg.stage}", f"init_from={cfg.init_from}")

    monkeypatch.setattr(stages, "fit", fit)
    monkeypatch.setattr(stages, "make_mesh", lambda _: single_device_mesh())
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


@pytest.mark.parametrize("name", ["", "../beside", "a/b", ".hidden"])
def test_a_stage_that_is_no_name_of_a_folder_is_refused_before_any_is_trained(tiny, tmp_path, name):
    with pytest.raises(UserError, match="names a folder"):
        run_stages([tiny.cfg, replace(tiny.cfg, stage=name)], tmp_path / "root")
    assert not list(tmp_path.iterdir())


def test_tokens_that_a_bucket_lacks_for_a_later_stage_are_asked_for_at_the_start(tiny, tmp_path, bucket):
    first = tiny.variant("data.global_batch_size=8")
    later = apply(first, ["stage=next", f"data.cache_dir={bucket}/tokens"])
    with pytest.raises(UserError, match=rf"{bucket}/tokens has no tokens of .*moe_jax tokenize CONFIG'"):
        run_stages([first, later], tmp_path / "root")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["data.tokenizer=none.json"], "no tokenizer at"),
        (["data.sources.0.path=none.txt"], "no file matches 'none.txt'"),
        (["checkpoint.keep_best=true", "data.heldout=[]"], "keep_best needs data.heldout"),
        (["model.num_layers=3"], "next has other parameters than pretrain"),
        (["mesh.context=3"], "does not fit 8"),
        (["mesh.fsdp=1", "mesh.data=8", "gradient_accumulation=2"], "sequences per microbatch 4 does not divide"),
    ],
)
def test_what_a_later_stage_lacks_is_said_before_an_earlier_one_is_trained(tiny, tmp_path, options, words):
    first = tiny.variant("data.global_batch_size=8")
    with pytest.raises(UserError, match=words):
        run_stages([first, apply(first, ["stage=next", *options])], tmp_path / "root")
    assert not list(tmp_path.iterdir())
