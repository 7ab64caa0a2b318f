"""`python -m tests.chaos`: faults of every kind by a seed, the count of each, and whether anything was lost."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from pathlib import Path

from moe_jax.files import write_json
from tests.chaos.faults import FAULTS
from tests.chaos.run import run_chaos


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 where every promise was kept."""
    parser = argparse.ArgumentParser("python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=36, help="faults of all kinds in turn")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--only", metavar="FAULT", help="this kind alone")
    parser.add_argument("--root", type=Path, default=Path("runs/chaos"), help="made anew")
    parser.add_argument("--json", metavar="PATH", help="write what was seen here")
    arguments = parser.parse_args(argv)
    kinds = [fault for fault in FAULTS if arguments.only in (None, fault.__name__)]
    faults = [kinds[index % len(kinds)] for index in range(arguments.count)]
    random.Random(arguments.seed).shuffle(faults)
    shutil.rmtree(arguments.root, ignore_errors=True)
    found = run_chaos(
        arguments.root.resolve(), arguments.seed, faults, arguments.steps, lambda text: print(text, flush=True)
    )
    if arguments.json:
        write_json(arguments.json, found)
    width = max(map(len, found["faults"]))
    print("\n".join(f"  {kind:{width}}  {count}" for kind, count in found["faults"].items()))
    print(
        f"{sum(found['faults'].values())} faults in {found['seconds']:.0f} s, {found['restarts']} restarts, "
        f"{found['steps_replayed']} of {found['steps']} steps replayed, {found['set_aside']} damaged checkpoints "
        f"set aside, {found['checkpoints_lost']} good ones lost; losses bit-equal: {found['losses_bit_equal']}; "
        f"all {found['numbers_compared']:,} numbers of the last checkpoint bit-equal: {found['params_bit_equal']}"
    )
    kept = found["losses_bit_equal"] and found["params_bit_equal"] and not found["checkpoints_lost"]
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
