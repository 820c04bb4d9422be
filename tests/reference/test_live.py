"""What may change while an engine serves, and the sentences that say what may not."""

from __future__ import annotations

import doctest
from typing import Any

import pytest

import vllm_capmoe.live
from vllm_capmoe import CapacityConfig
from vllm_capmoe.config import ConfigError
from vllm_capmoe.live import Live, differences


def test_the_examples_are_right() -> None:
    result = doctest.testmod(vllm_capmoe.live)
    assert result.attempted > 2 and not result.failed


@pytest.mark.parametrize(
    ("started", "values", "sentence"),
    [
        ({"mode": "drop"}, {"mode": "reroute"}, "mode is 'reroute', but .* started with 'drop'"),
        ({"mode": "drop"}, {"mode": None}, "mode is None, but .*: 'drop' or 'off' is accepted"),
        ({"decode_keep": 2}, {"mode": "drop"}, "started with 'off': 'on' or 'off' is accepted"),
        ({"mode": "drop"}, {"factor": -1}, "--moe-capacity-factor is -1, but it must be a number"),
        ({"mode": "drop", "factor": "inf"}, {"factor": 2}, "factor is 2, but .* with 'inf': only"),
        ({"decode_keep": 2}, {"factor": 2}, "factor is 2, but .* mode 'off' in every layer"),
        ({"mode": "drop"}, {"decode_keep": 2}, "decode_keep is 2, but .* with 'off': 'off' is acc"),
        ({"decode_keep": 2}, {"decode_keep": "auto"}, "'auto', but .* with 2: an integer from 1"),
        ({"mode": "drop", "observe": True}, {"observe": False}, "observe is False, but .* restart"),
        (
            {"mode": "drop"},
            {"level": "device"},
            "has 'level', but mode, factor, .* needs a restart",
        ),
        ({"mode": "drop"}, ["off"], r"the change is \['off'\], but an object with some of mode, "),
    ],
)
def test_what_is_not_accepted_is_one_sentence(
    started: dict[str, Any], values: Any, sentence: str
) -> None:
    live = Live.of(CapacityConfig(**started))
    with pytest.raises(ConfigError, match=sentence) as error:
        live.changed(values)
    assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


def test_what_is_in_effect_already_is_accepted() -> None:
    """So what was read can be sent back whole."""
    for started in (
        {"mode": "drop", "factor": "inf"},
        {"decode_keep": 2},
        {"mode": "expanded", "observe": True, "decode_keep": "auto"},
        {"layers": {"3": {"mode": "drop"}}},
    ):
        live = Live.of(CapacityConfig(**started))
        assert live.changed(live.to_dict()) == live


def test_off_and_on_again_keeps_what_changed_in_between() -> None:
    live = Live.of(CapacityConfig(mode="drop", decode_keep="auto"))
    off = live.changed({"mode": "off", "factor": 2})
    assert off.for_layer(0).gamma is None and off.for_layer(0).decode_keep == "off"
    on = off.changed({"mode": "on", "decode_keep": 3})
    assert on.for_layer(0).factor == 2 and on.for_layer(0).decode_keep == 3
    told = "mode off -> drop, decode_keep auto -> 3"
    assert differences(off.to_dict(), on.to_dict()) == told
