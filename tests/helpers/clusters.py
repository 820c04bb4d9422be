"""What engines of several ranks need on two cores, see tests/platform and tests/ranks."""

import os
import subprocess
from pathlib import Path

from engines import ended, environment

TESTS = Path(__file__).resolve().parent.parent


def cores(ranks: int) -> str:
    """VLLM_CPU_OMP_THREADS_BIND: a core for each rank, of those that this process may use.

    Left to itself vLLM binds every engine of one rank to the same core of two. Of tests that run
    beside each other (pytest -n), each process begins with another core.
    """
    ours = sorted(os.sched_getaffinity(0))
    first = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return "|".join(str(ours[(first + rank) % len(ours)]) for rank in range(ranks))


CLUSTER = {
    # The test platform, and what the runners of the end-to-end tests have to share.
    "PYTHONPATH": os.pathsep.join([str(TESTS / "platform"), str(TESTS / "e2e")]),
    "VLLM_CPU_OMP_THREADS_BIND": cores(2),
}
TENSOR_PARALLEL = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
DATA_PARALLEL = {"data_parallel_size": 2, "enable_expert_parallel": True}


def start(command: list[str], log: Path, timeout: float, **env: str) -> str:
    """Run a command to its end in a process group of its own, and return its output.

    Fails if it takes longer, if its exit status isn't 0, or if it leaves a process behind.
    """
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=environment(**{**CLUSTER, **env}),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        code: int | str = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = f"no end in {timeout:.0f} s"
    return ended(process.pid, code, log)
