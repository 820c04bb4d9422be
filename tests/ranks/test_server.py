"""`vllm serve` with two data parallel ranks under uneven load, aborts, and a killed worker."""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import psutil
import pytest
from clusters import CLUSTER
from engines import Server, serve

pytestmark = [pytest.mark.engine, pytest.mark.cpu, pytest.mark.timing]

TEXT = "Experts that are overloaded drop the tokens that they need least. "
LAYERS, TOP_K = 4, 2  # of the example model
WATCHDOG_S = 240


@pytest.fixture(scope="module")
def living_server(
    example_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Server]]:
    arguments = "--data-parallel-size 2 --enable-expert-parallel --enforce-eager"
    arguments += " --no-enable-prefix-caching --dtype float32"
    arguments += " --moe-capacity-mode expanded --moe-capacity-factor 1.0"
    env = {**CLUSTER, "VLLM_LOG_STATS_INTERVAL": "5"}
    started: list[Server] = []
    with ExitStack() as stack:

        def living() -> Server:
            if not started or started[-1].process.poll() is not None:
                folder = tmp_path_factory.mktemp("server")
                running = serve(example_model, folder, *arguments.split(), **env)
                started.append(stack.enter_context(running))
            return started[-1]

        yield living


@pytest.fixture
def server(living_server: Callable[[], Server]) -> Server:
    """The server of the test before, or a new one where that test has ended it."""
    return living_server()


def client_of(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=120)


async def ask(
    client: openai.AsyncOpenAI,
    words: int,
    max_tokens: int,
    rank: int | None = None,
    leave_after: int | None = None,
    begun: asyncio.Event | None = None,
) -> tuple[int, int] | None:
    """One streamed completion: its prompt and completion tokens; None if we left it midway.

    Its first chunk sets `begun`.
    """
    model = (await client.models.list()).data[0].id
    header = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    stream = await client.completions.create(
        model=model,
        prompt=(TEXT * 8)[: words * 6],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
        extra_headers=header,
    )
    usage, chunks = None, 0
    async for chunk in stream:
        usage, chunks = chunk.usage or usage, chunks + 1
        if begun:
            begun.set()
        if chunks == leave_after:
            await stream.close()
            return None
    assert usage is not None and usage.completion_tokens == max_tokens
    return usage.prompt_tokens, usage.completion_tokens


def test_two_hundred_requests_of_uneven_ranks(server):
    """Rank 1 idle; rank 1 finishing early; both, with a third of the requests aborted midway."""

    async def load() -> tuple[list[tuple[int, int] | None], list[tuple[int, int] | None]]:
        async with client_of(server) as client:
            one = await asyncio.gather(
                *(ask(client, 5 + n, 3 + n % 5, rank=0) for n in range(50)),
            )
            early = await asyncio.gather(
                *(ask(client, 40 + n % 30, 30, rank=0) for n in range(25)),
                *(ask(client, 9, 2, rank=1) for n in range(25)),
            )
            settled(server, [*one, *early])
            return one + early, await asyncio.gather(
                *(
                    # A stream of 200 tokens has more than 3 chunks, however vLLM merges them.
                    ask(client, 10 + n % 50, 200, leave_after=1 + n % 9 // 3)
                    if n % 3 == 0
                    else ask(client, 10 + n % 50, 24)
                    for n in range(100)
                )
            )

    answered, mixed = asyncio.run(asyncio.wait_for(load(), WATCHDOG_S))
    assert None not in answered and len(answered) == 100
    assert mixed.count(None) == 34 and len(mixed) == 100
    text = server.text()
    assert not re.search(r"\bERROR\b|Traceback", text), text[-6000:]
    assert "candidates=local (auto)" in text and "ranks=2" in text


def settled(server: Server, answered: list[tuple[int, int] | None]) -> None:
    """Wait until `/metrics` has counted both ranks' assignments; they must be exactly these.

    Every token but the last generated one of a request passes every layer once.
    """
    tokens = sum(prompt + completion - 1 for prompt, completion in filter(None, answered))
    deadline = time.monotonic() + WATCHDOG_S
    while True:
        found = server.metrics()
        (counted,) = [
            value
            for name, value in found.items()
            if name.startswith("vllm:moe_capacity_assignments_total")
        ] or [0.0]
        if counted >= tokens * LAYERS * TOP_K or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert counted == tokens * LAYERS * TOP_K


def workers_of(server: Server) -> list[psutil.Process]:
    """The worker processes of the server, by data parallel rank."""
    found = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        match = re.search(r"Worker_DP(\d)", " ".join(process.cmdline()))
        if match:
            found[int(match[1])] = process
    return [found[rank] for rank in sorted(found)]


def test_a_killed_worker_ends_the_server_and_clients_get_errors(server):
    """`serve` checks that no process is left.

    Every client asks again and again, so that the load outlasts the kill however slow a client is:
    the server may be done with an answer long before its client has read it.
    """
    victim = workers_of(server)[1]

    async def ask_until_an_error(rank: int, begun: asyncio.Event) -> Exception:
        async with client_of(server) as client:
            try:
                while True:
                    await ask(client.with_options(max_retries=0), 40, 400, rank, begun=begun)
            except openai.APIError as error:
                return error

    async def load() -> list[Exception]:
        begun = [asyncio.Event() for _ in range(8)]
        asked = [
            asyncio.create_task(ask_until_an_error(n % 2, event)) for n, event in enumerate(begun)
        ]
        all_begun = asyncio.gather(*(event.wait() for event in begun))
        await asyncio.wait([all_begun, *asked], return_when=asyncio.FIRST_COMPLETED)
        early = [repr(task.result()) for task in asked if task.done()]
        assert not early, f"before the worker was killed: {early}"
        victim.kill()
        return await asyncio.gather(*asked)

    asyncio.run(asyncio.wait_for(load(), WATCHDOG_S))
    assert server.process.wait(timeout=WATCHDOG_S) != 0
    assert "died unexpectedly" in server.text()
