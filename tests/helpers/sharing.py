"""Decode keep, as far as the records of a layer's steps tell: whose rows hold what they should."""

from typing import Any

Step = dict[str, Any]


def real_rows(step: Step) -> list[int]:
    return [row for row, padding in enumerate(step["is_padding"]) if not padding]


def asked_load(step: Step) -> list[int]:
    """Assignments before capacity, by expert: what decode tokens hold, and prompts' choices."""
    load = [0] * len(step["load_after"])
    for row in real_rows(step):
        for expert in step["experts" if step["is_decode"][row] else "topk"][row]:
            if expert >= 0:
                load[expert] += 1
    return load


def check_shared(step: Step, keep: int) -> int:
    """Hold a step's decode rows to the rule with `keep` < k, and count those it changed.

    A row has exactly k experts: its best `keep`, then others that are loaded, and where too few
    are, all of them and more of its own.
    """
    loaded: set[int] = set()
    for row in real_rows(step):
        choice = step["topk"][row]
        loaded.update(choice[:keep] if step["is_decode"][row] else choice)
    changed = 0
    for row in real_rows(step):
        if not step["is_decode"][row]:
            continue
        choice, held = step["topk"][row], set(step["experts"][row]) - {-1}
        assert len(held) == len(choice) and set(choice[:keep]) <= held
        others, pool = held - set(choice[:keep]), loaded - set(choice[:keep])
        assert others <= pool or pool <= others <= pool | set(choice)
        changed += held != set(choice)
    return changed


def active(loads: list[int]) -> int:
    """Experts that have something to do."""
    return sum(load > 0 for load in loads)
