"""From a configuration to what the routing of one layer does: every `auto` is settled here.

Standard library only. The letters are those of `torch_routing.py`.
"""

from collections.abc import Sequence

from capmoe_kernels.contract import Plan
from vllm_capmoe.config import CapacityConfig

__all__ = ["Plan", "resolve"]


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
