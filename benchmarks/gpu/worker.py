"""One process of run_gpu.py: takes items as JSON lines, answers each with one line.

    python -m gpu.worker '{"interpret": false, "compile": false, "vllm": true, "faults": {}}'

The first line that it writes says what the card is; it comes when a product on the card is right.
An answer is {"status", "why", "fit", ...values}: ok; wrong (its gate says so); failed (it raised);
missing (not on this host); same (a choice that changes nothing). fit: whether the card still
answers this process. With `compile` no kernel of ours is launched: a launch compiles it into
Triton's cache on the disk, by the arguments of the real call.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, TextIO

import _shapes
import _tables

if TYPE_CHECKING:
    from gpu.case import Case

REPEATS = 20
GRAPH_TOKENS = 1024  # up to here the host would be slower than the device


def compile_only() -> None:
    """Have every launch of a Triton kernel compile and load it, and nothing else."""
    from triton.runtime.jit import JITFunction

    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **options)
        if hasattr(kernel, "result"):  # compiled by another thread
            kernel = kernel.result()
        if hasattr(kernel, "_init_handles"):  # builds the launcher, asks the card for room
            kernel._init_handles()
        return kernel

    JITFunction.run = run


class Worker:
    """Holds the weights of one shape at a time, and the case of one number of tokens."""

    def __init__(self, options: dict[str, Any]) -> None:
        import torch

        self.options = options
        self.shape = ""
        self.layers: list[_shapes.Layer] = []
        self.case: Case | None = None
        self.device = torch.device("cpu" if options["interpret"] else "cuda")
        self.no_vllm = import_vllm() if options["vllm"] else "vLLM's kernels need a GPU"

    def case_of(self, shape: _shapes.Shape, tokens: int) -> Case:
        import torch
        from gpu.case import Case

        if shape.name != self.shape:
            self.case, self.layers, self.shape = None, [], shape.name
            count = 1 if self.options["compile"] else 2
            self.layers = [
                _shapes.make_layer(shape, self.device, torch.bfloat16) for _ in range(count)
            ]
        if self.case is None or self.case.point.tokens != tokens:
            self.case = None  # its memory first
            torch.manual_seed(tokens)
            self.case = Case(shape, tokens, self.layers, self.device, self.no_vllm)
        return self.case

    def work(self, step: str, shape: str, tokens: int, part: str, who: str) -> dict[str, Any]:
        from gpu.items import DRY_SHAPES

        if part == "roofs":
            from _timing import measure_roofs

            roofs = measure_roofs(self.device)
            return {"tflops": roofs.flops / 1e12, "gbps": roofs.bytes / 1e9}
        case = self.case_of((_shapes.SHAPES | DRY_SHAPES)[shape], tokens)
        call = case.call(part, who)
        if step == "compile":
            call.run(0)
            return {}
        if step == "ab":
            return self.compare(case, call)
        values: dict[str, Any] = {"gate": call.gate()}
        if step == "smoke":
            values["repeats"] = self.repeat(case, call, REPEATS)
            return values
        if who == "ours":
            values["repeats"] = self.repeat(case, call, 2)
        timing = self.time(case, call, part)
        values |= {"ms": timing.ms, "timer": timing.how}
        if part == "experts":
            flops, traffic = case.work
            values["tflops"] = flops / timing.ms / 1e9
            values["gbps"] = traffic / timing.ms / 1e6
        return values

    def repeat(self, case: Any, call: Any, count: int) -> int:
        """Runs again and again, and every bit must be as before: what differs is a race."""
        import _gates as gates
        import torch

        count = 1 if self.device.type == "cpu" else count
        first = [tensor.clone() for tensor in call.answer(call.run(0))]
        for done in range(count):
            case.out.fill_(float("nan"))
            for now, before in zip(call.answer(call.run(0)), first, strict=True):
                if not torch.equal(now, before):
                    raise gates.GateError(f"repeat {done + 1} of {count} differs from the first")
        return count

    def time(self, case: Any, call: Any, part: str) -> Any:
        from functools import partial

        from _timing import time_calls

        graph = case.point.tokens <= GRAPH_TOKENS or part in ("routing", "limit")
        calls = [partial(call.run, r) for r in range(case.sets)]
        return time_calls(calls, self.device, graph=graph, seconds=self.options["seconds"])

    def compare(self, case: Any, call: Any) -> dict[str, Any]:
        """A choice against what the heuristics choose, timed before and after it."""
        base = case.call("experts", "ours")
        if call.config == base.config:
            return {"status": "same", "why": "the heuristics choose so"}
        base.gate()
        values = {"gate": call.gate(), "repeats": self.repeat(case, call, 2)}
        before = self.time(case, base, "experts").ms
        timing = self.time(case, call, "experts")
        after = self.time(case, base, "experts").ms
        base_ms = (before + after) / 2
        return values | {
            "ms": timing.ms,
            "timer": timing.how,
            "base_ms": base_ms,
            "base_over_this": base_ms / timing.ms,
        }

    def answer(self, item: dict[str, Any]) -> dict[str, Any]:
        import torch
        from _gates import GateError
        from gpu import faults
        from gpu.case import Missing

        step, shape, tokens = item["step"], item["shape"], item["tokens"]
        key = f"{step}/{shape}/{tokens}/{item['part']}/{item['who']}"
        result: dict[str, Any] = {"status": "ok", "why": ""}
        try:
            with faults.injected(self.options["faults"].get(key)):
                result |= self.work(**item)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        except Missing as error:
            result |= {"status": "missing", "why": str(error)}
        except GateError as error:
            result |= {"status": "wrong", "why": str(error)}
        except Exception as error:  # whatever a compiler, a driver or a kernel may say
            traceback.print_exc()
            result |= {"status": "failed", "why": f"{type(error).__name__}: {error}"[:500]}
            self.case = None
        return result | {"fit": self.fit()}

    def fit(self) -> bool:
        """Whether the card answers this process. After a fault of a kernel it never does again."""
        import torch

        try:
            a = torch.arange(16.0, device=self.device).view(4, 4)
            return bool(torch.equal((a @ a).cpu(), a.cpu() @ a.cpu()))
        except RuntimeError:
            return False


def import_vllm() -> str:
    """What is wrong with vLLM on this host, or nothing."""
    try:
        import vllm.model_executor.layers.fused_moe.fused_moe  # noqa: F401
        from vllm import _custom_ops  # noqa: F401
    except Exception as error:  # of its libraries, too
        return f"vLLM can't be imported: {type(error).__name__}: {error}"[:300]
    return ""


def card(interpret: bool) -> dict[str, Any]:
    """Name of the card, and the comment lines of a table."""
    import torch

    device = torch.device("cpu" if interpret else "cuda")
    return {"slug": _tables.device_slug(device), "header": _tables.header(device)}


def protocol() -> TextIO:
    """Standard output for answers alone: what else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: ends with run_gpu.py
    return answers


def main() -> None:
    answers = protocol()
    options = json.loads(sys.argv[1])
    if options["interpret"]:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.backends.cuda.matmul.allow_tf32 = False  # the gate's reference is float32
    if options["interpret"]:
        torch.set_num_threads(1)
    worker = Worker(options)
    import gpu.case  # noqa: F401  while nothing waits for it

    if options["compile"] and not options["interpret"]:
        compile_only()
    if not worker.fit():
        sys.exit("the card doesn't answer, or not right")
    print(json.dumps(card(options["interpret"]) | {"no_vllm": worker.no_vllm}), file=answers)
    for line in sys.stdin:
        print(json.dumps(worker.answer(json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
