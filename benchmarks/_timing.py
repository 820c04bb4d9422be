"""Timers with a cold cache, and the measured roofs.

Inputs take turns, so that none is in the cache; a time is the median of many calls, by CUDA events
or, where the host would be slower than the device, by replays of a CUDA graph.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

GRAPH_CALLS = 16  # at least so many in one graph, or its launch would count
L2_TIMES = 4  # inputs that take turns touch at least this many times the L2 cache


def rotations(touched_bytes: int, device: torch.device) -> int:
    """How many inputs take turns, 2 to 16: enough that their data is several times the L2."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(16, math.ceil(L2_TIMES * cache / max(touched_bytes, 1))))


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one call; how (graph, events, host); calls that were timed."""

    ms: float
    how: str
    calls: int


def time_calls(
    calls: Sequence[Callable[[], Any]], device: torch.device, *, graph: bool, seconds: float = 0.15
) -> Timing:
    """Median time of a call, the inputs of which take turns: call i uses set i.

    graph: all calls, again and again up to at least GRAPH_CALLS, in one CUDA graph, whose replays
    are timed: for small sizes, where the host is slower than the device. What can't be captured is
    timed by events. By events: each call between two, with the device kept busy first, so that the
    host is always ahead.
    """
    for call in calls:
        call()
    if device.type != "cuda":
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return Timing(statistics.median(times), "host", len(times))
    torch.cuda.synchronize()
    if graph:
        many = [*calls] * math.ceil(GRAPH_CALLS / len(calls))
        captured = _capture(many)
        if captured is not None:
            per_replay = _between_events([captured.replay], 3)
            repeats = max(5, min(200, int(1e3 * seconds / max(per_replay[0], 1e-3))))
            times = _between_events([captured.replay], repeats)
            return Timing(statistics.median(times) / len(many), "graph", repeats * len(many))
    once = statistics.median(_between_events(calls, 1))
    rounds = max(1, min(100, int(1e3 * seconds / max(once, 1e-3) / len(calls))), 6 // len(calls))
    times = _between_events(calls, rounds)
    return Timing(statistics.median(times), "events", len(times))


def _capture(calls: Sequence[Callable[[], Any]]) -> Any:
    """The calls as one CUDA graph, or None where one of them can't be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
    except RuntimeError as error:
        print(f"not captured, timed by events: {str(error).splitlines()[0]}", file=sys.stderr)
        torch.cuda.synchronize()
        return None
    return graph


def _between_events(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Milliseconds of every call, in `rounds` rounds over them."""
    pairs = []
    for done in range(rounds):
        if done % 16 == 0:
            torch.cuda._sleep(4_000_000)  # cycles, about 2 ms, in which the host gets ahead
        for call in calls:
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


@dataclass(frozen=True)
class Roofs:
    """Measured ceilings: bf16 product, FLOP/s; device copy, bytes read and written per second."""

    flops: float
    bytes: float


def measure_roofs(device: torch.device) -> Roofs:
    """The largest rate of some bf16 products on random data, and of a large copy."""
    small = device.type != "cuda"
    best = 0.0
    for m, n, k in [(128, 128, 128)] if small else [(8192,) * 3, (16384, 8192, 8192)]:
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        b = torch.randn(n, k, device=device, dtype=torch.bfloat16).T
        out = torch.empty(m, n, device=device, dtype=torch.bfloat16)
        product = functools.partial(torch.mm, a, b, out=out)
        ms = time_calls([product], device, graph=False).ms
        best = max(best, 2 * m * n * k / ms * 1e3)
    count = 1 << (16 if small else 31)
    source = torch.randint(0, 256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = time_calls([lambda: target.copy_(source)], device, graph=False).ms
    return Roofs(best, 2 * count / ms * 1e3)
