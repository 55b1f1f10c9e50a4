"""`python -m demo [--once] [--json]`, the same as `saga demo`."""

from __future__ import annotations

import argparse
import sys

from demo.run import main

parser = argparse.ArgumentParser(prog="python -m demo", description="Three orders against three sample services.")
parser.add_argument(
    "--once", action="store_true", help="exit when the orders have ended, 1 if one did not as it should"
)
parser.add_argument("--json", action="store_true", help="with --once: print what happened as JSON")
options = parser.parse_args()
sys.exit(main(once=options.once, as_json=options.json))
