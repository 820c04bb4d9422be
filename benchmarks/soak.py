"""A server under load for as long as asked: clients, odd requests, live changes, and a count.

    python benchmarks/soak.py --minutes 10
    python benchmarks/soak.py --minutes 10 --kill          # at the end its worker dies

A real `vllm serve` of the example model with Token Drop and live control; 64 clients with texts of
all lengths, streaming or not, chats, several answers at once, streams that are left in the middle,
and requests that a server must refuse; meanwhile the factor changes, and capacity goes off and on,
every few seconds. Before and after, a calm time: one request at a time, whose tokens the counters
must have, exactly, and whose prompt no expert may hold more of than its limit.

Written: what every kind of request came to, how long answers and changes took, memory, counters;
and a line for each thing that must hold. Exit status 1 where one doesn't. CPU figures are of this
machine; they say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import _tables

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

LAYERS, EXPERTS, TOP_K = 4, 8, 2  # of the example model
STARTED = 1.5
WORDS = ("the", "experts", "of", "a", "layer", "wait", "for", "their", "busiest", "one", "while")
VALID = ("completion", "chat", "stream", "several")
# What a server must answer to the others, by HTTP status.
REFUSED = {
    "no such model": (404,),
    "negative length": (400, 422),
    "too long": (400,),
    "no JSON": (400, 422),
    "bad change": (400,),
    "wrong key": (401,),
}
KEY = "soak"
TIMEOUT = 120.0  # seconds after which an answer counts as none


class Soak:
    """One run against a server, and what it has seen.

    outcomes: how many requests of a kind came to what: "answer", "left" (by the client), "short",
        a status, or an error. waited: seconds of the answers. changes: seconds of each change.
    """

    def __init__(self, url: str, clients: int, seed: int):
        import openai

        self.url, self.clients, self.random = url, clients, random.Random(seed)
        self.openai: Any = openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT
        )
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.waited: list[float] = []
        self.changes: list[float] = []
        self.model = ""
        self.tokens = 0

    async def post(self, path: str, content: str | None, key: str = KEY) -> tuple[int, Any]:
        """POST of some content, or GET without any: the status and the answer."""

        def call() -> tuple[int, Any]:
            data = None if content is None else content.encode()
            headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
            request = urllib.request.Request(self.url + path, data, headers)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
                    return answer.status, json.load(answer)
            except urllib.error.HTTPError as error:
                return error.code, error.read()

        return await asyncio.to_thread(call)

    async def control(self, values: Any = None, key: str = KEY) -> tuple[int, Any]:
        """The route of live control."""
        content = None if values is None else json.dumps(values)
        return await self.post("/v1/moe-capacity", content, key)

    async def counted(self) -> dict[str, int]:
        """Sums over the layers since the server's start."""
        status, answer = await self.control()
        assert status == 200, answer
        layers = answer["since_start"]["layers"]
        return {
            "before": sum(sum(layer["load_before"]) for layer in layers),
            "after": sum(sum(layer["load_after"]) for layer in layers),
            "dropped": sum(layer["dropped_assignments"] for layer in layers),
            "expanded": sum(layer["expanded_assignments"] for layer in layers),
            "peak_before": sum(layer["peak_load_before"] for layer in layers),
            "peak_after": sum(layer["peak_load_after"] for layer in layers),
        }

    async def calm(self, requests: int) -> dict[str, Any]:
        """One request at a time: what the counters must have gained, and what they have."""
        status, answer = await self.control({"mode": "on", "factor": STARTED})
        assert status == 200, answer
        before, tokens, most = await self.counted(), 0, 0
        for _ in range(requests):
            answer = await self.openai.completions.create(
                model=self.model,
                prompt=self.text(self.random.randrange(8, 120)),
                max_tokens=5,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            prompt, out = answer.usage.prompt_tokens, answer.usage.completion_tokens
            tokens += prompt + out - 1  # the last token is not computed
            most += max(4, math.ceil(STARTED * prompt * TOP_K / EXPERTS)) + out - 1
        gained = {key: value - before[key] for key, value in (await self.counted()).items()}
        return {"tokens": tokens, "most_peak": most * LAYERS, "gained": gained}

    def text(self, words: int) -> str:
        return " ".join(self.random.choices(WORDS, k=words))

    async def ask(self, kind: str) -> None:
        """One request of a kind."""
        began = time.monotonic()
        try:
            outcome = await getattr(self, "_" + kind.replace(" ", "_"), self._refused)(kind)
        except Exception as error:
            outcome = f"{type(error).__name__} {getattr(error, 'status_code', '')}".strip()
        if outcome == "answer":
            self.waited.append(time.monotonic() - began)
        self.outcomes[f"{kind}: {outcome}"] += 1

    def _settings(self) -> dict[str, Any]:
        out = self.random.choice([1, 4, 16, 48])
        extra = {"ignore_eos": True}
        return {"model": self.model, "max_tokens": out, "extra_body": extra, "temperature": 0.7}

    async def _completion(self, kind: str) -> str:
        settings = self._settings()
        answer = await self.openai.completions.create(
            prompt=self.text(self.random.choice([1, 5, 40, 160])), **settings
        )
        return self._whole(answer.usage.completion_tokens, settings["max_tokens"])

    async def _chat(self, kind: str) -> str:
        settings = self._settings()
        messages: Any = [{"role": "user", "content": self.text(self.random.choice([1, 30]))}]
        answer = await self.openai.chat.completions.create(messages=messages, **settings)
        return self._whole(answer.usage.completion_tokens, settings["max_tokens"])

    async def _several(self, kind: str) -> str:
        settings = self._settings()
        answer = await self.openai.completions.create(prompt=self.text(20), n=3, **settings)
        return self._whole(answer.usage.completion_tokens, 3 * settings["max_tokens"])

    async def _stream(self, kind: str) -> str:
        settings, came = self._settings(), 0
        stream = await self.openai.completions.create(
            prompt=self.text(40), stream=True, stream_options={"include_usage": True}, **settings
        )
        async for part in stream:
            came = part.usage.completion_tokens if part.usage else came
        return self._whole(came, settings["max_tokens"])

    async def _abort(self, kind: str) -> str:
        settings = self._settings() | {"max_tokens": 200}
        stream = await self.openai.completions.create(prompt=self.text(60), stream=True, **settings)
        seen = 0
        async for _ in stream:
            seen += 1
            if seen == 3:
                break
        await stream.close()
        return "left"

    async def _refused(self, kind: str) -> str:
        """What must be refused: the status that came."""
        body: Any = {"model": self.model, "prompt": "a", "max_tokens": 4}
        if kind == "bad change":
            bad = self.random.choice([{"factor": 0}, {"mode": "no"}, {"level": "device"}, [], {}])
            return str((await self.control(bad))[0])
        if kind == "wrong key":
            return str((await self.control({"mode": "off"}, key="a guess"))[0])
        if kind == "no such model":
            body["model"] = "none"
        elif kind == "negative length":
            body["max_tokens"] = -4
        elif kind == "too long":
            body["prompt"] = self.text(3000)
        content = "{" if kind == "no JSON" else json.dumps(body)
        return str((await self.post("/v1/completions", content))[0])

    def _whole(self, came: int, asked: int) -> str:
        self.tokens += came
        return "answer" if came == asked else "short"

    async def storm(self, seconds: float) -> None:
        """All clients at once, and changes in the middle."""
        end = time.monotonic() + seconds
        kinds = [*VALID * 6, *["abort"] * 4, *REFUSED]

        async def client() -> None:
            while time.monotonic() < end:
                await self.ask(self.random.choice(kinds))

        async def governor() -> None:
            while time.monotonic() < end - 1:
                await asyncio.sleep(min(3.0, seconds / 10))
                values = self.random.choice(
                    [{"mode": "off"}, {"mode": "on"}, {"factor": 0.5}, {"factor": 2.0}]
                )
                began = time.monotonic()
                status, _ = await self.control(values)
                self.outcomes[f"change: {status}"] += 1
                self.changes.append(time.monotonic() - began)

        await asyncio.gather(governor(), *(client() for _ in range(self.clients)))

    async def until_the_end(self, kill: Any) -> dict[str, int]:
        """All clients ask once more, and the worker dies: what each came to."""
        self.outcomes.clear()
        asked = [asyncio.create_task(self.ask(self.random.choice(VALID))) for _ in range(64)]
        await asyncio.sleep(0.5)
        kill()
        await asyncio.wait(asked, timeout=TIMEOUT)
        hung = sum(not each.done() for each in asked)
        for each in asked:
            each.cancel()
        return {"hung": hung, "ended": sum(self.outcomes.values())}


def judge(report: dict[str, Any]) -> list[tuple[bool, str]]:
    """What must hold of a run: whether it does, and the sentence."""
    lines = []

    def must(holds: bool, sentence: str) -> None:
        lines.append((holds, sentence))

    for kind, outcomes in report["outcomes"].items():
        if kind in VALID:
            fine = {"answer"}
        elif kind == "abort":
            fine = {"left"}
        elif kind == "change":
            fine = {"200"}
        else:
            fine = {str(status) for status in REFUSED[kind]}
        odd = {what: count for what, count in outcomes.items() if what not in fine}
        total = sum(outcomes.values())
        must(not odd, f"{kind}: {total} requests ended as they must{f', but {odd}' if odd else ''}")
    for name in ("calm before", "calm after"):
        calm, gained = report[name], report[name]["gained"]
        tokens, want = calm["tokens"], calm["tokens"] * TOP_K * LAYERS
        must(gained["before"] == want, f"{name}: {gained['before']} assignments of {tokens} tokens")
        lost = gained["before"] - gained["after"] + gained["expanded"]
        must(gained["dropped"] == lost > 0, f"{name}: {gained['dropped']} of them dropped")
        must(
            gained["peak_after"] <= calm["most_peak"] < gained["peak_before"],
            f"{name}: loads within the limits ({gained['peak_before']} -> {gained['peak_after']}, "
            f"at most {calm['most_peak']})",
        )
    grown = report["memory"]["end"] / report["memory"]["begin"] - 1
    must(grown < 0.05, f"memory: {grown:+.1%} from the first to the last part of the storm")
    if "killed" in report:
        hung = report["killed"]["hung"]
        must(not hung, f"killed: {report['killed']['ended']} requests ended, {hung} did not")
        must(report["killed"]["left"] == 0, f"killed: {report['killed']['left']} processes left")
    return lines


def group_of(leader: int) -> list[Any]:
    """The living processes of a process group."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


async def sample_memory(leader: int, seconds: float) -> list[float]:
    """MiB of the server's processes, some forty times in so many seconds."""
    samples = []
    for _ in range(40):
        await asyncio.sleep(seconds / 40)
        total = 0
        for process in group_of(leader):
            with suppress(Exception):
                total += process.memory_info().rss
        samples.append(total / 2**20)
    return samples


def kill_worker(leader: int) -> None:
    """End the process that computes, as a failing device would: of one GPU, the engine core."""
    by_name = {
        part: [process for process in group_of(leader) if part in " ".join(process.cmdline())]
        for part in ("Worker", "EngineCore")
    }
    for process in by_name["Worker"] or by_name["EngineCore"]:
        process.send_signal(signal.SIGKILL)


async def run(args: argparse.Namespace, url: str, leader: int) -> dict[str, Any]:
    soak = Soak(url, args.clients, args.seed)
    soak.model = (await soak.openai.models.list()).data[0].id
    report: dict[str, Any] = {"calm before": await soak.calm(12)}
    seconds = args.minutes * 60
    _, samples = await asyncio.gather(soak.storm(seconds), sample_memory(leader, seconds))
    by_kind: dict[str, dict[str, int]] = {}
    for name, count in sorted(soak.outcomes.items()):
        kind, _, outcome = name.partition(": ")
        by_kind.setdefault(kind, {})[outcome] = count
    report["outcomes"] = by_kind
    waited, changes = sorted(soak.waited), sorted(soak.changes)
    report["seconds"] = {
        "storm": seconds,
        "answer_median": statistics.median(waited),
        "answer_99": waited[int(0.99 * (len(waited) - 1))],
        "change_median": statistics.median(changes),
        "change_max": changes[-1],
    }
    report["output_tokens_per_second"] = soak.tokens / seconds
    fifth = len(samples) // 5  # the first one fills caches
    report["memory"] = {
        "begin": statistics.mean(samples[fifth : 2 * fifth]),
        "end": statistics.mean(samples[-fifth:]),
    }
    report["calm after"] = await soak.calm(12)
    if args.kill:
        report["killed"] = await soak.until_the_end(lambda: kill_worker(leader))
    await soak.openai.close()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill", action="store_true", help="end the worker's process at the end")
    parser.add_argument("--out", type=Path, help="JSON; default in benchmarks/results, by date")
    args = parser.parse_args()
    out = args.out or _tables.output_folder() / f"{_tables.today()}-soak-cpu.json"

    from make_mixtral import make_checkpoint

    with tempfile.TemporaryDirectory(prefix="capmoe-soak-") as folder:
        model = make_checkpoint(Path(folder) / "model")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = Path(folder) / "server.log"
        words = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
        words += ["--max-model-len", "512", "--max-num-seqs", "64", "--api-key", KEY]
        words += ["--moe-capacity-mode", "drop", "--moe-capacity-factor", str(STARTED)]
        words += ["--no-enable-prefix-caching"]  # a cached token isn't counted
        environment = {"VLLM_PLUGINS": "capmoe,capmoe_control", "HF_HUB_OFFLINE": "1"}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with log.open("wb") as sink:
            server = subprocess.Popen(
                [str(Path(sys.executable).with_name("vllm")), *words],
                env={**os.environ, **environment},
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for(server, port, log)
            report = asyncio.run(run(args, f"http://127.0.0.1:{port}", server.pid))
            if not args.kill:
                server.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                server.wait(60)
            if args.kill:
                report["killed"]["left"] = len(group_of(server.pid))
        except Exception:
            print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
    said = judge(report)
    head = _tables.header(None, [f"{args.clients} clients, seed {args.seed}"])
    verdict = [f"{'PASS' if holds else 'FAIL'} {sentence}" for holds, sentence in said]
    report = {"made": head, "verdict": verdict} | report
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(verdict))
    print(json.dumps(report["seconds"]), f"\n{out}")
    return 0 if all(holds for holds, _ in said) else 1


def wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Until the server answers.

    Raises:
        RuntimeError: it ended, or says nothing for ten minutes.
    """
    end = time.monotonic() + 600
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            return
        time.sleep(0.5)
    raise RuntimeError(f"no server: {log.read_text(errors='replace')[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
