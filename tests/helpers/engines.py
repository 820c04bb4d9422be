"""A real `vllm serve` for tests, and the environment that vLLM needs on a machine without a GPU."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VLLM = Path(sys.executable).with_name("vllm")

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # to send a function of the tests to a worker
    "PYTHONFAULTHANDLER": "1",
    # A client that gets no core for 5 s must not send its next request into a closing connection.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600",
}


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, **ENVIRONMENT, **more}


def free_port() -> int:
    """A port that nobody has now, nor is given before a server of ours takes it.

    Below those that the kernel hands out: to whoever asks for any port, as vLLM and Ray do for
    themselves, and to every connection.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(first - 12_000, first)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


class Server:
    """A running `vllm serve`."""

    def __init__(self, url: str, log: Path, process: subprocess.Popen[bytes]):
        self.url, self.log, self.process = url, log, process

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def metrics(self) -> dict[str, float]:
        """The series of `/metrics` that are ours: "name{labels}" -> value."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=120) as answer:
            lines = answer.read().decode().splitlines()
        return {
            line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith("vllm:moe_capacity_") and not re.search(r"_created\b", line)
        }


def processes_of_group(group: int) -> list[int]:
    """The living processes of a process group (zombies aside)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def ended(group: int, code: int | str | None, log: Path) -> str:
    """The output of a program that has ended.

    Fails if its exit status isn't 0 or if it left a process behind.
    """
    deadline = time.monotonic() + 20  # what the program started may end a little after it
    while (left := processes_of_group(group)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        os.killpg(group, signal.SIGKILL)
    text = log.read_text(errors="replace")
    assert code == 0 and not left, f"ended with {code}, leaving {left}:\n{text[-6000:]}"
    return text


@contextmanager
def serve(model: Path, folder: Path, *arguments: str, **env: str) -> Iterator[Server]:
    """`vllm serve` in a process group of its own; it must be gone, wholly, after SIGINT."""
    port = free_port()
    log = folder / "server.log"
    command = [str(VLLM), "serve", str(model), "--port", str(port), "--host", "127.0.0.1"]
    command += ["--max-model-len", "512", "--max-num-seqs", "16", *arguments]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            env=environment(**env),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        deadline = time.monotonic() + 540  # below the timeout of a test
        while True:
            assert process.poll() is None, f"the server ended:\n{server.text()[-6000:]}"
            assert time.monotonic() < deadline, f"no server:\n{server.text()[-6000:]}"
            try:
                with urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
                    if answer.status == 200:
                        break
            except OSError:
                time.sleep(0.5)
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        deadline = time.monotonic() + 20  # what the server started may end a little after it
        while (left := processes_of_group(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if left:
            os.killpg(process.pid, signal.SIGKILL)
        assert not left, f"the server left processes behind: {left}"
