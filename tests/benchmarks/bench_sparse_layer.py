"""One layer's experts against a dense feed-forward: `python -m conversion bench-layer`, among the benchmarks."""

from __future__ import annotations

import sys

from conversion.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench-layer", *sys.argv[1:]]))
