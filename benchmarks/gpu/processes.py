"""Processes with time limits: whatever happens in one, this one goes on."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

START = 150.0  # seconds until a process has imported everything and found its card


class CardGone(Exception):
    """Two processes in a row found no card that answers."""


_live: set[subprocess.Popen[Any]] = set()


def started(words: list[str], **options: Any) -> subprocess.Popen[Any]:
    """A process in a group of its own."""
    process = subprocess.Popen(words, start_new_session=True, **options)
    _live.add(process)
    return process


def end_all() -> None:
    for process in list(_live):
        end_group(process)


def end_group(process: subprocess.Popen[Any]) -> None:
    """The process and what it started. One that can't be killed is left behind."""
    _live.discard(process)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


class Lines:
    """A process whose standard output is read line by line, with a time limit."""

    def __init__(self, command: list[str], env: dict[str, str], log: Path) -> None:
        with log.open("a") as errors:
            self.process = started(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            )
        self.lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):
            for line in self.process.stdout:
                self.lines.put(line)
        self.lines.put(None)

    def send(self, value: Any) -> None:
        """What was sent to a process that has ended is found out by `receive`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(value) + "\n")
            self.process.stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next line; {"status": "hung" or "died"} where none comes in time, or at all."""
        try:
            line = self.lines.get(timeout=max(seconds, 0))
        except queue.Empty:
            return {"status": "hung", "why": f"no answer in {seconds:.0f} s"}
        if line is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            return {"status": "died", "why": f"exit status {self.process.returncode}"}
        return json.loads(line)

    def kill(self) -> None:
        end_group(self.process)


class Asked:
    """A worker (worker.py) that is started again whenever it has come to an end."""

    def __init__(self, options: dict[str, Any], env: dict[str, str], log: Path) -> None:
        self.command = [sys.executable, "-m", "gpu.worker", json.dumps(options)]
        self.env, self.log = env, log
        self.lines: Lines | None = None
        self.hello: dict[str, Any] | None = None
        self.in_vain = 0

    def start(self) -> None:
        """Without waiting for it."""
        if self.lines is None:
            self.lines, self.hello = Lines(self.command, self.env, self.log), None

    def greet(self, seconds: float) -> dict[str, Any]:
        """What it says of the card. Raises CardGone where it can't start, twice."""
        while True:
            self.start()
            assert self.lines is not None
            if self.hello is None:
                hello = self.lines.receive(min(START, seconds))
                if "status" in hello:
                    self.close()
                    self.in_vain += 1
                    if self.in_vain > 1 or seconds < START:
                        raise CardGone(f"a process can't start: {hello['why']}, see {self.log}")
                    continue
                self.hello, self.in_vain = hello, 0
            return self.hello

    def ask(self, item: dict[str, Any], limit: float, left: float) -> dict[str, Any]:
        """Its answer. limit: seconds for the item; left: of the step, and if that is less, an
        item that isn't done is "interrupted", which says nothing against it."""
        self.greet(left)
        assert self.lines is not None
        self.lines.send(item)
        answer = self.lines.receive(min(limit, left))
        if answer["status"] in ("hung", "died") or not answer.get("fit", True):
            self.close()
        if answer["status"] == "hung" and left < limit:
            answer = {"status": "interrupted", "why": "out of time"}
        return answer

    def close(self) -> None:
        if self.lines is not None:
            self.lines.kill()
            self.lines = None
