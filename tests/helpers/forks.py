"""Runs Python programs, each in a fork of a process that has imported the slow part.

Importing vLLM takes longer than anything else that an engine of the tests does. Nothing of ours is
imported before the fork, and no environment is changed after it: a program that needs another one
needs another `Forks`.

As a script, which `Forks` starts: a line of JSON comes in for each program, {"program": path of a
script or name of a module, "arguments": [...], "log": path, "timeout": seconds}; a line with its
process id and exit status goes out, the status null where it took too long and was killed.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OURS = ("vllm_capmoe", "capmoe_kernels")


class Forks:
    """A process that has imported vLLM, in the environment `env`.

    tests: the programs are pytest, and Triton is imported as tests/conftest.py does.
    """

    def __init__(
        self,
        env: dict[str, str],
        *,
        python: str | Path = sys.executable,
        folder: Path | None = None,
        tests: bool = False,
    ):
        self.process = subprocess.Popen(
            [python, "-P", __file__, *(["--tests"] if tests else [])],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(
        self, program: str | Path, arguments: list[str], log: Path, timeout: float
    ) -> tuple[int, int | None]:
        """Run it to its end, in a process group of its own; its output goes to `log`.

        Returns that group and the exit status, None where the time was up.
        """
        asked = {
            "program": str(program),
            "arguments": arguments,
            "log": str(log),
            "timeout": timeout,
        }
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"vLLM could not be imported: run {__file__} by hand to see why")
        group, code = json.loads(answer)
        return group, code

    def close(self) -> None:
        self.process.communicate()


def import_slow_libraries(tests: bool) -> None:
    """What most of the programs import. No thread may be left running: only one survives a fork."""
    if tests:
        os.environ["TRITON_INTERPRET"] = "1"
        import triton.language  # noqa: F401

        del os.environ["TRITON_INTERPRET"]
        import hypothesis  # noqa: F401
        import pytest  # noqa: F401
    import torch
    import vllm.config
    import vllm.engine.arg_utils
    import vllm.entrypoints.llm
    import vllm.model_executor.layers.fused_moe.layer
    import vllm.model_executor.layers.fused_moe.router.cpu_router
    import vllm.v1.engine.async_llm
    import vllm.v1.worker.gpu_model_runner  # noqa: F401

    if not torch.cuda.is_available():
        import vllm.v1.worker.cpu_worker  # noqa: F401

    assert not [name for name in sys.modules if name.split(".")[0] in OURS]
    assert not torch.cuda.is_initialized()


def become(asked: dict[str, Any]) -> None:
    """In the fork: the program, with its output in the log."""
    os.setsid()
    out = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(out, number)
    os.close(out)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    program = asked["program"]
    sys.argv = [program, *asked["arguments"]]
    if program.endswith(".py"):
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


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
    import_slow_libraries("--tests" in sys.argv)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            answers.close()
            become(asked)
            return  # and end as any Python process does
        print(json.dumps([child, wait(child, asked["timeout"])]), file=answers, flush=True)


if __name__ == "__main__":
    main()
