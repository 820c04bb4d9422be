"""Compares the results of two engines that should agree, see tests/e2e/run_engine.py."""

from typing import Any

import pytest

LOGPROB_TOLERANCE = 2e-3  # float32, another order of sums; measured differences are below 1e-4


def assert_same(stock: dict[str, Any], ours: dict[str, Any]) -> None:
    """Equal log-probabilities, and equal greedy tokens while the margin exceeds the tolerance."""
    for one, other in zip(stock["batches"][0], ours["batches"][0], strict=True):
        assert one["prompt_logprobs"] == pytest.approx(
            other["prompt_logprobs"], abs=LOGPROB_TOLERANCE
        )
        for position, top in enumerate(one["top"]):
            assert top[0][0] == pytest.approx(other["top"][position][0][0], abs=LOGPROB_TOLERANCE)
            if top[0][0] - top[1][0] <= 2 * LOGPROB_TOLERANCE:
                break  # a tie: from here the texts may differ
            assert one["token_ids"][position] == other["token_ids"][position]


def differences(stock: dict[str, Any], ours: dict[str, Any]) -> list[float]:
    """By how much the log-probability of each prompt token differs."""
    return [
        abs(a - b)
        for one, other in zip(stock["batches"][0], ours["batches"][0], strict=True)
        for a, b in zip(one["prompt_logprobs"], other["prompt_logprobs"], strict=True)
    ]


def difference(stock: dict[str, Any], ours: dict[str, Any]) -> float:
    """The largest difference of a prompt token's log-probability."""
    return max(differences(stock, ours))
