"""One layer's experts against a dense feed-forward: `python -m conversion bench-layer`, among the benchmarks."""

from __future__ import annotations

import sys

from conversion.bench_commands import add_bench_layer
from moe_jax.command_line import guarded, make_parser, parse


def main() -> int:
    parser, commands = make_parser("python -m conversion", str(__doc__), "")
    add_bench_layer(commands)
    arguments = parse(parser, ["bench-layer", *sys.argv[1:]])
    return guarded(arguments.command, arguments)


if __name__ == "__main__":
    sys.exit(main())
