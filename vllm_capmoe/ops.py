"""The public function `route`: validate, settle `auto`, compute, and give plain results.

The plugin calls the same core, `vllm_capmoe.torch_routing.route_torch`, with a plan of
`vllm_capmoe.plan.resolve`, without the checks that would cost time in every layer.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import SupportsIndex

import torch
from torch import Tensor

from capmoe_kernels.checks import FLOATS, INTEGERS, check_beside, check_tensor
from capmoe_kernels.contract import NO_LIMIT, Plan, Selection
from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.plan import resolve
from vllm_capmoe.torch_routing import route_torch

__all__ = ["NO_LIMIT", "Routing", "route"]

_BACKENDS = ("auto", "torch", "triton")
_SIZE_LIMIT = 2**29  # of T * E and groups * bins: sort keys of the routing are 63 bits wide
_MAX_DEVICES = 2**12  # a mistaken huge id would ask for as many limits


@dataclass(frozen=True, eq=False)
class Routing:
    """Who computes what. Tensors are on the device of the scores.

    weights: float32 [T, K'], the weights of the experts a token holds; 0 where unused.
    experts: int32 [T, K'], these experts, by descending score (ties: lower expert), unused
        places -1. K' is the most a token can hold: k but in Expanded Drop.
    load_before, load_after: int32 [E], assignments per expert of the top-k, and after the limit,
        of real tokens.
    capacity: the limit. None where no limit is in effect at all. Otherwise, with R the distinct
        request ids of real tokens in ascending order and D the devices 0 ... max(expert_device):

                        level expert    level device
        scope batch     int             int32 [D]
        scope request   int32 [R]       int32 [R, D]

        NO_LIMIT = 2**31 - 1 stands for a request without a limit, so that load <= capacity
        always holds for prompt tokens alone. Decode tokens are never dropped: their load may
        pass the limit.
    dropped: top-k assignments of real tokens that are not held.
    expanded: held assignments that are not in the token's top-k: what Expanded Drop added, or
        what reroute gave back of what was dropped. (In both, the top-k of a decode token is what
        decode keep gave it.)
    left_without: real tokens that hold no expert.
    """

    weights: Tensor
    experts: Tensor
    load_before: Tensor
    load_after: Tensor
    capacity: int | Tensor | None
    dropped: int
    expanded: int
    left_without: int


def route(
    scores: Tensor,
    top_k: int,
    config: CapacityConfig,
    *,
    topk_ids: Tensor | None = None,
    is_padding: Tensor | None = None,
    is_decode: Tensor | None = None,
    request_ids: Tensor | None = None,
    is_image: Tensor | None = None,
    expert_device: Tensor | None = None,
    token_device: Tensor | None = None,
    renormalize: bool = False,
    seed: int = 0,
    backend: str = "auto",
) -> Routing:
    """Capacity-aware routing of the tokens of one step: Token Drop, Expanded Drop, reroute,
    and decode keep.

    The method is that of arXiv 2503.05066, and reroute is this project's; the letters are T
    tokens, E experts, k per token, gamma the capacity factor, C the capacity of an expert, m
    extra candidates.

    Arguments:
        scores: float [T, E], the scores S of all experts. Compared as float32; -0.0 equals 0.0,
            NaN ranks below -inf, and its holder gets it as weight.
        top_k: k, from 1 to E.
        config: what to do. Its `backend` is about the experts and not used here.
        topk_ids: int [T, k], the model's own choice, where it is not the plain top-k of the
            scores (highest first, ties to the lower expert). In [0, E) and distinct in a row;
            rows of padding may hold anything.
        is_padding, is_decode, is_image: bool [T].
        request_ids: int [T], for scope request. Any integers; those of padding are not read.
        expert_device, token_device: int [E] and [T], from 0 to 4095: the device (expert
            parallel rank) of an expert, and of a token. A token may be on a device without experts.
        renormalize: whether the model rescales its top-k weights (config.renormalize "auto").
        seed: for metric random; any integer, taken modulo 2**32.
        backend: "torch" is the reference, "triton" the kernel, "auto" the reference for now.

    Rules:
        - A group is the whole step (scope batch) or one request. T counts its real tokens,
          decode tokens included. C = max(min_capacity, ceil(gamma * T * k / E)); at level device
          max(n_d * min_capacity, ceil(n_d * gamma * T * k / E)) for a device of n_d experts.
          Exact integers, for gamma as written.
        - No limit is in effect with mode off; with gamma inf; in a group of fewer than
          min_tokens real tokens; without a prompt token; and in a group where no load can pass
          it (C >= T; at level device C_d >= T * min(k, n_d) on all devices). Such a group is
          plain top-k in every mode (for decode tokens: what decode keep gives them).
        - Decode tokens hold exactly k experts, their top-k, or with decode_keep (k0) below k, in
          every mode, off too: the k0 best of their top-k; then their best other loaded experts;
          then, where too few are loaded, the rest of their top-k. Loaded is every expert that a
          decode token keeps so, or that is in the top-k of a prompt token. k0 "auto" goes by the
          decode tokens of the step, see `CapacityConfig.keeps`. So a token's experts depend on its
          neighbours, and decode_keep needs scope batch.
        - Decode tokens are seated first; max(0, C - their load) seats of a bin are left for prompt
          tokens. Padding rows hold nothing and count nowhere.
        - Candidates of a prompt token: its top-k; in Expanded Drop also the best m experts
          outside of it, anywhere or on its own device. A bin (expert or device, per group) keeps
          the best of them by metric, then lower token index, then lower expert; a NaN score
          never wins over a number, whatever the metric or the priority. The token index is the
          position among the real tokens of the group. With a priority the tokens that are not
          first to drop are all seated before the others.
        - Reroute: Token Drop first. Then, once, a prompt token that lost l of its bids bids for
          its l best experts outside of its top-k, anywhere or on its own device, whose bins have
          free seats; ties go to the lower expert. A bin gives its free seats to the best of these
          bids, in the same order. So nobody loses a seat, and no token holds more than k.
        - fill "busiest", which "auto" is, in Expanded Drop, and always in reroute (where it only
          matters for devices of different sizes): where a limit is in effect, C is at most the
          largest load that a bin of the group has before it, decode tokens included. So nobody
          waits for longer than without a limit. "capacity": C as it is.
        - Metrics: score, highest first; order, lowest token index first; reverse-order, highest
          first; random, highest draw first, where draw = fmix32(fmix32(fmix32(seed) + index) +
          expert) modulo 2**32 and fmix32 is murmur3's finaliser.
        - max_experts, in Expanded Drop: after the selection a prompt token keeps its best by
          score. Seats that this frees are not refilled. "auto" is k, or none where
          expert_device names more than one device.
        - Weights are the scores of the experts a token holds; renormalised, each over their sum,
          taken in row order in float32; a row whose sum is 0 stays as it is.
        - K' = k but in Expanded Drop, where it is min(E, k + m, max_experts), with m at most
          E - k for global candidates and at most the experts of the largest device for local
          ones. It depends on shapes, devices and configuration only.

    Returns a `Routing`. Raises ValueError, with the argument, what came and what is accepted,
    for everything that does not fit. What an option of the configuration needs (devices, request
    ids, images) is asked for unless the mode is off. The checks read values on the host, so this
    function can't be captured in a CUDA graph; the core can.

    Example, with T = 4, E = 2, k = 1, gamma = 1, so C = ceil(1 * 4 * 1 / 2) = 2. Tokens 0, 1 and
    2 choose expert 0, token 3 expert 1:

        >>> scores = torch.tensor([[.9, .1], [.8, .2], [.7, .3], [.2, .8]])
        >>> drop = CapacityConfig(mode="drop", factor=1.0, min_capacity=1)
        >>> r = route(scores, 1, drop)

    Expert 0 keeps its best two, tokens 0 and 1. Token 2 is left without an expert:

        >>> r.capacity, r.experts.tolist(), r.left_without
        (2, [[0], [0], [-1], [1]], 1)
        >>> r.load_before.tolist(), r.load_after.tolist()
        ([3, 1], [2, 1])

    In Expanded Drop with m = 1 every token is a candidate of both experts. Expert 0 keeps 0 and
    1, expert 1 keeps 3 (score .8) and 2 (score .3). Nobody is left out:

        >>> expanded = CapacityConfig(
        ...     mode="expanded", factor=1.0, min_capacity=1, candidates="global",
        ...     expanded_experts=1)
        >>> r = route(scores, 1, expanded)
        >>> r.experts.tolist(), r.load_after.tolist(), r.dropped, r.expanded
        ([[0], [0], [1], [1]], [2, 2], 1, 1)

    Reroute comes to the same here. Token 2 lost its bid for expert 0, expert 1 has a free seat:

        >>> r = route(scores, 1, CapacityConfig(mode="reroute", factor=1.0, min_capacity=1))
        >>> r.experts.tolist(), r.dropped, r.expanded
        ([[0], [0], [1], [1]], 1, 1)
    """
    T, E = _check_scores(scores)
    if not isinstance(config, CapacityConfig):
        raise ValueError(f"config is a {type(config).__name__}, but it must be a CapacityConfig.")
    top_k, seed = _check_int("top_k", top_k), _check_int("seed", seed)
    if not isinstance(renormalize, bool):
        raise ValueError(f"renormalize is {renormalize!r}, but it must be True or False.")
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k is {top_k}, but it must be from 1 to {E}, the experts of scores.")
    check_beside("topk_ids", topk_ids, INTEGERS, (T, top_k), scores)
    for name, mask in (
        ("is_padding", is_padding),
        ("is_decode", is_decode),
        ("is_image", is_image),
    ):
        check_beside(name, mask, (torch.bool,), (T,), scores)
    check_beside("request_ids", request_ids, INTEGERS, (T,), scores)
    check_beside("expert_device", expert_device, INTEGERS, (E,), scores)
    check_beside("token_device", token_device, INTEGERS, (T,), scores)
    core = _core(backend, scores)

    real = torch.ones(T, dtype=torch.bool, device=scores.device)
    if is_padding is not None:
        real = ~is_padding
    if topk_ids is not None:
        _check_choice(topk_ids[real], E)
    devices = None
    if expert_device is not None:
        _check_devices("expert_device", expert_device)
        devices = expert_device.tolist()
    if token_device is not None:
        _check_devices("token_device", token_device[real])
    if config.mode != "off" and config.scope == "request" and request_ids is None:
        raise ValueError(
            "request_ids is None, but scope (--moe-capacity-scope) 'request' needs the request of "
            "each token."
        )
    if config.mode != "off" and config.priority != "uniform" and is_image is None:
        raise ValueError(
            f"is_image is None, but priority (--moe-capacity-priority) {config.priority!r} needs "
            "to know the image tokens."
        )
    plan = resolve(
        config,
        num_experts=E,
        top_k=top_k,
        expert_device=devices,
        has_token_device=token_device is not None,
        renormalize=renormalize,
    )

    request_T, num_requests = None, 1
    if plan.scope == "request":
        assert request_ids is not None
        present, dense = request_ids[real].long().unique(return_inverse=True)
        request_T = torch.zeros(T, dtype=torch.int64, device=scores.device)
        request_T[real] = dense
        num_requests = max(len(present), 1)  # of no request at all, nothing is asked below
    if max(T * E, num_requests * plan.num_bins) >= _SIZE_LIMIT:
        raise ValueError(
            f"scores has {T} x {E} elements in {num_requests} requests, but T * E and requests * "
            f"experts must be below {_SIZE_LIMIT}."
        )
    selection = core(
        scores,
        plan,
        topk_TK=topk_ids,
        is_padding_T=is_padding,
        is_decode_T=is_decode,
        request_T=request_T,
        num_requests=num_requests,
        is_image_T=is_image,
        device_E=None if expert_device is None else expert_device.long(),
        token_device_T=None if token_device is None else token_device.long(),
        seed=seed,
    )
    return Routing(
        weights=selection.weights,
        experts=selection.experts,
        load_before=selection.load_before,
        load_after=selection.load_after,
        capacity=_capacity(selection, plan),
        dropped=int(selection.dropped),
        expanded=int(selection.expanded),
        left_without=int(selection.left_without),
    )


def _capacity(selection: Selection, plan: Plan) -> int | Tensor | None:
    """The limits [G, X] in the form of `Routing.capacity`."""
    limit_GX = selection.capacity
    if bool((limit_GX == NO_LIMIT).all()):
        return None
    limits = limit_GX if plan.level == "device" else limit_GX[:, 0]
    if plan.scope == "request":
        return limits.contiguous()
    return limits[0] if plan.level == "device" else int(limits[0])


def _core(backend: str, scores: Tensor) -> Callable[..., Selection]:
    """The function that computes: `route_torch`, or the kernel of the same signature."""
    if backend not in _BACKENDS:
        names = ", ".join(_BACKENDS)
        raise ValueError(f"backend is {backend!r}, but it must be one of {names}.")
    if backend != "triton":
        return route_torch
    try:
        from capmoe_kernels.routing import route_triton
    except ImportError as error:
        raise ValueError(
            f"backend is 'triton', but its routing kernel can't be imported ({error}); the others "
            "are auto and torch."
        ) from error
    return route_triton


# --- Checks: each raises ValueError with the argument, what came, and what is accepted ----------


def _check_scores(scores: Tensor) -> tuple[int, int]:
    check_tensor("scores", scores, dtypes=FLOATS, shape=("T", "E"))
    if scores.shape[1] < 1:
        raise ValueError(f"scores has the shape {list(scores.shape)}, but E must be at least 1.")
    return scores.shape[0], scores.shape[1]


def _check_int(name: str, value: SupportsIndex) -> int:
    """The value as an int; a bool is none."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}, but it must be an int.") from None


def _check_devices(name: str, devices: Tensor) -> None:
    if not devices.numel():
        return
    for device in (int(devices.min()), int(devices.max())):
        if not 0 <= device < _MAX_DEVICES:
            raise ValueError(
                f"{name} has the device {device}, but it must be from 0 to {_MAX_DEVICES - 1}."
            )


def _check_choice(topk: Tensor, num_experts: int) -> None:
    """topk: int [real tokens, k]."""
    if not topk.numel():
        return
    for expert in (int(topk.min()), int(topk.max())):
        if not 0 <= expert < num_experts:
            raise ValueError(
                f"topk_ids has the expert {expert}, but it must be from 0 to {num_experts - 1}."
            )
    ordered = topk.long().sort(dim=1).values
    same = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    if bool(same.any()):
        row = topk[same][0].tolist()
        raise ValueError(f"topk_ids has the row {row}, but its {len(row)} experts must differ.")
