"""Layouts of ranks that can't give what a mode asks for are refused at start-up, with the reason.

The settings are put on a finished configuration, since vLLM's CPU platform accepts few of them.
"""

from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

import vllm_capmoe
from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration import checks

vllm_capmoe.register()

DP_EP = {"data_parallel_size": 2, "enable_expert_parallel": True}
TP_EP = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
EPLB = {**TP_EP, "enable_eplb": True}


def check(model: Path, layout: dict[str, Any], redundant: int = 0, **settings: Any) -> None:
    config = EngineArgs(model=str(model), max_model_len=128).create_engine_config()
    for name, value in layout.items():
        setattr(config.parallel_config, name, value)
    config.parallel_config.eplb_config.num_redundant_experts = redundant
    checks.check_engine(CapacityConfig(**settings), config)


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        (TP_EP, {"candidates": "local"}, "candidates is 'local', but no token belongs to one rank"),
        (
            {"data_parallel_size": 2},
            {"candidates": "local"},
            "candidates is 'local', but no token belongs to one rank here",
        ),
        (
            {**EPLB, **DP_EP},
            {"candidates": "local"},
            "candidates is 'local', but --enable-eplb moves experts between ranks",
        ),
        (EPLB, {"level": "device"}, "level is 'device', but --enable-eplb moves experts between"),
        (
            EPLB,
            {"redundant": 3},
            r"num_redundant_experts is 3, but 8 \+ 3 experts don't fit 2 ranks evenly",
        ),
        (
            {**DP_EP, "all2all_backend": "deepep_high_throughput"},
            {},
            "'expanded', but the buffers of --all2all-backend 'deepep_high_throughput' hold the 2",
        ),
        (
            {**DP_EP, "all2all_backend": "deepep_low_latency"},
            {"mode": "drop"},
            "'drop', but --all2all-backend 'deepep_low_latency' hands out rows in batches of a fix",
        ),
        (
            {**DP_EP, "all2all_backend": "mori_high_throughput"},
            {"mode": "drop"},
            "'drop', but --all2all-backend 'mori_high_throughput' isn't known to skip dropped",
        ),
        ({**TP_EP, "enable_elastic_ep": True}, {}, "--enable-elastic-ep is True: False is accep"),
    ],
)
def test_refused(example_model, layout, settings, message):
    with pytest.raises(ValueError, match=message):
        check(example_model, layout, **{"mode": "expanded", **settings})


@pytest.mark.parametrize(
    ("layout", "settings"),
    [
        (TP_EP, {"level": "device"}),
        (DP_EP, {"candidates": "local", "level": "device"}),
        ({**DP_EP, "enable_eplb": True}, {"redundant": 2}),
        ({**DP_EP, "all2all_backend": "deepep_high_throughput"}, {"mode": "drop"}),
        ({**DP_EP, "all2all_backend": "deepep_high_throughput"}, {"max_experts": 2}),
        # Nothing goes through it.
        ({**TP_EP, "all2all_backend": "mori_high_throughput"}, {}),
        ({"data_parallel_size": 2, "all2all_backend": "mori_high_throughput"}, {}),
    ],
)
def test_served(example_model, layout, settings):
    check(example_model, layout, **{"mode": "expanded", **settings})
