"""A real language model on two ranks, under a limit: it still knows what it knew."""

from pathlib import Path

import pytest
from clusters import TENSOR_PARALLEL

pytestmark = [pytest.mark.engine, pytest.mark.cpu]

COUNTRIES = "The capital of France is Paris. The capital of Spain is Madrid. "


def test_two_ranks_answer_in_english_under_a_limit(run_ranks, padded_carved_model: Path):
    result = run_ranks(
        [
            {"prompt": "The capital of Italy is", "max_tokens": 2},
            {"prompt": COUNTRIES + "The capital of Italy is", "max_tokens": 2},
            {"prompt": "The author of Romeo and Juliet is William", "max_tokens": 2},
        ],
        record="loads",
        model=str(padded_carved_model),
        moe_capacity_mode="expanded",
        moe_capacity_factor=1.0,
        **TENSOR_PARALLEL,
    )
    answers = [output["text"].split()[0].strip(".,") for output in result["batches"][0]]
    assert answers == ["Rome", "Rome", "Shakespeare"]
    (one, other) = result["records"][0]
    assert [step["digest"] for step in one] == [step["digest"] for step in other]
    counters = result["counters"][0][0]
    assert len(counters) == 16 and all(layer["dropped"] for layer in counters)
