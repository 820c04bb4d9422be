"""Whatever is given: a configuration that holds together, or one clear sentence. No engine."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from fuzzing import accepted_value, is_json, refusal, settings, spoiled, value

from vllm_capmoe import CapacityConfig
from vllm_capmoe.config import OPTIONS
from vllm_capmoe.live import KEYS, Live
from vllm_capmoe.plan import resolve

CASES = 20_000


def test_settings_in_additional_config() -> None:
    rng, accepted = random.Random(1), 0
    for _ in range(CASES):
        given = settings(rng)
        if refusal(lambda given=given: CapacityConfig.from_dict(given)) is not None:
            continue
        accepted += 1
        config = CapacityConfig.from_dict(given)
        as_json = config.to_dict()
        assert is_json(as_json) and CapacityConfig.from_dict(as_json) == config
        for layer in (0, 2, 7, 10**6):
            own = config.for_layer(layer)
            refusal(
                lambda own=own: resolve(
                    own, num_experts=8, top_k=2, expert_device=[0, 1] * 4, has_token_device=True
                )
            )
    assert CASES / 3 < accepted < CASES * 0.95


@pytest.mark.parametrize("junk", [None, [], "drop", 3, {3: 4}, {None: 1}, {"mode": object()}])
def test_what_is_no_dict_of_settings(junk: object) -> None:
    assert refusal(lambda: CapacityConfig.from_dict(junk)) is not None  # type: ignore[arg-type]


def test_texts_of_a_command_line() -> None:
    rng, accepted = random.Random(2), 0
    for _ in range(CASES):
        option = rng.choice(OPTIONS)
        good = rng.random() < 0.5
        given = accepted_value(rng, option.key) if good else value(rng)
        text = given if isinstance(given, str) else json.dumps(given)
        text = spoiled(rng, text) if rng.random() < 0.3 else text
        accepted += refusal(lambda option=option, text=text: option.parse(text)) is None
    assert CASES / 5 < accepted < CASES * 0.8


def test_changes_while_serving() -> None:
    rng, accepted = random.Random(3), 0
    for _ in range(CASES):
        try:
            started = CapacityConfig.from_dict(settings(rng))
        except ValueError:
            continue
        live = Live.of(started)
        for _ in range(3):
            keys = rng.sample(KEYS, rng.randrange(1, 4))
            change = {
                key: value(rng)
                if rng.random() < 0.2
                else rng.choice(["off", "on", started.mode])
                if key == "mode"
                else accepted_value(rng, key)
                for key in keys
            }
            given = value(rng) if rng.random() < 0.05 else change
            if refusal(lambda live=live, given=given: live.changed(given)) is not None:
                continue
            accepted += 1
            live = live.changed(given)
            assert is_json(live.to_dict()) and live.changed(live.to_dict()) == live
            assert live.started is started
            for layer in (0, 2, 7):
                own = live.for_layer(layer)
                assert own.mode == started.for_layer(layer).mode
                assert live.is_on or (own.gamma is None and own.decode_keep == "off")
    assert CASES / 10 < accepted < CASES


def test_files_of_settings_by_layer(tmp_path: Path) -> None:
    rng, accepted = random.Random(4), 0
    file = tmp_path / "layers.json"
    for _ in range(CASES // 4):
        text = json.dumps(accepted_value(rng, "layers") | accepted_value(rng, "layers"))
        text = spoiled(rng, text) if rng.random() < 0.7 else text
        file.write_bytes(text.encode() + rng.choice([b"", b"", b"", b"\xff", b"\x00"]))
        accepted += refusal(lambda: CapacityConfig(layers=f"@{file}")) is None
    assert CASES / 100 < accepted < CASES / 4


@pytest.mark.parametrize("text", ["[" * 100_000, '{"0":' * 100_000, '{"0": ' + "9" * 10_000 + "}"])
def test_deep_and_long_json_is_refused_too(text: str) -> None:
    said = refusal(lambda: CapacityConfig(layers=text))
    assert said is not None and said.startswith("--moe-capacity-layers can't be used")
