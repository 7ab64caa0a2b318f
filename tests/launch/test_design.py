"""The model of least loss for a phone: within its budget, counted as everywhere, and trainable as printed."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

import configs
from configs.mobilemoe import SMALL
from launch.__main__ import main
from launch.design import Budget, best_designs, best_of, command_of, designs, point_of
from launch.scaling_law import PUBLISHED, expansion
from moe_jax.config import TRAINING_OPTIONS
from moe_jax.errors import UserError
from moe_jax.files import write_json
from moe_jax.flops import cache_bytes, count_parameters, deployed_bytes
from moe_jax.overrides import differences, to_dict

BUDGET = Budget(memory=0.3e9, active=0.08e9, context=2048, tokens=400e9)
VOCAB = 32_000


@pytest.fixture(scope="module")
def found():
    return best_designs(PUBLISHED, BUDGET, VOCAB)


def test_every_design_is_counted_like_any_model_and_keeps_to_the_budget(found):
    assert [expansion(d.model) for d in found] == [1, 2, 4, 8, 16, 32]
    for design in found:
        assert (design.active, design.total) == count_parameters(design.model)
        wanted = deployed_bytes(design.model).total + cache_bytes(design.model, 2048)
        assert design.bytes == pytest.approx(wanted) and wanted <= BUDGET.memory
        assert design.active <= BUDGET.active
        assert design.loss == PUBLISHED.loss(design.active, 400e9, expansion(design.model))


def test_no_member_of_the_family_within_the_budget_has_less_loss(found):
    for design in found:
        coarse = round(expansion(design.model))
        assert design.loss == pytest.approx(
            min(d.loss for d in designs(PUBLISHED, BUDGET, coarse, VOCAB)), abs=1e-4
        )


def test_the_budget_of_s_has_the_shape_of_s_as_its_best_of_eight_experts():
    size = deployed_bytes(SMALL).total + cache_bytes(SMALL, 2048)
    budget = Budget(size + 1, count_parameters(SMALL).active + 1, 2048, 500e9)
    assert min(designs(PUBLISHED, budget, 8, SMALL.vocab_size), key=lambda d: d.loss).model == SMALL


def test_a_fixed_compute_is_shared_between_size_and_text():
    budget = BUDGET._replace(tokens=None, flops=1e20)
    for design in best_designs(PUBLISHED, budget, VOCAB):
        assert 6 * design.active * design.tokens == pytest.approx(1e20, rel=1e-6)


def test_the_printed_command_trains_the_designed_model(found):
    for design in found:
        words = [word for word in command_of(design).split() if "=" in word]
        cfg = configs.load("mobilemoe_s", words)
        assert cfg.steps * cfg.tokens_per_step == pytest.approx(design.tokens, abs=cfg.tokens_per_step)
        changed = differences(cfg.model, design.model)
        assert all(name in TRAINING_OPTIONS for name in changed)


def test_what_the_law_covers_is_preferred_to_an_extrapolation(found):
    assert not any(PUBLISHED.covers(d.active, d.tokens, expansion(d.model)) for d in found)
    assert best_of(PUBLISHED, found).loss == min(d.loss for d in found)
    wide = PUBLISHED._replace(spans=((0.079e9, 1e9), *PUBLISHED.spans[1:]))
    best = best_of(wide, found)
    assert wide.covers(best.active, best.tokens, expansion(best.model))


class _Texts(HTMLParser):
    """What stands in a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.found.append(data)


def test_the_command_prints_a_table_and_writes_numbers_and_a_picture(capsys, tmp_path):
    words = ["--memory", "0.1", "--active", "0.02", "--vocab-size", "1024"]
    files = ["--json", str(tmp_path / "d.json"), "--html", str(tmp_path / "d.html")]
    assert main(["design", *words, *files]) == 0
    out, record = capsys.readouterr().out, json.loads((tmp_path / "d.json").read_text())
    assert out.rstrip().rpartition("\n")[2].startswith("python -m moe_jax train mobilemoe_s --run runs/designed ")
    assert record["best"] in record["designs"] and "<- least" in out
    texts = _Texts((tmp_path / "d.html").read_text()).found
    assert {"E 1", "E 8", "across: GB on the phone; up: nats per token"} <= set(texts)


def test_a_budget_that_holds_no_model_is_refused(capsys):
    assert main(["design", "--memory", "0.001", "--active", "1"]) == 2
    assert "give more of either, or a smaller --vocab-size" in capsys.readouterr().err


def test_a_finished_run_is_a_point_of_the_law(finished, tiny):
    point = point_of(str(finished))
    assert point.active == count_parameters(tiny.cfg.model).active
    assert point.expansion == expansion(tiny.cfg.model)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert point.tokens == sum(line["tokens"] for line in lines)
    assert point.loss == lines[-1]["loss"]  # a twentieth of a few steps is the last one


def test_runs_whose_loss_is_not_that_of_their_tokens_are_refused(tiny, tmp_path):
    write_json(tmp_path / "config.json", to_dict(replace(tiny.cfg, steps=3)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss": 3.0, "tokens": 8}\n')
    with pytest.raises(UserError, match="has done 2 of 3 steps"):
        point_of(str(tmp_path))
    write_json(tmp_path / "config.json", to_dict(replace(tiny.cfg, steps=2, init_from="runs/a")))
    with pytest.raises(UserError, match="went on from runs/a"):
        point_of(str(tmp_path))
    with pytest.raises(UserError, match="is no run of this version"):
        point_of(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"no folder matches .*nothing/\*; name folders"):
        point_of(str(tmp_path / "nothing/*"))


def test_a_law_is_fitted_to_runs(capsys, tiny, tmp_path):
    runs = []
    for layers in (1, 2, 3):
        for steps in (100, 200, 400):
            for width in (0, 64, 192):  # of the shared expert: other expansions
                model = replace(tiny.cfg.model, num_layers=layers)
                model = replace(model, moe=replace(model.moe, shared_expert_width=width))
                run = tmp_path / f"{layers}-{steps}-{width}"
                run.mkdir()
                write_json(run / "config.json", to_dict(replace(tiny.cfg, model=model, steps=steps)))
                active = count_parameters(model).active
                loss = 2 + (active / 1e6) ** -0.3 * 0.3 + (steps / 100) ** -0.4 + 0.05 / expansion(model)
                line = {"step": steps, "loss": loss, "tokens": steps * 10_000}
                (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
                runs.append(str(run))
    words = ["design", "--memory", "0.1", "--active", "0.02", "--vocab-size", "1024", "--json", str(tmp_path / "j")]
    assert main([*words, "--runs", *runs]) == 0
    assert "The law is fitted to your runs" in capsys.readouterr().out
    record = json.loads((tmp_path / "j").read_text())
    assert len(record["points"]) == 27 and record["rmse"] < 0.02
    assert main([*words, "--runs", *runs[:5]]) == 2
    assert "do not determine the law" in capsys.readouterr().err
