"""What the router must know of a step's tokens: which are generated, and whose they are.

vLLM's forward context says which rows are padding. Whether a token belongs to a prompt or was
generated, and which request it belongs to, only the model runner knows. So both model runners
get their input preparation wrapped, and two buffers of ours are filled right after it. The
buffers stay at one address for the life of the process, which is what a captured CUDA graph needs.

A token is generated ("decode") when its position is at or past the end of its request's prompt.
That holds for drafted tokens too, and for tokens that are computed again after a preemption.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_capmoe.integration.compat import Function, Patch

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass
class StepTokens:
    """Per-token facts of the step in progress, in the order of the rows of the batch.

    is_decode: bool [max_tokens]. request: int64 [max_tokens], 0..num_requests-1.
    max_requests: the most that a step can have. num_requests: those of this step.
    before_first_step: called once, by `begin`, when the first real step comes, after all dummy
        runs of the start; empty from then on.

    Rows past the step's tokens hold leftovers of earlier steps; the padding mask of the forward
    context covers them. Dummy runs fill nothing: they are padding throughout, except the
    profiling run, which comes first, where all rows are prompt.
    """

    is_decode: Tensor
    request: Tensor
    max_requests: int
    num_requests: int = 1
    before_first_step: list[Callable[[], None]] = field(default_factory=list)

    @classmethod
    def allocate(cls, max_tokens: int, max_requests: int, device: torch.device) -> "StepTokens":
        return cls(
            is_decode=torch.zeros(max_tokens, dtype=torch.bool, device=device),
            request=torch.zeros(max_tokens, dtype=torch.int64, device=device),
            max_requests=max_requests,
        )

    @property
    def num_groups(self) -> int:
        """Groups to route in scope request: on a GPU a constant, since a graph would keep it."""
        return self.max_requests if self.request.is_cuda else self.num_requests

    def begin(self) -> None:
        """The start is over: what was counted in it doesn't count."""
        for reset in self.before_first_step:
            reset()
        self.before_first_step.clear()  # after the resets: a reader in another thread looks at it

    def fill(self, request_T: Tensor, positions_T: Tensor, prompt_len_R: Tensor) -> None:
        """Record a step of T real tokens: whose each is, its position, each request's prompt."""
        self.begin()
        rows = request_T.shape[0]
        self.request[:rows] = request_T
        self.is_decode[:rows] = positions_T >= prompt_len_R[request_T]
        self.num_requests = prompt_len_R.shape[0]


@dataclass(frozen=True)
class Shard:
    """Which rows of a step's batch a router sees: part `index` of `count` equal ones, in order.

    Under sequence parallelism the tensor parallel rank and their number, else all rows. The last
    part may go past the end of the batch. data_parallel_rank: whose batch it is.
    """

    index: int = 0
    count: int = 1
    data_parallel_rank: int = 0

    def cut(self, batch_T: Tensor, rows: int, fill: bool | int) -> Tensor:
        """This shard's rows of a batch, filled up where the batch ends before them."""
        part_T = batch_T[self.index * rows : (self.index + 1) * rows]
        missing = rows - part_T.shape[0]
        return pad(part_T, (0, missing), value=fill) if missing else part_T

    def cut_mask(self, mask_T: Tensor | None, rows: int) -> Tensor:
        """This shard's rows of vLLM's padding mask, which some models have cut already.

        Raises:
            RuntimeError: the router sees other rows than the step's, or than its shard of them.
        """
        held = -1 if mask_T is None else mask_T.shape[0]
        if mask_T is not None and held == rows and self._is_cut(held):
            return mask_T
        if mask_T is not None and -(-held // self.count) == rows:
            return self.cut(mask_T, rows, True)
        step = "a pass without padding mask" if mask_T is None else f"a step of {held}"
        raise RuntimeError(
            f"An MoE layer routes {rows} rows of {step} (part {self.index} of {self.count}): which "
            "tokens they are isn't known, so no capacity can be decided; --moe-capacity-mode 'off' "
            "is accepted with this model."
        )

    def _is_cut(self, held: int) -> bool:
        """Whether a mask of as many rows as the router sees is this shard's, not all of it.

        The two differ unless there is one row: it is all of the batch, or one of several shards.
        """
        parallel = get_forward_context().dp_metadata
        if self.count == 1 or held > 1 or parallel is None:
            return self.count == 1 or held > 1
        return int(parallel.num_tokens_across_dp_cpu[self.data_parallel_rank]) > 1


ATTRIBUTE = "moe_capacity_tokens"  # of a model runner


def attach(model_runner: Any, vllm_config: "VllmConfig") -> StepTokens:
    """Give a model runner its buffers, which the patched methods then fill."""
    scheduler = vllm_config.scheduler_config
    tokens = StepTokens.allocate(
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs, torch.device(model_runner.device)
    )
    setattr(model_runner, ATTRIBUTE, tokens)
    return tokens


def patches() -> list[Patch]:
    """What fills the buffers. Both can go once vLLM's forward context says what is said above.

    vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs: model runner V1; the CPU's too.
    vllm.v1.worker.gpu.model_runner.GPUModelRunner.prepare_inputs: model runner V2.
    """
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as RunnerV2
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner as RunnerV1

    v1 = ("scheduler_output", "num_scheduled_tokens")
    v2 = ("scheduler_output", "batch_req_state")
    return [
        Patch(RunnerV1, "_prepare_inputs", _after_v1, v1),
        Patch(RunnerV2, "prepare_inputs", _after_v2, v2),
    ]


def _on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device that doesn't make the host wait."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(values)
    return async_tensor_h2d(values, device=device)


def _after_v1(original: Function) -> Function:
    def _prepare_inputs(
        self: Any, scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any
    ) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens, *args, **kwargs)
        tokens = getattr(self, ATTRIBUTE, None)
        if tokens is not None:
            rows = scheduler_output.total_num_scheduled_tokens
            batch = self.input_batch
            prompt_len = batch.num_prompt_tokens[: batch.num_reqs].copy()
            tokens.fill(
                self.req_indices.gpu[:rows],
                self.positions[:rows],
                _on_device(prompt_len, self.device),
            )
        return result

    return _prepare_inputs


def _after_v2(original: Function) -> Function:
    def prepare_inputs(
        self: Any, scheduler_output: Any, batch_req_state: Any, *args: Any, **kwargs: Any
    ) -> Any:
        batch = original(self, scheduler_output, batch_req_state, *args, **kwargs)
        tokens = getattr(self, ATTRIBUTE, None)
        if tokens is not None:
            prompt_len = self.req_states.prompt_len.np[batch.idx_mapping_np]
            device = batch.positions.device
            ends = batch.query_start_loc[1 : batch.num_reqs + 1].to(torch.int64)
            rows = torch.arange(batch.num_tokens, device=device)
            # With adaptive verification the step may be cut shorter than its rows.
            request = torch.searchsorted(ends, rows, right=True).clamp_(max=batch.num_reqs - 1)
            tokens.fill(
                request,
                batch.positions[: batch.num_tokens],
                _on_device(prompt_len, device),
            )
        return batch

    return prepare_inputs
