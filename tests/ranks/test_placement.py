"""Which device owns an expert and a token, and what a router sees of a batch: without an engine."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.forward_context import (
    DPMetadata,
    ForwardContext,
    get_forward_context,
    override_forward_context,
)
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration import placement as placement_module
from vllm_capmoe.integration.placement import Placement, placement
from vllm_capmoe.integration.router import CapacityRouter
from vllm_capmoe.integration.stats import LayerStats
from vllm_capmoe.integration.step import Shard, StepTokens
from vllm_capmoe.plan import resolve

CPU = torch.device("cpu")


def parallel(rank: int, *, tp: int = 1, dp: int = 1, sp: int = 1, **more: Any) -> Any:
    """What vLLM says to the layers of one worker, under expert parallelism."""
    settings = {
        "tp_size": 1,
        "tp_rank": 0,
        "pcp_size": 1,
        "pcp_rank": 0,
        "dp_size": dp,
        "dp_rank": rank // tp,
        "ep_size": tp * dp,
        "ep_rank": rank,
        "sp_size": sp,
        "use_ep": True,
        "all2all_backend": "allgather_reducescatter",
        "enable_eplb": False,
    }
    return FusedMoEParallelConfig(**{**settings, **more})


def manager(config: FusedMoEParallelConfig, experts: int, strategy: str) -> ExpertMapManager:
    return ExpertMapManager(
        max_num_batched_tokens=64,
        top_k=2,
        global_num_experts=experts,
        num_redundant_experts=0,
        num_expert_group=2,  # without groups vLLM places linearly
        moe_parallel_config=config,
        placement_strategy=strategy,
        enable_eplb=False,
    )


def placed(
    config: FusedMoEParallelConfig, experts: int = 8, strategy: str = "linear", **settings: Any
) -> Placement:
    layer: Any = SimpleNamespace(
        layer_name="layer",
        moe_config=SimpleNamespace(moe_parallel_config=config),
        expert_map_manager=manager(config, experts, strategy),
    )
    return placement(CapacityConfig(mode="expanded", **settings), layer, experts)


@pytest.fixture(autouse=True)
def no_tensor_parallel_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement_module, "get_tensor_model_parallel_rank", lambda: 1)


@pytest.mark.parametrize("strategy", ["linear", "round_robin"])
@pytest.mark.parametrize(("experts", "ranks"), [(8, 2), (7, 2), (10, 4), (16, 3)])
def test_the_device_of_an_expert_is_the_rank_that_vllm_gives_it(experts, ranks, strategy):
    found = [placed(parallel(r, tp=ranks), experts, strategy) for r in range(ranks)]
    assert len({tuple(each.expert_device) for each in found}) == 1
    for rank in range(ranks):
        theirs = manager(parallel(rank, tp=ranks), experts, strategy).get_local_expert_ids()
        mine = [e for e, device in enumerate(found[0].expert_device) if device == rank]
        assert mine == theirs
    if strategy == "round_robin":
        assert found[0].expert_device[:2] == [0, 1]


@pytest.mark.parametrize(
    ("rank", "more", "first"),
    [
        (0, {}, 0),
        (1, {}, 4),
        (1, {"strategy": "round_robin"}, None),
        (1, {"eplb": True}, None),
    ],
)
def test_a_rank_takes_seats_only_of_consecutive_experts_that_stay(rank, more, first):
    eplb = {"enable_eplb": True} if more.pop("eplb", False) else {}
    assert placed(parallel(rank, tp=2, **eplb), **more).first_local == first


def test_nobody_owns_tokens_under_tensor_parallel_attention():
    assert placed(parallel(1, tp=2)).own_device is None


def test_a_data_parallel_rank_owns_its_tokens():
    assert [placed(parallel(rank, dp=2)).own_device for rank in (0, 1)] == [0, 1]


def test_under_sequence_parallelism_each_rank_owns_its_part():
    found = placed(parallel(3, tp=2, dp=2, sp=2))
    assert (found.own_device, found.shard) == (3, Shard(1, 2, data_parallel_rank=1))
    assert found.expert_device == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tensor_parallel_ranks_of_an_engine_decide_alike():
    """They hold the same tokens, so what is local must be the same for both."""
    two, three = placed(parallel(2, tp=2, dp=2)), placed(parallel(3, tp=2, dp=2))
    assert (two.own_device, two.expert_device) == (three.own_device, three.expert_device)
    assert (two.own_device, two.expert_device, two.ranks) == (1, [0, 0, 0, 0, 1, 1, 1, 1], 4)


def test_level_device_bounds_ranks_where_an_engine_has_several():
    found = placed(parallel(3, tp=2, dp=2), level="device")
    assert (found.own_device, found.expert_device) == (None, [0, 0, 1, 1, 2, 2, 3, 3])
    with pytest.raises(ValueError, match="'local' with --moe-capacity-level 'device', but 2 tens"):
        placed(parallel(3, tp=2, dp=2), level="device", candidates="local")


def test_seats_are_kept_where_a_ranks_experts_are_consecutive_and_stay():
    """They stand in order by expert, so a rank takes those from its first one on."""
    assert [placed(parallel(rank, tp=2)).first_local for rank in (0, 1)] == [0, 4]
    assert placed(parallel(1, tp=2), strategy="round_robin").first_local is None
    assert placed(parallel(1, tp=2, enable_eplb=True)).first_local is None


def test_without_expert_parallelism_there_is_one_device():
    found = placed(parallel(0, tp=1, dp=2, use_ep=False, ep_size=1))
    assert (found.own_device, found.expert_device, found.ranks) == (None, [0] * 8, 1)


def test_no_expert_is_local_under_load_balancing():
    found = placed(parallel(1, dp=2, enable_eplb=True))
    assert found.own_device is None
    plan = resolve(
        CapacityConfig(mode="expanded"),
        num_experts=8,
        top_k=2,
        expert_device=found.expert_device,
        has_token_device=False,
    )
    assert not plan.local and plan.extra == 2 and plan.max_experts is None


# --- What a router does with it ----------------------------------------------------------------

T, E, K = 37, 8, 2


@pytest.fixture
def tokens() -> Iterator[StepTokens]:
    """Thirty prompt tokens of request 0, five requests that generate, two rows of padding."""
    tokens = StepTokens.allocate(T, 8, CPU)
    request = torch.tensor([0] * 30 + [1, 2, 3, 4, 5])
    positions = torch.tensor([*range(30), 9, 8, 7, 6, 5])
    tokens.fill(request, positions, torch.tensor([30, 9, 8, 7, 6, 5]))
    is_padding = torch.arange(T) >= 35
    context = ForwardContext(
        no_compile_layers={}, attn_metadata={}, slot_mapping={}, is_padding=is_padding
    )
    with override_forward_context(context):
        yield tokens


def router(tokens: StepTokens, part: int = 0, parts: int = 1, **settings: Any) -> Any:
    config = CapacityConfig(mode="drop", factor=0.5, min_capacity=1, **settings)
    made = CapacityRouter(
        CPURouter(top_k=K, global_num_experts=E),
        top_k=K,
        num_logical_experts=E,
        scoring_func="softmax",
        renormalize=True,
        scale=1.0,
        plain=False,
    )
    made.bind(
        "layer",
        resolve(config, num_experts=E, top_k=K),
        LayerStats.allocate("layer", E, CPU, part),
        tokens,
        seed=0,
        expert_device_E=torch.zeros(E, dtype=torch.int64),
        own_device=None,
        backend="torch",
        shard=Shard(part, parts, data_parallel_rank=1),
    )
    made.stats.recording = True
    return made


def cut_by_the_model(monkeypatch: pytest.MonkeyPatch, part: int, parts: int) -> None:
    """Replace the forward context's mask by the rank's shard, by vLLM's code, as its models do."""
    from vllm.models.common.ops import sequence_parallel

    for name, value in (("rank", part), ("world_size", parts)):
        monkeypatch.setattr(
            sequence_parallel, f"get_tensor_model_parallel_{name}", lambda value=value: value
        )
    context = get_forward_context()
    context.is_padding = sequence_parallel.sp_padding_mask(
        context.is_padding, torch.zeros(context.is_padding.shape[0], 1)
    )


@pytest.mark.parametrize("cut", [False, True], ids=["mask of the batch", "mask cut by the model"])
@pytest.mark.parametrize("scope", ["batch", "request"])
def test_sequence_parallel_ranks_see_their_part_of_the_batch(tokens, scope, cut, monkeypatch):
    """37 rows on two ranks: 19 each, so that the second has one row past the end of the batch."""
    whole = get_forward_context().is_padding
    logits = torch.randn(38, E, generator=torch.Generator().manual_seed(0))
    topk_ids = logits.topk(K).indices
    records = []
    for part in (0, 1):
        rows = slice(19 * part, 19 * part + 19)
        made = router(tokens, part, parts=2, scope=scope)
        get_forward_context().is_padding = whole
        if cut:
            cut_by_the_model(monkeypatch, part, 2)
        made.route(logits[rows], topk_ids[rows])
        records += made.stats.records
        assert made.stats.counters()["part"] == part
    first, second = records
    assert first["is_padding"] == [False] * 19
    assert second["is_padding"] == [False] * 16 + [True] * 3
    assert first["is_decode"] == [False] * 19
    assert second["is_decode"][:16] == [False] * 11 + [True] * 5
    assert second["request"][:16] == [0] * 11 + [1, 2, 3, 4, 5]
    assert all(held == [-1] * K for held in second["experts"][16:])
    # Each counts its own tokens: T = 19, and 16 of which 11 are of request 0.
    tokens = (19, 16) if scope == "batch" else (19, 11)
    for record, count in zip(records, tokens, strict=True):
        assert record["capacity"][0] == [max(1, -(-count * K // (2 * E)))]


@pytest.mark.parametrize("cut", [False, True], ids=["mask of the batch", "mask cut by the model"])
@pytest.mark.parametrize("real", [1, 2, 3])
def test_one_row_on_each_of_three_ranks(tokens, real, cut, monkeypatch):
    """A mask of one row is all of a batch of one, or a rank's row of a batch of two or three."""
    tokens.fill(torch.zeros(real, dtype=torch.int64), torch.arange(real), torch.tensor([real]))
    padding = []
    for part in range(3):
        context = get_forward_context()
        context.is_padding = torch.zeros(real, dtype=torch.bool)
        context.dp_metadata = DPMetadata(torch.tensor([7, real]))
        if cut:
            cut_by_the_model(monkeypatch, part, 3)
        made = router(tokens, part, parts=3)
        logits = torch.randn(1, E)
        made.route(logits, logits.topk(K).indices)
        padding += made.stats.records[0]["is_padding"]
    assert padding == [n >= real for n in range(3)]


def test_a_part_of_other_rows_is_refused(tokens):
    logits = torch.zeros(18, E)
    with pytest.raises(RuntimeError, match=r"routes 18 rows of a step of 37 \(part 1 of 2\)"):
        router(tokens, 1, parts=2).route(logits, logits.topk(K).indices)
