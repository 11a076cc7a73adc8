#!/usr/bin/python3
"""Run cases in the environment that `run` made. Both places use this program."""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.dont_write_bytecode = True

from lib import case  # noqa: E402
from lib.world import World  # noqa: E402

# The files of cases, in the order in which they run: the quickest and most telling first.
FILES = {
    "nested": [
        "passthrough",
        "hook",
        "speeds",
        "doors",
        "live",
        "replug",
        "hung",
        "container",
        "aside",
        "saved",
        "crash",
        "migration",
        "api",
        "package",
    ],
    "machine": ["gate", "endings", "redirection", "upkeep"],
}


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("place", choices=FILES)
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--chaos", type=int, default=600)
    parser.add_argument("--part", default="1/1")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--repo", default=str(Path(__file__).parents[2]))
    return parser.parse_args()


def say(text):
    print(text, flush=True)


def main():
    asked = arguments()
    folder = Path(__file__).parent / asked.place / "cases"
    # Figures are not tests and chaos has no fixed duration. Both run only on request.
    more = [file for file in ("figures", "chaos") if any(file in name for name in asked.case)]
    files = [f for f in FILES[asked.place] + more if (folder / f"{f}.py").exists()]
    cases = case.matching(case.collect(f"{asked.place}.cases", files), asked.case)
    if not cases:
        say(f"no case has {' or '.join(asked.case)} in its name: see --list")
        return 1
    part, parts = map(int, asked.part.split("/"))
    cases = cases[part - 1 :: parts]
    if asked.list:
        for one in cases:
            say(f"{one.name:44} {one.title}")
        return 0
    cases *= asked.repeat
    world = World(asked.repo, asked.seed, asked.kills, drawer(asked.place), asked.chaos)
    world.set_up()
    return 0 if case.run_all(cases, world, say) else 1


def drawer(place):
    if place == "machine":
        return None
    from lib.gadgets import Drawer

    return Drawer()


status = main()
sys.stdout.flush()
# Exit at once: Python would wait for the thread of a call that libvirt never answers.
os._exit(status)
