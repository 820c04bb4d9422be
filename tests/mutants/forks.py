"""Runs pytest again and again, each time in a fork of a process that has imported the slow part.

    python forks.py       (by run.py; the working folder is that of the tests)

A line of JSON comes in for each run: {"arguments": [...], "log": path, "timeout": seconds}; a line
with pytest's exit status goes out, null where it took too long. Nothing of ours is imported before
the fork, so that every run sees the files as they are then.
"""

import json
import os
import signal
import sys
import time

OURS = ("vllm_capmoe", "capmoe_kernels")


def import_slow_libraries() -> None:
    """What most of the tests import. No thread may be left running: only one survives a fork."""
    os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py does
    import triton.language  # noqa: F401

    del os.environ["TRITON_INTERPRET"]
    import hypothesis
    import pytest
    import torch
    import vllm.config
    import vllm.engine.arg_utils
    import vllm.model_executor.layers.fused_moe.layer
    import vllm.model_executor.layers.fused_moe.router.cpu_router
    import vllm.v1.engine.async_llm
    import vllm.v1.worker.gpu_model_runner  # noqa: F401

    assert not [name for name in sys.modules if name.split(".")[0] in OURS]
    assert not hypothesis.is_hypothesis_test(pytest) and not torch.cuda.is_initialized()


def run(arguments: list[str], log: str) -> None:
    """In the fork: pytest with its output in `log`. Doesn't return."""
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(out, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import pytest

    code = 70
    try:
        code = int(pytest.main(arguments))
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(child: int, timeout: float) -> int | None:
    """The child's exit status; None if it was killed, since the time was up."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import_slow_libraries()
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            run(asked["arguments"], asked["log"])
        print(json.dumps(wait(child, asked["timeout"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
