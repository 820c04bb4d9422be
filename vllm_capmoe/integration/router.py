"""The router of a layer under a capacity mode: vLLM's own router, then capacity.

    router logits [T, E] -> vLLM's router -> top-k ids [T, k]         (groups, biases: as it does)
    router logits [T, E] -> scores S [T, E]                            (the model's scoring)
    S, top-k ids         -> `route_torch` -> weights, experts [T, W]   (this project)

On CUDA one call of `route_triton` does the last two and counts the loads; where the model
takes the plain top-k, it does the first one too. The result goes on through vLLM's `BaseRouter`,
which maps logical experts to the physical replicas of EPLB. The capacity step is one custom op, so
that torch.compile sees an opaque call of known shape on every platform.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import layer as layer_module
from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter
from vllm.platforms import current_platform
from vllm.utils.torch_utils import (
    LayerNameType,
    _encode_layer_name,
    _resolve_layer_name,
)

from capmoe_kernels.capacity import capacity
from capmoe_kernels.contract import SCORINGS, Plan, Seats, Selection, Step
from capmoe_kernels.tables import Tables
from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.families import SCORING, family_of
from vllm_capmoe.integration.phantom import fill_unused
from vllm_capmoe.integration.settings import current_config
from vllm_capmoe.integration.stats import LayerStats
from vllm_capmoe.integration.step import Shard, StepTokens
from vllm_capmoe.integration.trials import LayerTrials
from vllm_capmoe.ranking import choose_top_k, score_keys
from vllm_capmoe.torch_routing import route_torch
from vllm_capmoe.unlimited import Held, hold, may_limit, route_unlimited


class CapacityRouter(BaseRouter):
    """Wraps the router that vLLM made for a layer.

    Args:
        inner: vLLM's router; it decides the top-k.
        top_k: k. num_logical_experts: E, without the redundant experts of EPLB.
        scoring_func: a key of `families.SCORING`.
        renormalize: whether the model rescales the chosen weights to sum to one.
        scale: the routed scaling factor that `inner` multiplies its weights with.
        plain: whether `inner` chooses the experts of the highest scores, without more ado.
        expert_scale: what returns the factors of the experts' weights, float [E], if it has any.
    """

    def __init__(
        self,
        inner: BaseRouter,
        *,
        top_k: int,
        num_logical_experts: int,
        scoring_func: str,
        renormalize: bool,
        scale: float,
        plain: bool,
        expert_scale: Callable[[], Tensor] | None = None,
    ):
        super().__init__(top_k, inner.global_num_experts, eplb_state=inner.eplb_state)
        self.inner = inner
        self.num_logical_experts = num_logical_experts
        self.scoring_func = scoring_func
        self.renormalize = renormalize
        self.scale = scale
        self.plain = plain
        self.expert_scale = expert_scale
        # Known once the whole model is there, see `bind` and `bind_draft`.
        self.is_draft = False
        self.layer_name: str = ""
        self.plan: Plan | None = None
        self.stats: LayerStats | None = None
        self.tokens: StepTokens | None = None
        self.seed = 0
        self.expert_device_E: Tensor | None = None
        self.token_device: Tensor | None = None
        self.shard = Shard()
        self.observes = False
        self.observes_live = False
        self.started_gamma: Fraction | None = None
        self.tables: Tables | None = None
        self.trials: LayerTrials | None = None
        self.fills_unused = False
        self.drops = False
        self.phantom: int | None = None
        self.by_kernel = False
        self.keeps_seats = False
        self.first_local: int | None = 0
        self._seats: tuple[int, Seats] | None = None

    def bind(
        self,
        layer_name: str,
        plan: Plan,
        stats: LayerStats,
        tokens: StepTokens,
        *,
        seed: int,
        expert_device_E: Tensor | None,
        own_device: int | None,
        backend: str,
        observes: bool = False,
        phantom: int | None = None,
        shard: Shard | None = None,
        first_local: int | None = 0,
    ) -> None:
        """Say what could not be known when vLLM built the layer.

        Args:
            layer_name: under which vLLM's forward context knows the layer.
            plan: the configuration, resolved for this layer.
            stats: where the loads are counted.
            tokens: what is known of a step's tokens.
            seed: of the metric `random`; differs by layer.
            expert_device_E: int64 [E], which EP rank owns a logical expert; None on one rank.
            own_device: the EP rank that owns the tokens this router sees; None where all ranks
                see all tokens.
            backend: who computes the experts, see `checks.resolve_backend`.
            observes: decide and count, and hand on what vLLM's router chose, bit for bit. So it is
                where nothing is to be done for vLLM's own kernels, too.
            phantom: what the kernels of backend "vllm" get as expert of unused places, instead of
                -1, which not all of them know; None: experts with weight 0. See `phantom`.
            shard: which part of the batch this router sees; by default all of it.
            first_local: the first expert of this rank, where its experts are consecutive and get
                the rows that this router routes, with the ids that it chose; None elsewhere.
        """
        self.layer_name, self.plan, self.stats, self.tokens = layer_name, plan, stats, tokens
        self.started_gamma = plan.gamma
        self.seed = seed
        self.expert_device_E = expert_device_E
        if own_device is not None:
            self.token_device = torch.full_like(tokens.request, own_device)
        self.observes = observes or (backend == "vllm" and not plan.acts)
        self.phantom = phantom
        self.fills_unused = backend == "vllm" and phantom is None
        self.drops = plan.mode != "off"
        self.shard = shard or Shard()
        self.first_local = first_local
        self.by_kernel = backend == "triton" or tokens.request.is_cuda
        self.keeps_seats = backend == "triton" and first_local is not None
        if self.by_kernel:
            self.tables = Tables.of(plan, tokens.is_decode.shape[0], tokens.is_decode.device)

    def change(self, plan: Plan, observes: bool) -> None:
        """Route by other numbers from the next step on.

        plan: differs in gamma and keeps only, at most; they go to the tables too, which captured
            graphs read. observes: decide by them and count, and apply nothing: plain top-k.

        Raises:
            ValueError: the tables of this layer can't hold them.
        """
        if self.tables is not None:
            self.tables.set(plan)
        self.plan, self.observes_live = plan, observes

    def bind_draft(self) -> None:
        """This layer is a draft model's: it routes as vLLM does, and counts in nothing.

        A draft is run on rows of its own, of which the step's facts say nothing, and what it gets
        wrong costs time, not quality.
        """
        self.is_draft = True

    @property
    def routing_method_type(self) -> RoutingMethodType:
        """By this vLLM 0.32 chooses kernels: no monolithic one for CUDA takes `Custom`."""
        return (
            RoutingMethodType.Custom
            if current_platform.is_cuda()
            else self.inner.routing_method_type
        )

    @property
    def supports_monolithic_kernels(self) -> bool:
        """vLLM 0.33 asks: a kernel that routes by itself would bypass us. Never."""
        return False

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.is_draft:
            return self.inner._compute_routing(
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
        assert self.plan is not None, "a layer ran before vllm_capmoe bound it"
        topk_ids = None
        # Only a compiler needs the ops, which take their time.
        compiling = torch.compiler.is_compiling()
        name = _encode_layer_name(self.layer_name) if compiling else ""
        if self.observes or not (self.plain and self.by_kernel):
            weights, topk_ids = self.inner._compute_routing(
                hidden_states, router_logits, indices_type, input_ids=input_ids
            )
            if self.observes and compiling:
                return weights, torch.ops.capmoe.observe(router_logits, topk_ids, name)
            if self.observes:
                self.observe(router_logits, topk_ids)
                return weights, topk_ids
        if compiling:
            return torch.ops.capmoe.route(router_logits, topk_ids, self.plan.width, name)
        weights, experts = self.route(router_logits, topk_ids)
        return weights, experts.to(_ids_dtype(topk_ids))

    def decide(self, router_logits: Tensor, topk_ids: Tensor | None) -> tuple[Selection, Tensor]:
        """Who holds which expert, on real tensors; it is counted, and recorded if that is on.

        Args:
            router_logits: [T, E], any float type. topk_ids: int [T, k]; None for the plain top-k.

        Returns:
            the selection, and the padding of these rows: bool [T].
        """
        plan, stats = self.plan, self.stats
        assert plan is not None and stats is not None
        step, request = self._step(router_logits.shape[0], plan)
        selection = self._select(router_logits, topk_ids, plan, step, self.tables, stats)
        if stats.recording:
            keys = score_keys(self._scores(router_logits))
            stats.record(
                selection,
                topk=choose_top_k(keys, plan.top_k, topk_ids),
                is_padding=step["is_padding_T"],
                is_decode=step["is_decode_T"],
                request=request,
            )
        if self.trials is not None:
            self.trials.add(self._scores(router_logits), topk_ids, step)
        if self.observes_live:
            without = dataclasses.replace(plan, gamma=None, keeps=())
            selection = self._select(router_logits, topk_ids, without, step)
        is_padding = step["is_padding_T"]
        assert is_padding is not None
        return selection, is_padding

    def _step(self, rows: int, plan: Plan) -> tuple[Step, Tensor]:
        """What is known of these rows, and the request of each: int64 [T]."""
        tokens, cut = self.tokens, self.shard.cut
        assert tokens is not None
        is_padding = self.shard.cut_mask(get_forward_context().is_padding, rows)
        is_decode, request = cut(tokens.is_decode, rows, False), cut(tokens.request, rows, 0)
        owner = None if self.token_device is None else cut(self.token_device, rows, 0)
        per_request = plan.scope == "request"
        step: Step = {
            "is_padding_T": is_padding,
            "is_decode_T": is_decode,
            "request_T": request if per_request else None,
            "num_requests": tokens.num_groups if per_request else 1,
            "device_E": self.expert_device_E,
            "token_device_T": owner,
            "seed": self.seed,
        }
        return step, request

    def _select(
        self,
        router_logits: Tensor,
        topk_ids: Tensor | None,
        plan: Plan,
        step: Step,
        tables: Tables | None = None,
        stats: LayerStats | None = None,
    ) -> Selection:
        """Who holds which expert, by `tables` where they are given; counted in `stats`."""
        if self.by_kernel:
            from capmoe_kernels.routing import route_triton

            inside = self.scoring_func in SCORINGS
            return route_triton(
                router_logits if inside else self._scores(router_logits),
                plan,
                scoring=self.scoring_func if inside else None,
                counters=None if stats is None else stats.counts,
                tables=tables,
                topk_TK=topk_ids,
                **step,
            )
        selection: Selection | None = None
        scores = self._scores(router_logits)
        if topk_ids is not None and not scores.is_cuda:
            selection = route_unlimited(scores, plan, topk_TK=topk_ids, **step)
        if selection is None:
            selection = route_torch(scores, plan, topk_TK=topk_ids, **step)
        if stats is not None:
            stats.add(selection)
        return selection

    def hold(self, router_logits: Tensor, topk_ids: Tensor | None) -> Held | None:
        """`decide`, quickly, for steps on the CPU without limit, padding and records; else None."""
        plan, stats, tokens = self.plan, self.stats, self.tokens
        assert plan is not None and stats is not None and tokens is not None
        if self.by_kernel or topk_ids is None or plan.width != plan.top_k or self.observes_live:
            return None
        rows = router_logits.shape[0]
        is_padding = self.shard.cut_mask(get_forward_context().is_padding, rows).numpy()
        if stats.recording or self.trials is not None or is_padding.any():
            return None
        is_decode = self.shard.cut(tokens.is_decode, rows, False).numpy()
        if may_limit(plan, rows, int(np.count_nonzero(is_decode))):
            return None
        scores = self._scores(router_logits).numpy()
        held = hold(scores, plan, topk_ids.numpy().astype(np.int64), is_decode)
        stats.add_later(held)
        return held

    def route(self, router_logits: Tensor, topk_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """The capacity step; arguments as `decide`.

        Returns:
            weights float32 [T, W] and experts int32 [T, W]; -1 and 0 in unused places.
        """
        held = self.hold(router_logits, topk_ids)
        if held is not None:
            experts = torch.from_numpy(held.held_TK.astype(np.int32))
            return self._scaled(torch.from_numpy(held.weights_TK), experts), experts
        selection, is_padding = self.decide(router_logits, topk_ids)
        experts = selection.experts
        weights = self._scaled(selection.weights, experts)
        if self.keeps_seats:
            assert selection.seats is not None
            self._seats = (router_logits.shape[0], selection.seats)
        # On CUDA vLLM's own routers leave padding at -1, too; without a mode all else is used.
        if self.fills_unused and (self.drops or not self.by_kernel):
            skipped = is_padding if self.by_kernel else None
            experts = fill_unused(experts, selection.load_after, skipped)
        return weights, experts

    def observe(self, router_logits: Tensor, topk_ids: Tensor) -> None:
        """Decide and count, no more."""
        if self.hold(router_logits, topk_ids) is None:
            self.decide(router_logits, topk_ids)

    def _apply_eplb_mapping(self, topk_ids: Tensor) -> Tensor:
        """Logical experts to replicas, as vLLM does; then unused places to the phantom expert."""
        ids = super()._apply_eplb_mapping(topk_ids)
        return ids if self.phantom is None else ids.masked_fill(ids < 0, self.phantom)

    def seats_of(self, experts: Tensor, num_local: int, expert_map: Tensor | None) -> Seats | None:
        """The seats that the routing kernel handed out with `experts`, or None if there are none.

        There are none for rows that vLLM gathered from other ranks or mapped to replicas, and
        where this rank's experts are not consecutive: `bind` says so once, for every step.
        num_local: experts of this rank.
        """
        if self._seats is None or self.first_local is None:
            return None
        (rows, seats), self._seats = self._seats, None
        if experts.shape[0] != rows:
            raise RuntimeError(
                f"Layer {self.layer_name} routed {rows} rows, and its experts got "
                f"{experts.shape[0]}: vLLM hands on others than vllm_capmoe was told."
            )
        if expert_map is None:
            return seats
        offsets = seats.offsets[self.first_local : self.first_local + num_local + 1]
        return dataclasses.replace(seats, offsets=offsets)

    def most_rows(self, rows: int) -> int | None:
        """The most rows of one expert in a step of so many tokens, where the limit says it.

        Generated tokens, which are never dropped, may bring more: the kernels take it for a hint.
        """
        plan = self.plan
        if plan is None or plan.gamma is None or (plan.level, plan.scope) != ("expert", "batch"):
            return None
        return capacity(
            rows,
            num_experts=plan.num_experts,
            top_k=plan.top_k,
            gamma=plan.gamma,
            min_capacity=plan.min_capacity,
        )

    def most_held(self, rows: int, num_local: int, sources: int) -> int | None:
        """The most assignments that one rank's experts hold, of rows that were put together.

        A group without a limit holds k a token. In one with a limit C an expert holds at most C,
        or its generated tokens, who hold k each. And the limits of parts of a batch, each with its
        floor and its rounding, are hardly more than that of the whole:

            held <= T*k + E_local * (C(T) + groups * (min_capacity + 1))

        Args:
            rows: T, all together. num_local: experts of the rank.
            sources: routers whose rows these are, each with limits of its own.
        """
        plan, tokens = self.plan, self.tokens
        if plan is None or tokens is None:
            return None
        if self.started_gamma is None:
            return rows * plan.top_k
        # Rows of other engines may still be routed by the factor of the start.
        gamma = max(self.started_gamma, plan.gamma or self.started_gamma)
        # Another rank may have more requests in this step than this one.
        groups = sources * (tokens.max_requests if plan.scope == "request" else 1)
        whole = capacity(
            rows, num_experts=plan.num_experts, top_k=plan.top_k, gamma=gamma, min_capacity=1
        )
        return rows * plan.top_k + num_local * (whole + groups * (plan.min_capacity + 1))

    def _scaled(self, weights: Tensor, experts: Tensor) -> Tensor:
        if self.expert_scale is not None:  # an unused place has weight 0
            weights = weights * self.expert_scale().float()[experts.clamp(min=0).long()]
        return weights if self.scale == 1.0 else weights * self.scale

    def _scores(self, router_logits: Tensor) -> Tensor:
        return SCORING[self.scoring_func](router_logits.float())


def patches() -> list[Patch]:
    """What puts a `CapacityRouter` around each router that vLLM makes from here on.

    vllm.model_executor.layers.fused_moe.layer.create_fused_moe_router: the one place where a
        layer's router is made. It can go once vLLM has a registry of routers.
    """
    parameters = (
        "top_k",
        "global_num_experts",
        "renormalize",
        "scoring_func",
        "use_grouped_topk",
        "routed_scaling_factor",
        "e_score_correction_bias",
        "custom_routing_function",
        "zero_expert_type",
        "hash_indices_table",
        "num_fused_shared_experts",
        "num_logical_experts",
        "bias_vl",
    )
    return [Patch(layer_module, "create_fused_moe_router", _make_router, parameters)]


def _make_router(original: Function) -> Function:
    def create_fused_moe_router(**kwargs: Any) -> FusedMoERouter:
        inner = original(**kwargs)
        config = current_config()
        if not config.enabled:
            return inner
        family = family_of(config, inner, kwargs)
        return CapacityRouter(
            inner,
            top_k=kwargs["top_k"],
            num_logical_experts=kwargs.get("num_logical_experts") or kwargs["global_num_experts"],
            scoring_func=family.scoring,
            renormalize=kwargs.get("renormalize", True),
            scale=family.scale,
            plain=family.plain,
            expert_scale=family.expert_scale,
        )

    return create_fused_moe_router


def route_op(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor | None,
    width: int,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`torch.ops.capmoe.route`: `CapacityRouter.route` of the named layer."""
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    weights, experts = layer.router.route(router_logits, topk_ids)
    return weights, experts.to(_ids_dtype(topk_ids))


def route_fake(
    router_logits: torch.Tensor,
    topk_ids: torch.Tensor | None,
    width: int,
    layer_name: LayerNameType,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (router_logits.shape[0], width)
    return (
        router_logits.new_empty(shape, dtype=torch.float32),
        router_logits.new_empty(shape, dtype=_ids_dtype(topk_ids)),
    )


def observe_op(
    router_logits: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    """`torch.ops.capmoe.observe`: decide and count; a copy of the ids, so that the call stays."""
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    layer.router.observe(router_logits, topk_ids)
    return topk_ids.clone()


def observe_fake(
    router_logits: torch.Tensor, topk_ids: torch.Tensor, layer_name: LayerNameType
) -> torch.Tensor:
    return torch.empty_like(topk_ids)


def _ids_dtype(topk_ids: torch.Tensor | None) -> torch.dtype:
    return torch.int32 if topk_ids is None else topk_ids.dtype
