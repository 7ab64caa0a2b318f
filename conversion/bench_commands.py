"""The commands that measure, predict and talk; what they need is imported when one runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from conversion.command_options import add_threads, lengths, options, say
from moe_jax.command_line import add_command, add_json, at_least, prompt, seed, top_p
from moe_jax.config import ModelConfig, RunConfig
from moe_jax.errors import UserError
from moe_jax.overrides import from_dict


def add_commands(commands: Any, load: Callable[[str], RunConfig]) -> None:
    """Add all of them; `load` finds a registered config."""
    _add_bench(commands)
    _add_bench_layer(commands)
    sub = add_command(
        commands,
        "roofline",
        partial(_roofline, load=load),
        "predict a phone's speed from bytes and products of a token, checked against published measurements",
        'model.litertlm --phone "Galaxy S25"',
        'mobilemoe_l --phone "Pixel 9"',
    )
    sub.add_argument("file", help="a bundle, a run folder or a registered config")
    sub.add_argument("--phone", default="Galaxy S25", help="default: Galaxy S25; an unknown one lists those known")
    add_json(sub)
    _add_chat(commands)


def _add_bench(commands: Any) -> None:
    sub = add_command(
        commands,
        "bench",
        _bench,
        "measure speed, memory and load time in the stock engine on real text, each figure a median",
        "model.litertlm --against dense.litertlm --json speed.json",
        "model.litertlm --llama-cpp model.gguf --contexts 256,1024",
        "model.litertlm --profile profile.svg",
    )
    sub.add_argument("bundle")
    sub.add_argument("--against", "--dense", metavar="BUNDLE", help="another one, to compare with")
    sub.add_argument(
        "--llama-cpp",
        metavar="GGUF",
        nargs="?",
        const="",
        help="the same model in llama.cpp, if its package is installed (default: the bundle's name with .gguf)",
    )
    sub.add_argument("--prefill", type=lengths, default=(), help="tokens of prompts (default 128,512,1024)")
    sub.add_argument("--contexts", type=lengths, default=(), help="where to write (default 256,1024,4096,8192)")
    sub.add_argument(
        "--decode", type=at_least(1), default=0, help="tokens of an answer (default 128, or half a context)"
    )
    sub.add_argument("--texts", type=at_least(1), default=3, help="pieces of text, each a round of all models")
    sub.add_argument("--text", default="stdlib:heldout", help="path, glob or part of the corpus")
    add_threads(sub, "most threads; every number up to it is measured")
    _add_cache(sub)
    sub.add_argument(
        "--profile",
        metavar="SVG",
        help="instead: where the time goes by op and layer at --threads and the first of --contexts, drawn",
    )
    add_json(sub)


def _add_bench_layer(commands: Any) -> None:
    sub = add_command(
        commands,
        "bench-layer",
        _bench_layer,
        "measure one layer's routed experts against one dense feed-forward of the active size",
        "--json layer.json",
        "--experts kernel --tokens 1,128",
    )
    sub.add_argument("--experts", choices=("sparse", "kernel"), default="sparse", help="stock ops or the custom op")
    sub.add_argument("--tokens", type=lengths, default=(1, 128, 1024), help="default 1,128,1024")
    add_threads(sub, "most threads; every number up to it is measured")
    for name, default in {"d-model": 768, "expert-width": 384, "num-experts": 60, "num-experts-per-tok": 4}.items():
        sub.add_argument(f"--{name}", type=at_least(1), default=default, help=f"default {default}")
    sub.add_argument(
        "--seconds", type=at_least(0, float), default=0.5, help="of each form with each number of threads"
    )
    add_json(sub)


def _add_chat(commands: Any) -> None:
    sub = add_command(
        commands,
        "chat",
        _chat,
        "talk to a bundle: one answer with --prompt, else a conversation until the end of input",
        "model.litertlm --prompt 'What does os.getcwd do?'",
        "model.litertlm --show-experts",
    )
    sub.add_argument("bundle")
    sub.add_argument("--prompt", type=prompt, help="one question")
    sub.add_argument("--max-tokens", type=at_least(1), default=256, help="of each reply")
    sub.add_argument("--temperature", type=at_least(0, float), default=0.0, help="0 takes the likeliest token")
    sub.add_argument("--top-p", type=top_p, default=1.0)
    sub.add_argument("--seed", type=seed, default=0)
    add_threads(sub)
    _add_cache(sub, "; from there a bundle loads in about half the time")
    sub.add_argument(
        "--show-experts",
        action="store_true",
        help="draw which experts each token of an answer used; runs the answer once more, token by token",
    )


def _add_cache(sub: Any, gain: str = "") -> None:
    sub.add_argument(
        "--cache", metavar="DIR", help=f"where the engine keeps packed weights (default: temporary){gain}"
    )


def _bench(arguments: Any) -> dict[str, Any]:
    if arguments.profile:
        from conversion import bench_profile

        context = {"context": arguments.contexts[0]} if arguments.contexts else {}
        result = bench_profile.profile(
            arguments.bundle, threads=arguments.threads, text=arguments.text, say=say, **context
        )
        bench_profile.draw(result, arguments.profile)
        print(bench_profile.table(result))
        return result
    from conversion import bench

    if arguments.llama_cpp == "":
        arguments.llama_cpp = Path(arguments.bundle).with_suffix(".gguf")
    result = bench.bench(**options(arguments, "profile"), say=say)
    print(bench.table(result))
    return result


def _bench_layer(arguments: Any) -> dict[str, Any]:
    from conversion import bench_layer

    names = "d_model", "expert_width", "num_experts", "num_experts_per_tok"
    given, shape = options(arguments, *names), tuple(getattr(arguments, name) for name in names)
    result = bench_layer.bench_layer(**given, shape=shape, say=say)
    print(bench_layer.table(result))
    return result


def _roofline(arguments: Any, load: Callable[[str], RunConfig]) -> dict[str, Any]:
    from conversion import roofline

    def model(name: str) -> ModelConfig:
        path = Path(name, "config.json")
        if not path.exists():
            return load(name).model
        try:
            return from_dict(RunConfig, json.loads(path.read_text())).model
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({error}); name another run") from None

    result = roofline.roofline(arguments.file, arguments.phone, model)
    print(roofline.table(result))
    return result


def _chat(arguments: Any) -> None:
    from conversion.chat import chat

    prompts = None if arguments.prompt is None else [arguments.prompt]
    chat(prompts=prompts, **options(arguments, "prompt"))
