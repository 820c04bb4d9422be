"""From a configuration to what the routing of one layer does: every `auto` is settled here.

Standard library only. The letters are those of `reference.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from vllm_capmoe.config import CapacityConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A configuration resolved for one layer: no `auto` is left, and all numbers fit together.

    `resolve` builds and validates it. Nothing here depends on a step.

    mode: "off", "drop", "expanded" or "reroute". num_experts: E. top_k: k.
    gamma: exact, None for infinite.
    metric, level, scope, priority: the words of the configuration.
    local: extra candidates are on the token's own device only.
    extra: m, already cut to what there can be; in reroute the most experts that a token can be
        given; 0 in the other modes.
    busiest: no limit is above the largest load before it.
    max_experts: the most experts of one token, or None.
    renormalize: rescale the kept weights to sum to one.
    bin_sizes: experts per bin: (1,) at level expert, (n_0, ..., n_{D-1}) at level device.
    keeps: k0, the experts that decode keep leaves to each decode token, in a step of 0, 1, ...
        decode tokens; the last one for all larger steps. () where it is off, or k0 is always k.
    """

    mode: str
    num_experts: int
    top_k: int
    gamma: Fraction | None = None
    metric: str = "score"
    level: str = "expert"
    scope: str = "batch"
    priority: str = "uniform"
    min_capacity: int = 1
    min_tokens: int = 0
    local: bool = False
    extra: int = 0
    busiest: bool = False
    max_experts: int | None = None
    renormalize: bool = False
    bin_sizes: tuple[int, ...] = (1,)
    keeps: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """W, the columns of the result: the most experts a token can hold."""
        width = self.top_k + self.extra
        return width if self.max_experts is None else min(width, self.max_experts)

    @property
    def acts(self) -> bool:
        """Whether a token may hold others than its top-k."""
        return self.mode != "off" or self.keeps != ()

    @property
    def num_bins(self) -> int:
        """B, the bins of one group."""
        return self.num_experts if self.level == "expert" else len(self.bin_sizes)


def resolve(
    config: CapacityConfig,
    *,
    num_experts: int,
    top_k: int,
    expert_device: Sequence[int] | None = None,
    has_token_device: bool = False,
    renormalize: bool = False,
) -> Plan:
    """Settle what a configuration leaves open for a layer of E experts, k per token.

    expert_device: the device (expert parallel rank) of each expert, or None where there is none.
    More than one device among them means expert parallelism.
    has_token_device: each token has an owner, so candidates `auto` are local.
    renormalize: the model's own rule, which `auto` follows.

    Defaults: m is all experts of the token's device for local candidates and k for global ones;
    max_experts is none under expert parallelism and k without it; fill is busiest. m is cut to
    what there can be: the E - k experts outside of the top-k, and the experts of the largest
    device. Reroute has m = k, max_experts k and fill busiest, whatever these are set to.

    Raises ValueError where the configuration needs a device map that is not given, for
    max_experts below k, and for decode_keep above k. Mode off needs no devices.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, but it must be from 1 to {num_experts}, the experts.")
    if expert_device is not None and len(expert_device) != num_experts:
        raise ValueError(
            f"expert_device has {len(expert_device)} entries, but the layer has {num_experts} "
            "experts."
        )
    keeps = config.keeps(top_k)
    if config.mode == "off":
        return Plan(
            mode="off",
            num_experts=num_experts,
            top_k=top_k,
            renormalize=_renormalizes(config, renormalize),
            keeps=keeps,
        )
    sizes = _device_sizes(expert_device)
    _refuse_missing_devices(config, expert_device is not None, has_token_device)
    if isinstance(config.max_experts, int) and config.max_experts < top_k:
        raise ValueError(
            f"max_experts (--moe-capacity-max-experts) is {config.max_experts}, but it must be at "
            f"least top_k, which is {top_k}."
        )

    extra, max_experts, local, busiest = 0, None, False, False
    if config.mode in ("expanded", "reroute"):
        auto_local = config.candidates == "auto" and has_token_device
        local = config.candidates == "local" or auto_local
        wanted = top_k
        if config.mode == "expanded" and isinstance(config.expanded_experts, int):
            wanted = config.expanded_experts
        elif config.mode == "expanded" and (local or config.expanded_experts == "all"):
            wanted = num_experts
        extra = min(wanted, num_experts - top_k, max(sizes) if local else num_experts)
        busiest = config.mode == "reroute" or config.fill != "capacity"
        if config.mode == "reroute":
            max_experts = top_k
        elif isinstance(config.max_experts, int):
            max_experts = config.max_experts
        elif config.max_experts == "auto" and sum(size > 0 for size in sizes) <= 1:
            max_experts = top_k
    return Plan(
        mode=config.mode,
        num_experts=num_experts,
        top_k=top_k,
        gamma=config.gamma,
        metric=config.metric,
        level=config.level,
        scope=config.scope,
        priority=config.priority,
        min_capacity=config.min_capacity,
        min_tokens=config.min_tokens,
        local=local,
        extra=extra,
        busiest=busiest,
        max_experts=max_experts,
        renormalize=_renormalizes(config, renormalize),
        bin_sizes=sizes if config.level == "device" else (1,),
        keeps=keeps,
    )


def _renormalizes(config: CapacityConfig, model_does: bool) -> bool:
    return config.renormalize == "always" or (config.renormalize == "auto" and model_does)


def _device_sizes(expert_device: Sequence[int] | None) -> tuple[int, ...]:
    """n_d, the experts on each of the devices 0 ... max(expert_device); () without a map."""
    if expert_device is None:
        return ()
    sizes = [0] * (max(expert_device) + 1)
    for device in expert_device:
        sizes[device] += 1
    return tuple(sizes)


def _refuse_missing_devices(
    config: CapacityConfig, has_expert_device: bool, has_token_device: bool
) -> None:
    if config.level == "device" and not has_expert_device:
        raise ValueError(
            "expert_device is None, but level (--moe-capacity-level) 'device' needs the device of "
            "each expert."
        )
    if has_token_device and not has_expert_device:
        raise ValueError("expert_device is None, but token_device is given, which needs it.")
    if config.candidates == "local" and not (has_expert_device and has_token_device):
        missing = "token_device" if has_expert_device else "expert_device"
        raise ValueError(
            f"{missing} is None, but candidates (--moe-capacity-candidates) 'local' needs the "
            "device of each expert and of each token."
        )
