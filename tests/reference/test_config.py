"""CapacityConfig: every accepted value, every refusal, and what importing the package needs."""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from vllm_capmoe.config import OPTIONS, CapacityConfig

DEFAULTS = {
    "mode": "off",
    "factor": 1.5,
    "metric": "score",
    "level": "expert",
    "scope": "batch",
    "candidates": "auto",
    "expanded_experts": None,
    "fill": "auto",
    "max_experts": "auto",
    "renormalize": "auto",
    "priority": "uniform",
    "min_capacity": 4,
    "min_tokens": 0,
    "backend": "auto",
    "layers": {},
    "decode_keep": "off",
    "observe": False,
}

ACCEPTED = [
    *[("mode", value) for value in ("off", "drop", "expanded", "reroute")],
    *[("factor", value) for value in (1, 2, 0.001, 1.5, 1e300, math.inf)],
    *[("metric", value) for value in ("score", "order", "reverse-order", "random")],
    *[("level", value) for value in ("expert", "device")],
    *[("scope", value) for value in ("batch", "request")],
    *[("candidates", value) for value in ("auto", "local", "global")],
    *[("expanded_experts", value) for value in (None, 1, 64, "all")],
    *[("fill", value) for value in ("auto", "busiest", "capacity")],
    *[("max_experts", value) for value in (1, 64, "none", "auto")],
    *[("renormalize", value) for value in ("auto", "always", "never")],
    *[("priority", value) for value in ("uniform", "image-first", "text-first")],
    *[("min_capacity", value) for value in (1, 4, 1000)],
    *[("min_tokens", value) for value in (0, 1, 1000)],
    *[("backend", value) for value in ("auto", "triton", "torch", "vllm")],
    *[("observe", value) for value in (True, False)],
    *[("decode_keep", value) for value in ("off", "auto", 1, 4)],
]

WORDS = ("mode", "metric", "level", "scope", "candidates", "fill", "renormalize", "priority")
WORDS += ("backend",)
REFUSED = [
    *[(key, value) for key in WORDS for value in ("other", "", "OFF", None, True, 1, 1.0)],
    *[(key, False) for key in WORDS if key != "mode"],
    *[("factor", value) for value in (0, 0.0, -1, -0.5, -math.inf, math.nan, True, False)],
    *[("factor", value) for value in (None, "1.5", "nan", "infinity", "Inf", [1.5])],
    *[("expanded_experts", value) for value in (0, -1, 1.0, True, "none", "2", "", [1])],
    *[("max_experts", value) for value in (0, -1, 1.0, True, False, None, "all", "2", "")],
    *[("min_capacity", value) for value in (0, -1, 4.0, True, None, "4", "auto")],
    *[("min_tokens", value) for value in (-1, 0.0, False, None, "0", "auto")],
    *[("observe", value) for value in (None, 0, 1, "true", "on")],
    *[("decode_keep", value) for value in (0, -1, 4.0, True, None, "4", "all", "")],
]


def test_defaults_are_those_of_the_design() -> None:
    assert CapacityConfig().to_dict() == DEFAULTS
    assert not CapacityConfig().enabled


@pytest.mark.parametrize(("key", "value"), ACCEPTED)
def test_accepts(key: str, value: object) -> None:
    config = CapacityConfig(**{key: value})
    assert getattr(config, key) == value
    assert CapacityConfig.from_dict({key: value}) == config


def test_the_word_off_survives_yaml() -> None:
    """YAML 1.1 reads `mode: off` as false."""
    assert CapacityConfig.from_dict({"mode": False}) == CapacityConfig(mode="off")
    assert CapacityConfig.from_dict({"decode_keep": False}) == CapacityConfig(decode_keep="off")


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_refuses_with_flag_value_and_what_is_accepted(key: str, value: object) -> None:
    option = next(option for option in OPTIONS if option.key == key)
    for build in (CapacityConfig, lambda **values: CapacityConfig.from_dict(values)):
        with pytest.raises(ValueError) as error:
            build(**{key: value})
        message = str(error.value)
        assert "--moe-capacity-" + key.replace("_", "-") in message
        assert repr(value) in message
        assert option.values in message
        assert message.count(".") - repr(value).count(".") == 1  # one sentence


def test_is_frozen_and_keyword_only() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        CapacityConfig().mode = "drop"  # type: ignore[misc]
    with pytest.raises(TypeError):
        CapacityConfig("drop")  # type: ignore[misc]


def test_texts_that_stand_for_values() -> None:
    assert CapacityConfig(factor="inf").factor == math.inf
    assert CapacityConfig(expanded_experts="auto").expanded_experts is None
    assert CapacityConfig(factor="inf") == CapacityConfig(factor=math.inf)


@pytest.mark.parametrize(
    ("factor", "gamma"),
    [
        (1, Fraction(1)),
        (1.5, Fraction(3, 2)),
        (1.1, Fraction(11, 10)),
        (0.1, Fraction(1, 10)),
        (1e-3, Fraction(1, 1000)),
        (1e22, Fraction(10**22)),
        (10**30, Fraction(10**30)),
        # The sum is another float than 0.3, and is taken as it is written.
        (0.1 + 0.2, Fraction("0.30000000000000004")),
        (1 / 3, Fraction("0.3333333333333333")),
        (math.inf, None),
        ("inf", None),
    ],
)
def test_gamma_is_exact_as_written(factor: float | str, gamma: Fraction | None) -> None:
    assert CapacityConfig(factor=factor).gamma == gamma


def test_gamma_of_a_float_subclass_with_another_repr() -> None:
    class Named(float):
        def __repr__(self) -> str:
            return f"Named({float(self)})"

    assert CapacityConfig(factor=Named(1.1)).gamma == Fraction(11, 10)


@pytest.mark.parametrize("mode", ["drop", "expanded", "reroute"])
def test_enabled(mode: str) -> None:
    assert CapacityConfig(mode=mode).enabled


@pytest.mark.parametrize("keep", ["auto", 1])
def test_decode_keep_alone_is_enabled_and_needs_scope_batch(keep: int | str) -> None:
    assert CapacityConfig(decode_keep=keep).enabled
    for mode in ("off", "drop"):
        with pytest.raises(ValueError, match=r"decode-keep is .* but .*scope is 'request'"):
            CapacityConfig(mode=mode, decode_keep=keep, scope="request")


def test_what_decode_keep_leaves_to_a_token() -> None:
    assert CapacityConfig().keeps(8) == ()
    assert CapacityConfig(decode_keep=8).keeps(8) == ()  # all, which is off
    assert CapacityConfig(decode_keep=5).keeps(8) == (5,)
    for k, few, some, many in ((8, 7, 6, 5), (6, 6, 5, 4), (4, 4, 3, 3)):
        assert CapacityConfig(decode_keep="auto").keeps(k) == (*[few] * 8, *[some] * 8, many)
    for k in (1, 2):
        assert CapacityConfig(decode_keep="auto").keeps(k) == ()  # ⅝ of two are two
    with pytest.raises(ValueError, match="decode-keep is 9, but a token has 8 experts"):
        CapacityConfig(decode_keep=9).keeps(8)


@pytest.mark.parametrize(("key", "value"), ACCEPTED)
def test_json_round_trip(key: str, value: object) -> None:
    config = CapacityConfig(**{key: value})
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert CapacityConfig.from_dict(json.loads(text)) == config
    assert hash(CapacityConfig.from_dict(json.loads(text))) == hash(config)


def test_infinite_factor_is_text_in_json() -> None:
    assert CapacityConfig(factor=math.inf).to_dict()["factor"] == "inf"


def test_unknown_key_is_named_with_the_accepted_ones() -> None:
    with pytest.raises(ValueError) as error:
        CapacityConfig.from_dict({"mode": "drop", "capacity_factor": 1.0})
    assert "'capacity_factor'" in str(error.value)
    for key in DEFAULTS:
        assert key in str(error.value)


@pytest.mark.parametrize("values", [None, "drop", ["mode"], 1])
def test_from_dict_of_something_else(values: object) -> None:
    with pytest.raises(ValueError, match="moe_capacity is .*must be a mapping") as error:
        CapacityConfig.from_dict(values)  # type: ignore[arg-type]
    assert repr(values) in str(error.value)


def test_the_table_has_a_row_for_each_field_in_order() -> None:
    assert [option.key for option in OPTIONS] == list(DEFAULTS)
    for option in OPTIONS:
        assert option.flag == "--moe-capacity-" + option.key.replace("_", "-")
        assert option.default == option.check(DEFAULTS[option.key])
        assert option.help and option.values
        for choice in option.choices or ():
            assert option.parse(choice) == choice


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("mode", "drop", "drop"),
        ("factor", "1.1", 1.1),
        ("factor", "2", 2),
        ("factor", "inf", math.inf),
        ("factor", "1e-3", 0.001),
        ("expanded_experts", "8", 8),
        ("expanded_experts", "all", "all"),
        ("expanded_experts", "auto", None),
        ("max_experts", "2", 2),
        ("max_experts", "none", "none"),
        ("min_capacity", "1", 1),
        ("min_tokens", "0", 0),
        ("decode_keep", "4", 4),
        ("decode_keep", "auto", "auto"),
        ("decode_keep", "off", "off"),
    ],
)
def test_parse(key: str, text: str, value: object) -> None:
    option = next(option for option in OPTIONS if option.key == key)
    assert option.parse(text) == value


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("mode", "on"),
        ("factor", "0"),
        ("factor", "-1"),
        ("factor", "nan"),
        ("factor", "-inf"),
        ("factor", "infinity"),
        ("factor", "many"),
        ("factor", ""),
        ("expanded_experts", "0"),
        ("expanded_experts", "1.5"),
        ("expanded_experts", "None"),
        ("max_experts", "all"),
        ("min_capacity", "0"),
        ("min_tokens", "-1"),
    ],
)
def test_parse_refuses(key: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    option = next(option for option in OPTIONS if option.key == key)
    with pytest.raises(ValueError) as error:
        option.parse(text)
    assert option.flag in str(error.value)
    assert repr(text) in str(error.value)

    # argparse shows the whole sentence, and not only "invalid value".
    parser = argparse.ArgumentParser()
    parser.add_argument(option.flag, type=option.parse, default=option.default, help=option.help)
    with pytest.raises(SystemExit):
        parser.parse_args([f"{option.flag}={text}"])
    assert option.values in " ".join(capsys.readouterr().err.split())


BY_LAYER = {
    "17": {"factor": 1.2},
    "0-3": {"mode": "off"},
    "5": {"factor": "inf", "metric": "order"},
}


def test_settings_by_layer_go_over_the_general_ones(tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    file.write_text(json.dumps(BY_LAYER))
    config = CapacityConfig(mode="drop", factor=2, layers=BY_LAYER)
    assert config == CapacityConfig(mode="drop", factor=2, layers=json.dumps(BY_LAYER))
    assert config == CapacityConfig(mode="drop", factor=2, layers=f"@{file}")
    assert config == CapacityConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert config.to_dict()["layers"] == BY_LAYER

    general = CapacityConfig(mode="drop", factor=2)
    own = {
        **dict.fromkeys(range(4), dataclasses.replace(general, mode="off")),
        5: dataclasses.replace(general, factor=math.inf, metric="order"),
        17: dataclasses.replace(general, factor=1.2),
    }
    for layer in range(20):
        assert config.for_layer(layer) == own.get(layer, general)
    assert set(config.variants) == {general, *own.values()}


def test_one_layer_is_enough_to_be_enabled() -> None:
    assert CapacityConfig(layers={"3": {"mode": "drop"}}).enabled
    own = CapacityConfig(layers={"3": {"mode": "drop"}, "5": {"decode_keep": 1}})
    assert own.asked == "--moe-capacity-layers names the layers '3', '5'" and own.drops
    assert CapacityConfig(mode="drop", layers=own.layers).asked == "--moe-capacity-mode is 'drop'"
    assert not CapacityConfig(decode_keep=1).drops
    assert not CapacityConfig(mode="drop", observe=True).drops
    assert not CapacityConfig(layers={"3": {"factor": 1}}).enabled
    assert not CapacityConfig(observe=True).enabled


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1], r"is \[1\], but a JSON object"),
        (17, "is 17, but a JSON object"),
        ("", "isn't JSON"),
        ('{"0": {"mode": "off"}', r"isn't JSON \(line 1\)"),
        ("[" * 100_000, "isn't JSON"),
        ("@nowhere.json", "'nowhere.json' can't be read .No such file"),
        ({"": {"mode": "off"}}, "names the layers ''"),
        ({"3-1": {"mode": "off"}}, "names the layers '3-1'"),
        ({"-1": {"mode": "off"}}, "names the layers '-1'"),
        ({3: {"mode": "off"}}, "names the layers 3"),
        ({"0-3": {"mode": "off"}, "3": {"mode": "drop"}}, "'0-3' and '3' both name layer 3"),
        ('{"3": {"mode": "off"}, "3": {"mode": "drop"}}', "'3' stands in it twice"),
        ({"3": {}}, "layer '3' has {}"),
        ({"3": "off"}, "layer '3' has 'off'"),
        ({"3": {"gamma": 1}}, "the setting 'gamma', but mode, factor"),
        ({"3": {"scope": "request"}}, "the setting 'scope'"),
        ({"3": {"layers": {}}}, "the setting 'layers'"),
        ({"3": {"factor": [1]}}, r"has \[1\] as factor"),
        ({"3": {"factor": 0}}, "layer '3': --moe-capacity-factor is 0, but it must be a number"),
    ],
)
def test_settings_by_layer_refuse(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        CapacityConfig(layers=value)
    assert str(error.value).startswith("--moe-capacity-layers")
    assert ", but " in str(error.value)


def test_importing_the_package_needs_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, vllm_capmoe\n"
        "assert isinstance(vllm_capmoe.__version__, str)\n"
        "assert {'CapacityConfig', 'route', 'Routing', 'register'} <= set(dir(vllm_capmoe))\n"
        "assert vllm_capmoe.CapacityConfig().mode == 'off'\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "assert not loaded & {'torch', 'vllm', 'triton', 'numpy'}, loaded\n"
        "assert vllm_capmoe.route.__module__ == 'vllm_capmoe.ops'\n"
        "assert vllm_capmoe.Routing.__module__ == 'vllm_capmoe.ops'\n"
        "assert 'vllm' not in {name.split('.')[0] for name in sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_such_attribute() -> None:
    import vllm_capmoe

    with pytest.raises(AttributeError, match="no attribute 'rout'"):
        vllm_capmoe.rout  # noqa: B018
