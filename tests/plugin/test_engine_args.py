"""Flags, keywords and additional_config: three ways in, one configuration out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engines import VLLM, environment
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_capmoe
from vllm_capmoe import CapacityConfig
from vllm_capmoe.config import OPTIONS
from vllm_capmoe.integration.engine_args import GROUP
from vllm_capmoe.integration.settings import capacity_config

vllm_capmoe.register()

# A value other than the default for every option, as text on a command line.
GIVEN = {
    "mode": "expanded",
    "factor": "1.1",
    "metric": "reverse-order",
    "level": "device",
    "scope": "batch",  # its default: decode keep refuses the other
    "candidates": "global",
    "expanded_experts": "all",
    "fill": "busiest",
    "max_experts": "4",
    "renormalize": "never",
    "priority": "image-first",
    "min_capacity": "7",
    "min_tokens": "64",
    "backend": "torch",
    "layers": '{"3": {"factor": 2}}',
    "decode_keep": "2",
    "observe": "",  # a flag without a value
}
READ = {"factor": 1.1, "max_experts": 4, "min_capacity": 7, "min_tokens": 64}
TYPED = CapacityConfig(**GIVEN | READ | {"decode_keep": 2, "observe": True})


def parse(*arguments: str) -> AsyncEngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", "m", *arguments]))


def test_every_option_is_a_flag():
    assert set(GIVEN) == {option.key for option in OPTIONS}
    flags = [word for option in OPTIONS for word in (option.flag, GIVEN[option.key]) if word]
    assert capacity_config(parse(*flags).additional_config) == TYPED


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_every_option_is_a_keyword(cls):
    keywords = {f"moe_capacity_{key}": value for key, value in TYPED.to_dict().items()}
    made = cls(model="m", additional_config={"other": 1}, **keywords)
    assert capacity_config(made.additional_config) == TYPED
    assert made.additional_config["other"] == 1
    json.dumps(made.additional_config, allow_nan=False)  # vLLM hashes it as JSON


def test_a_yaml_file_carries_the_flags(tmp_path: Path):
    file = tmp_path / "config.yaml"
    file.write_text("moe-capacity-mode: drop\nmoe-capacity-factor: inf\n")
    config = capacity_config(parse("--config", str(file)).additional_config)
    assert config == CapacityConfig(mode="drop", factor="inf")


def test_a_file_of_layers_is_read_once(example_model, tmp_path: Path):
    """Other processes may not have it, or find another one in its place."""
    file = tmp_path / "layers.json"
    file.write_text('{"1": {"mode": "drop"}}')
    made = EngineArgs(
        model=str(example_model),
        max_model_len=128,
        additional_config={"moe_capacity": {"layers": f"@{file}"}},
    ).create_engine_config()
    file.unlink()
    assert capacity_config(made.additional_config).for_layer(1).mode == "drop"


def test_nothing_given_changes_nothing():
    assert parse().additional_config == EngineArgs(model="m").additional_config == {}


def test_flags_and_additional_config_are_merged():
    both = parse(
        "--additional-config", '{"moe_capacity": {"mode": "drop", "factor": 2}}',
        "--moe-capacity-factor", "2.0", "--moe-capacity-metric", "order",
    )  # fmt: skip
    expected = CapacityConfig(mode="drop", factor=2, metric="order")
    assert capacity_config(both.additional_config) == expected


def test_further_api_servers_get_the_flags():
    """They are made from the same parsed arguments, before they have loaded any plugin."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", "m", "--moe-capacity-mode", "drop"])
    made = AsyncEngineArgs.from_cli_args(arguments)
    assert arguments.additional_config == made.additional_config
    assert capacity_config(arguments.additional_config) == CapacityConfig(mode="drop")


def test_contradicting_ways_are_refused():
    with pytest.raises(
        ValueError, match=r"--moe-capacity-factor came as 1\.5 and in .*moe_capacity.* as 2:"
    ):
        EngineArgs(
            model="m",
            moe_capacity_factor=1.5,
            additional_config={"moe_capacity": {"factor": 2}},
        )


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("mode", "drops"),
        ("factor", "0"),
        ("factor", "-1"),
        ("factor", "nan"),
        ("factor", "much"),
        ("max-experts", "0"),
        ("min-capacity", "0"),
        ("min-tokens", "-1"),
    ],
)
def test_a_bad_value_ends_the_command(flag, value, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(f"--moe-capacity-{flag}={value}")
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert f"--moe-capacity-{flag} is {value!r}, but it must be" in message


@pytest.mark.engine
@pytest.mark.parametrize(
    "command",
    [("serve",), ("bench", "latency"), ("bench", "throughput"), ("run-batch",)],
    ids=" ".join,
)
def test_help_lists_the_group(command):
    done = subprocess.run(
        [VLLM, *command, f"--help={GROUP}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for option in OPTIONS:
        assert option.flag in done.stdout


@pytest.mark.engine
def test_llm_takes_the_keywords_only_after_register():
    """vLLM loads plugins after it has taken its keywords; that's why `register` is public."""
    code = "from vllm.engine.arg_utils import EngineArgs; EngineArgs(moe_capacity_mode='drop')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1 and "moe_capacity_mode" in done.stderr
