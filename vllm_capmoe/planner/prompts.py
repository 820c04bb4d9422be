"""The prompts' file: JSON lines, one prompt a line. Standard library only.

A line is a text, or an object with "prompt", or with "messages" as the chat API has them:

    "Once upon a time"
    {"prompt": "Once upon a time"}
    {"messages": [{"role": "user", "content": "Tell me a story."}]}

Other keys of an object are left alone, so logs of requests and data sets pass as they are.
"""

import json
from pathlib import Path
from typing import Any

Prompt = str | list[dict[str, Any]]
"""A text, or the messages of a chat."""

_ACCEPTED = 'a text, {"prompt": text} or {"messages": [{"role": …, "content": …}, …]} is accepted'


def read(path: Path, most: int | None = None) -> list[Prompt]:
    """The first `most` prompts of a file (None: all). Empty lines are skipped.

    Raises:
        ValueError: the file can't be read, has no prompts, or a line isn't one; with its number.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it isn't UTF-8 text"
        raise ValueError(f"--prompts is {str(path)!r}, which can't be read: {reason}.") from None
    prompts: list[Prompt] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if most is not None and len(prompts) >= most:
            break
        try:
            prompts.append(_prompt(json.loads(line)))
        except (ValueError, RecursionError) as error:
            problem = "isn't JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise ValueError(f"{path}, line {number}: it {problem}, but {_ACCEPTED}.") from None
    if not prompts:
        raise ValueError(
            f"--prompts is {str(path)!r}, which has no prompts: at least one is needed."
        )
    return prompts


def _prompt(value: Any) -> Prompt:
    if isinstance(value, dict):
        if "messages" in value:
            return _messages(value["messages"])
        if "prompt" not in value:
            raise ValueError(f"has the keys {', '.join(map(repr, value)) or 'of nothing'}")
        value = value["prompt"]
    if not isinstance(value, str):
        raise ValueError(f"has {_short(value)} as prompt")
    if not value:
        raise ValueError("has an empty prompt")
    return value


def _messages(value: Any) -> list[dict[str, Any]]:
    def is_message(message: Any) -> bool:
        return isinstance(message, dict) and isinstance(message.get("role"), str)

    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        raise ValueError(f"has {_short(value)} as messages")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
