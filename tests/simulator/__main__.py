"""Run seeds, or replay one: `python -m tests.simulator 0 100000` or `--trace 4711`."""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback

from tests.simulator.world import Violation, World


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulator", description=__doc__)
    parser.add_argument("first", type=int, help="the first seed, or the one to replay")
    parser.add_argument("count", type=int, nargs="?", default=1, help="how many seeds")
    parser.add_argument("--trace", action="store_true", help="print each event")
    parser.add_argument("--harsh", action="store_true", help="one model, and more that goes wrong")
    parser.add_argument("--stop", type=int, default=1, help="after so many failures")
    options = parser.parse_args()
    began, steps, served, failures = time.perf_counter(), 0, 0, 0
    gc.freeze()
    for seed in range(options.first, options.first + options.count):
        world = World(seed, trace=options.trace, harsh=options.harsh)
        try:
            world.run()
        except Violation as violation:
            failures += 1
            print(violation)
            if violation.__cause__ is not None:
                traceback.print_exception(violation.__cause__)
            if failures >= options.stop:
                break
        steps += world.steps
        served += world.served
    took = time.perf_counter() - began
    print(
        f"{options.count} seeds, {steps} steps, {served} answers, {failures} failures, {took:.1f} s"
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
