"""What the router must know of a step's tokens: which are generated, and whose they are.

vLLM's forward context says which rows are padding. Whether a token belongs to a prompt or was
generated, and which request it belongs to, only the model runner knows. So both model runners
get their input preparation wrapped, and two buffers of ours are filled right after it. The
buffers stay at one address for the life of the process, which is what a captured CUDA graph needs.

A token is generated ("decode") when its position is at or past the end of its request's prompt.
That holds for drafted tokens too, and for tokens that are computed again after a preemption.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_capmoe.integration import compat
from vllm_capmoe.integration.compat import Function


@dataclass
class StepTokens:
    """Per-token facts of the step in progress, in the order of the rows of the batch.

    is_decode: bool [max_tokens]. request: int64 [max_tokens], 0..num_requests-1.
    num_requests: requests in the step. Rows past the step's tokens hold leftovers of earlier
    steps; the padding mask of the forward context covers them. Dummy runs fill nothing: they are
    padding throughout, except the profiling run, which comes first, where all rows are prompt.
    """

    is_decode: Tensor
    request: Tensor
    num_requests: int = 1
    live: bool = False

    @classmethod
    def allocate(cls, max_tokens: int, device: torch.device) -> "StepTokens":
        return cls(
            is_decode=torch.zeros(max_tokens, dtype=torch.bool, device=device),
            request=torch.zeros(max_tokens, dtype=torch.int64, device=device),
        )

    def fill(self, request_T: Tensor, positions_T: Tensor, prompt_len_R: Tensor) -> None:
        """Record a step of T real tokens: whose each is, its position, each request's prompt."""
        rows = request_T.shape[0]
        self.request[:rows] = request_T
        self.is_decode[:rows] = positions_T >= prompt_len_R[request_T]
        self.num_requests = prompt_len_R.shape[0]
        self.live = True


_tokens: StepTokens | None = None


def tokens() -> StepTokens:
    """The step in progress in this process; `install` must have been called."""
    if _tokens is None:
        raise RuntimeError("vllm_capmoe: no model runner has been prepared in this process.")
    return _tokens


def install(max_tokens: int, device: torch.device) -> None:
    """Allocate the buffers and wrap the runners' input preparation.

    Patches (both can go once vLLM's forward context says what the module's docstring lists):
        vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs (runner V1; CPU too).
        vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs (runner V2).
    """
    global _tokens
    _tokens = StepTokens.allocate(max_tokens, device)

    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

    compat.wrap(
        RunnerV1,
        "_prepare_inputs",
        _after_v1,
        parameters=("scheduler_output", "num_scheduled_tokens"),
    )
    compat.wrap(
        RunnerV2, "prepare_inputs", _after_v2, parameters=("scheduler_output", "batch_req_state")
    )


def _after_v1(original: Function) -> Function:
    def _prepare_inputs(
        self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        if _tokens is not None:
            rows = scheduler_output.total_num_scheduled_tokens
            batch = self.input_batch
            prompt_len = torch.from_numpy(batch.num_prompt_tokens[: batch.num_reqs].copy())
            _tokens.fill(
                self.req_indices.gpu[:rows],
                self.positions[:rows],
                prompt_len.to(self.device, non_blocking=True),
            )
        return result

    return _prepare_inputs


def _after_v2(original: Function) -> Function:
    def prepare_inputs(
        self: Any, scheduler_output: Any, batch_req_state: Any, *args: Any, **kwargs: Any
    ) -> Any:
        batch = original(self, scheduler_output, batch_req_state, *args, **kwargs)
        if _tokens is not None:
            prompt_len = torch.from_numpy(self.req_states.prompt_len.np[batch.idx_mapping_np])
            device = batch.positions.device
            ends = batch.query_start_loc[1 : batch.num_reqs + 1].to(torch.int64)
            rows = torch.arange(batch.num_tokens, device=device)
            _tokens.fill(
                torch.searchsorted(ends, rows, right=True),
                batch.positions[: batch.num_tokens],
                prompt_len.to(device, non_blocking=True),
            )
        return batch

    return prepare_inputs
