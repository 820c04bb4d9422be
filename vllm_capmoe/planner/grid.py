"""What a plan tries: limits for prompts, and how few of its own experts a decode token may keep."""

from dataclasses import dataclass, replace

from vllm_capmoe.config import CapacityConfig

FACTORS = (3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5)
MODES = ("reroute", "drop", "expanded")


@dataclass(frozen=True)
class Trial:
    """One setting that is tried on every step. name: its key in the results, such as "drop 1.5"."""

    name: str
    config: CapacityConfig


def trials(base: CapacityConfig, top_k: int) -> list[Trial]:
    """All of them: each mode at each factor, then decode keep from 1 to k - 1.

    base: what they have in common (metric, level, scope and so on).
    """
    base = replace(base, layers=(), observe=False, decode_keep="off")
    limits = [
        Trial(f"{mode} {factor:g}", replace(base, mode=mode, factor=factor))
        for mode in MODES
        for factor in FACTORS
    ]
    keeps = [
        Trial(f"keep {keep}", replace(base, mode="off", scope="batch", decode_keep=keep))
        for keep in range(1, top_k)
    ]
    return limits + keeps
