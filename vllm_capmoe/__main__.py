"""The command `vllm-capmoe`, also `python -m vllm_capmoe`: one function for each of its words."""

import argparse
import sys
from collections.abc import Callable

from vllm_capmoe.control import cli as control
from vllm_capmoe.planner import cli as planner


def main(words: list[str] | None = None) -> int:
    """The entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vllm-capmoe", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="is a capacity limit worth it for a model and its prompts?",
        epilog="All other arguments go to vLLM's engine, as for vllm serve.",
    )
    planner.add_arguments(plan)
    watch = commands.add_parser(
        "watch", allow_abbrev=False, help="draw the loads of a running server, layer by layer"
    )
    control.add_watch_arguments(watch)
    change = commands.add_parser(
        "set", allow_abbrev=False, help="change settings of a running server, or turn them off"
    )
    control.add_set_arguments(change)
    arguments, others = parser.parse_known_args(words)
    if others and arguments.command != "plan":
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    doing: dict[str, Callable[[], None]] = {
        "plan": lambda: print(planner.plan(arguments, others)),
        "watch": lambda: control.watch(arguments),
        "set": lambda: print(control.change(arguments)),
    }
    try:
        doing[arguments.command]()
    except ValueError as error:
        print(f"vllm-capmoe {arguments.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
