"""`python -m moe_jax`: train, look at and use models. Imports JAX only where a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any

import configs
from moe_jax.command_line import (
    add_command,
    add_json,
    add_overrides,
    at_least,
    guarded,
    heed_interrupts,
    leave,
    make_parser,
    parse,
    prompt,
    seed,
    top_p,
)
from moe_jax.errors import UserError
from moe_jax.files import location, write_json
from moe_jax.overrides import leaves, to_dict

_EXAMPLES = """\
A run is a folder: config, logs, tokenizer and checkpoints. The usual order of things:

  python -m moe_jax configs                                   what can be trained
  python -m moe_jax tokenizer CONFIG                          learn the tokenizer that CONFIG names
  python -m moe_jax train CONFIG --run runs/a steps=200       train; again to resume after a kill
  python -m moe_jax inspect runs/a                            what is in its last checkpoint, and is it sound
  python -m moe_jax evaluate runs/a --json eval.json          held-out nats per token, bits per byte
  python -m moe_jax generate runs/a --prompt 'def add(a, b):' let it go on with a text

CONFIG is a registered name or a .json file (a run's config.json). Every option can be overridden by its
dotted name: data.seq_len=256 model.moe.num_experts=8 quant=default data.sources.0.path='texts/*.jsonl'
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, or 2 after one sentence on standard error that the user can act on."""
    arguments = parse(_parser(), argv)
    return guarded(arguments.command, arguments)


def _parser() -> argparse.ArgumentParser:
    parser, commands = make_parser("python -m moe_jax", "Train MobileMoE in JAX.", _EXAMPLES)

    def add(name: str, command: Callable, text: str, example: str, config: bool) -> Any:
        wanted = "registered name or .json file" if config else ""
        return add_command(commands, name, command, text, example, config=wanted)

    sub = add("configs", _configs, "list the registered configs, or all options of one", "demo_sft", False)
    sub.add_argument("name", nargs="?", help="whose options to list, with their values")
    add_overrides(sub)

    sub = add(
        "train",
        _train,
        "train a config in a run folder, going on from its last checkpoint; several configs joined "
        "by commas are stages, each in DIR/<stage>, from the last parameters of the one before",
        "demo_pretrain --run runs/a steps=200 optimizer.learning_rate=1e-3",
        True,
    )
    sub.add_argument("--run", required=True, metavar="DIR", help="the run folder, local or gs://")
    sub.add_argument("--new-data", action="store_true", help="go on although data.sources changed")

    sub = add("params", _params, "count parameters and training FLOPs", "mobilemoe_s --json p.json", True)
    add_json(sub)

    sub = add(
        "evaluate",
        _evaluate,
        "measure a run on its held-out data; texts against gzip -9 and xz -9 on the same bytes",
        "runs/a --json eval.json",
        False,
    )
    sub.add_argument("run", help="run folder")
    add_overrides(sub)
    add_json(sub)

    sub = add(
        "inspect",
        _inspect,
        "check a checkpoint's files and list its arrays, marks and config",
        "runs/a/checkpoints/200 --json c.json",
        False,
    )
    sub.add_argument("path", help="checkpoint, or run folder, whose last one is meant; local or gs://")
    add_json(sub)

    sub = add(
        "generate",
        _generate,
        "let a run go on with a text or answer in the chat format",
        "runs/a --prompt 'What does os.getcwd do?' --chat --max-tokens 64",
        False,
    )
    sub.add_argument("run", help="run folder")
    sub.add_argument("--prompt", type=prompt, required=True, help="text to go on from, or the question")
    sub.add_argument("--chat", action="store_true", help="put the prompt in the chat format")
    sub.add_argument("--max-tokens", type=at_least(1), default=64, help="of the answer (default: 64)")
    sub.add_argument("--temperature", type=at_least(0, float), default=0.0, help="0 takes the likeliest token")
    sub.add_argument("--top-p", type=top_p, default=1.0, help="draw among the likeliest with this share in all")
    sub.add_argument("--seed", type=seed, default=0, help="of the draws")

    sub = add(
        "tokenizer",
        _tokenizer,
        "learn a byte-level BPE tokenizer of model.vocab_size entries from data.sources",
        "demo_pretrain data.tokenizer=runs/tokenizer.json",
        True,
    )
    sub.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")

    add(
        "tokenize",
        _tokenize,
        "put the tokens of data.sources and data.heldout into data.cache_dir, local or gs://, ahead of the runs "
        "that use them, on a machine without TPUs, say; of several configs, joined by commas, as train takes them",
        "mobilemoe_s data.cache_dir=gs://b/tokens data.sources.0.path='gs://b/data/*.jsonl'",
        True,
    )

    sub = add(
        "batch",
        _batch,
        "show one packed row of a batch as text, with what the loss counts",
        "demo_sft --batch 3 --row 0",
        True,
    )
    sub.add_argument("--batch", type=at_least(0), default=0, help="its number from 0 (default: 0)")
    sub.add_argument("--row", type=at_least(0), default=0, help="of the batch, from 0 (default: 0)")
    return parser


def _configs(arguments: Any) -> None:
    if arguments.name:
        for option, value in leaves(to_dict(configs.load(arguments.name, arguments.overrides))).items():
            print(f"{option}={'none' if value is None else value}")
        return
    for name in configs.registered():
        print(f"{name:24} {configs.summary(name)}")


def _train(arguments: Any) -> int:
    runs = [configs.load(name, arguments.overrides) for name in arguments.config.split(",")]
    # A resumed run finds its programs compiled.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(location(arguments.run) / ".compiled"))
    from moe_jax.parallel import processes
    from moe_jax.train.stages import run_stages
    from moe_jax.train.trainer import fit

    def train(_: Any) -> None:
        if len(runs) > 1:
            run_stages(runs, arguments.run, new_data=arguments.new_data)
        else:
            fit(runs[0], arguments.run, new_data=arguments.new_data)

    processes.start()
    return processes.end_with(lambda: guarded(train, arguments))


def _params(arguments: Any) -> None:
    from moe_jax.flops import count_parameters, train_flops_per_token

    cfg = configs.load(arguments.config, arguments.overrides)
    count = count_parameters(cfg.model)
    flops = train_flops_per_token(cfg.model, cfg.data.seq_len)
    result = {"active": count.active, "total": count.total, "train_flops_per_token": flops}
    print(f"{count.active:,} active and {count.total:,} total parameters")
    print(f"{flops:.4g} training FLOPs per token at sequence length {cfg.data.seq_len}")
    _write(arguments, result)


def _evaluate(arguments: Any) -> None:
    from moe_jax.train.evaluate import evaluate

    result = evaluate(arguments.run, arguments.overrides)
    for name, value in result.items():
        print(f"{name:28} {value:,.4f}" if isinstance(value, float) else f"{name:28} {value:,}")
    _write(arguments, result)


def _inspect(arguments: Any) -> None:
    from moe_jax.train.inspect import inspect, render

    found = inspect(arguments.path)
    print(render(found))
    _write(arguments, found)


def _generate(arguments: Any) -> None:
    from moe_jax.data.chat import render_ids
    from moe_jax.data.tokenizer import Tokenizer
    from moe_jax.generate import Generator
    from moe_jax.train.checkpoint import load_parameters

    cfg, parameters = load_parameters(arguments.run)
    tokenizer = Tokenizer.load(location(arguments.run) / "tokenizer.json")
    if arguments.chat:
        messages = [{"role": "user", "content": arguments.prompt}]
        ids = render_ids(messages, tokenizer, generation_prompt=True)[0].tolist()
    else:
        ids = [tokenizer.bos, *tokenizer.encode(arguments.prompt)]
    stops = (tokenizer.end, tokenizer.eot)
    ids = Generator(cfg.model, parameters, cfg.quant).generate(
        ids,
        arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        stop_ids=stops,
    )
    print(tokenizer.decode(ids[:-1] if ids[-1] in stops else ids))


def _tokenizer(arguments: Any) -> None:
    from moe_jax.data.commands import build_tokenizer

    cfg = configs.load(arguments.config, arguments.overrides)
    data, size = cfg.data, cfg.model.vocab_size
    build_tokenizer(data.sources, size, data.tokenizer, data.max_bytes, arguments.overwrite)
    print(f"{size} entries in {data.tokenizer}")


def _tokenize(arguments: Any) -> None:
    from moe_jax.data.commands import tokenize
    from moe_jax.data.tokenizer import Tokenizer

    stages = []
    for name in arguments.config.split(","):
        cfg = configs.load(name, arguments.overrides)
        tokenizer = Tokenizer.load(cfg.data.tokenizer)
        tokenizer.require(cfg.model.vocab_size)
        stages.append((cfg.data, tokenizer))
    for line in tokenize(stages):
        print(line, flush=True)


def _batch(arguments: Any) -> None:
    from moe_jax.data.commands import inspect_batch
    from moe_jax.data.tokenizer import Tokenizer

    cfg = configs.load(arguments.config, arguments.overrides)
    tokenizer = Tokenizer.load(cfg.data.tokenizer)
    if arguments.row >= cfg.data.global_batch_size:
        raise UserError(f"--row must lie below data.global_batch_size {cfg.data.global_batch_size}")
    color = sys.stdout.isatty()
    print(inspect_batch(cfg.data, tokenizer, arguments.batch, arguments.row, color))


def _write(arguments: Any, result: dict[str, Any]) -> None:
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    heed_interrupts()
    leave(main())
