"""vLLM's model runner V2 prepares a step, wrapped. Exit status 1: a wrong fact about a token.

Its real `prepare_inputs` with its real state of requests, the kernels interpreted: engines on the
CPU run V1 only.
"""

# isort: off
import interpreted_vllm  # noqa: F401 (first)
# isort: on

from types import SimpleNamespace

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBuffers
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner
from vllm.v1.worker.gpu.states import RequestState

from vllm_capmoe.integration import compat, step

buffer_utils.is_uva_available = lambda: False  # there is no pinned memory here
CPU = torch.device("cpu")
MAX_REQUESTS, MAX_TOKENS, DRAFTS = 8, 64, 2

# Prompt, tokens known, of them computed, drafted, scheduled; and which of these were generated.
REQUESTS = {
    "drafts": (5, 8, 7, 2, [True, True, True]),
    "generates": (10, 13, 12, 0, [True]),
    "computed anew after a preemption": (6, 9, 4, 0, [False, False, True, True, True]),
    "in the middle of its prompt": (20, 20, 8, 0, [False] * 7),
    "begins": (4, 4, 0, 0, [False] * 4),
}


def runner() -> GPUModelRunner:
    """A runner with what `prepare_inputs` reads, without model and device."""
    made = object.__new__(GPUModelRunner)
    made.device, made.max_num_reqs, made.decode_query_len = CPU, MAX_REQUESTS, DRAFTS + 1
    made.input_buffers = InputBuffers(MAX_REQUESTS, MAX_TOKENS, CPU)
    made.req_states = RequestState(
        MAX_REQUESTS, 64, MAX_TOKENS, DRAFTS, 100, CPU, use_dense_all_token_ids=True
    )
    made.model_state = SimpleNamespace(num_new_sampled_tokens_per_step=1)
    made.model_config = SimpleNamespace(rswa_window=None)
    made.adaptive_verification = made.fast_prefill = made.pcp_manager = None
    return made


def add_requests(states: RequestState) -> None:
    for name, (prompt, known, computed, _, _) in REQUESTS.items():
        states.add_request(name, prompt, list(range(known)), computed, max_tokens=20)
    states.apply_staged_writes()


def batch_of(states: RequestState) -> BatchReqState:
    index = np.array([states.req_id_to_index[name] for name in REQUESTS])
    scheduled = np.array([len(decode) for *_, decode in REQUESTS.values()], dtype=np.int32)
    prefill, computed = (
        np.array(column) for column in list(zip(*REQUESTS.values(), strict=True))[1:3]
    )
    known = {
        "req_ids": list(REQUESTS),
        "num_scheduled_tokens": scheduled,
        "num_tokens": int(scheduled.sum()),
        "num_draft_tokens_np": np.array([each[3] for each in REQUESTS.values()], dtype=np.int32),
        "idx_mapping_np": index,
        "prefill_len_np": prefill,
        "num_computed_prefill_tokens_np": computed,
        "is_prefilling_np": computed < prefill,
        "has_prefill": True,
    }
    return BatchReqState(**{name: known.get(name) for name in BatchReqState._fields})


def main() -> None:
    compat.apply(step.patches)
    made = runner()
    tokens = step.StepTokens.allocate(MAX_TOKENS, MAX_REQUESTS, CPU)
    setattr(made, step.ATTRIBUTE, tokens)
    add_requests(made.req_states)
    # Of other requests, which used other places of the state.
    assert [made.req_states.req_id_to_index[name] for name in REQUESTS] != list(
        range(len(REQUESTS))
    )
    scheduler_output = SimpleNamespace(
        scheduled_spec_decode_tokens={"drafts": [1, 2]}, has_structured_output_requests=False
    )
    # As for a graph that was captured for more tokens and requests.
    shape = BatchExecutionDescriptor(CUDAGraphMode.FULL, 32, 7)
    batch = made.prepare_inputs(scheduler_output, batch_of(made.req_states), shape, 0)
    expected = [decode for *_, decode in REQUESTS.values()]
    rows = sum(map(len, expected))
    assert batch.num_tokens == rows and len(batch.positions) == 32
    assert tokens.is_decode[:rows].tolist() == sum(expected, [])
    assert tokens.request[:rows].tolist() == [n for n, each in enumerate(expected) for _ in each]
    assert tokens.num_requests == len(REQUESTS)
    assert not tokens.is_decode[rows:].any(), "rows that the step doesn't have"
    cut_short(batch, tokens)


def cut_short(batch: object, tokens: step.StepTokens) -> None:
    """With adaptive verification the device may know of fewer rows than the host."""
    batch.query_start_loc = batch.query_start_loc.clone()
    batch.query_start_loc[len(REQUESTS) :] -= 2
    prepare = step._after_v2(lambda self, *_: batch)
    made = SimpleNamespace(**{step.ATTRIBUTE: tokens}, req_states=runner().req_states)
    prepare(made, None, None)
    assert int(tokens.request[: batch.num_tokens].max()) == len(REQUESTS) - 1


if __name__ == "__main__":
    main()
