"""`vllm-capmoe watch` and `vllm-capmoe set`: from arguments to what is printed."""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from vllm_capmoe.config import OPTIONS
from vllm_capmoe.control import picture
from vllm_capmoe.control.client import ask
from vllm_capmoe.live import differences

_CLEAR = "\x1b[H\x1b[2J"


def _seconds(text: str) -> float:
    """Raises argparse.ArgumentTypeError unless it is a number from 0.1 to 3600."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(
            f"it is {text!r}, but a number from 0.1 to 3600 is accepted"
        )
    return value


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="of the server, as http://localhost:8000")
    parser.add_argument(
        "--api-key", default=os.environ.get("VLLM_API_KEY"),
        help="the server's (default: the environment's VLLM_API_KEY)",
    )  # fmt: skip


def add_watch_arguments(parser: argparse.ArgumentParser) -> None:
    _add_server(parser)
    parser.add_argument("--once", action="store_true", help="draw once and end")
    parser.add_argument(
        "--every", type=_seconds, default=2.0, metavar="SECONDS", help="(default: 2)"
    )
    parser.add_argument(
        "--since-start", action="store_true", help="all since the server started, not the last time"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="save the last picture as a page")


def add_set_arguments(parser: argparse.ArgumentParser) -> None:
    _add_server(parser)
    option = {option.key: option for option in OPTIONS}
    parser.add_argument(
        "mode", nargs="?", metavar="MODE",
        help="off, or on: the mode that the server was started with",
    )  # fmt: skip
    for key in ("factor", "decode_keep"):
        flag = f"--{key.replace('_', '-')}"
        parser.add_argument(flag, type=option[key].parse, help=option[key].help)
    parser.add_argument(
        "--observe", action=argparse.BooleanOptionalAction, help=option["observe"].help
    )


def change(arguments: argparse.Namespace) -> str:
    """Ask for the change, and say what changed.

    Raises:
        ValueError: nothing is asked for, or the server refuses; with one sentence.
    """
    asked = {key: getattr(arguments, key) for key in ("mode", "factor", "decode_keep", "observe")}
    values: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    if values.get("factor") == float("inf"):
        values["factor"] = "inf"
    if not values:
        raise ValueError(
            "nothing is to change, but a mode (off, on), --factor, --decode-keep or --observe is "
            "accepted."
        )
    answer = ask(arguments.url, arguments.api_key, values)
    told = differences(answer["before"], answer["now"]) or "nothing: it is so already"
    said = f"changed {told} ({answer['seconds']:.3f} s)"
    if not answer["forgotten"]:
        said += "; cached prefixes of before stay, the server's log says why"
    return said


def _save(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{file} can't be written ({error.strerror}).") from None


def watch(arguments: argparse.Namespace) -> None:
    """Draw until the user ends it.

    Raises:
        ValueError: the server can't be asked.
    """
    part = "since_start" if arguments.since_start else "window"
    try:
        while True:
            answer = ask(arguments.url, arguments.api_key)
            columns = shutil.get_terminal_size().columns
            drawn = picture.terminal(answer, part, columns)
            again = not arguments.once and sys.stdout.isatty()
            print(_CLEAR + drawn if again else drawn, flush=True)
            if arguments.html is not None:
                _save(arguments.html, picture.page(answer, arguments.url))
            if arguments.once:
                return
            time.sleep(arguments.every)
    except KeyboardInterrupt:
        return
