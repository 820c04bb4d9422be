"""Flags, YAML files and `additional_config` through vLLM's own parser, by the thousand."""

import contextlib
import io
import json
import random
from typing import Any

import pytest
import yaml
from fuzzing import accepted_value, refusal, settings, spoiled, value
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

import vllm_capmoe
from vllm_capmoe.config import OPTIONS
from vllm_capmoe.integration.settings import capacity_config

vllm_capmoe.register()


@pytest.fixture(scope="module")
def parser() -> Any:
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def parsed(parser: Any, words: list[str]) -> Any:
    """The settings that a command line gives; None where it ends the command, with a message."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            arguments = parser.parse_args(["--model", "m", *words])
    except SystemExit as ended:
        assert ended.code == 2
        last = said.getvalue().strip().splitlines()[-1]
        # What is no flag is vLLM's to say.
        assert "unrecognized" in last or ("error:" in last and len(last) < 800), last
        return None
    sentence = refusal(lambda: AsyncEngineArgs.from_cli_args(arguments))
    if sentence is not None:
        return None
    return capacity_config(arguments.additional_config)


def test_flags(parser: Any) -> None:
    rng, accepted = random.Random(5), 0
    for _ in range(2000):
        words = []
        for option in rng.sample(OPTIONS, rng.randrange(1, 4)):
            given = accepted_value(rng, option.key) if rng.random() < 0.7 else value(rng)
            text = given if isinstance(given, str) else json.dumps(given)
            text = spoiled(rng, text) if rng.random() < 0.2 else text
            words += [option.flag] if option.key == "observe" else [f"{option.flag}={text}"]
        accepted += parsed(parser, words) is not None
    assert 400 < accepted < 1900


def test_yaml_files(parser: Any, tmp_path) -> None:
    """A value that YAML makes of a word (off, 1e3, null) is taken as it is meant, or refused."""
    rng, accepted = random.Random(6), 0
    file = tmp_path / "config.yaml"
    for _ in range(600):
        lines = {}
        for option in rng.sample(OPTIONS, rng.randrange(1, 4)):
            good = rng.random() < 0.8
            lines[option.flag[2:]] = accepted_value(rng, option.key) if good else value(rng)
        text = yaml.safe_dump(lines, allow_unicode=True)
        if rng.random() < 0.5:  # as a person would write it
            text = text.replace("'", "")
        file.write_text(text, encoding="utf-8", errors="replace")
        try:
            yaml.safe_load(text)
        except yaml.YAMLError:
            continue  # vLLM reads it, and says so in its own way
        accepted += parsed(parser, ["--config", str(file)]) is not None
    assert 100 < accepted < 590


def test_additional_config(parser: Any) -> None:
    rng, accepted = random.Random(7), 0
    for _ in range(2000):
        given = {"moe_capacity": settings(rng) if rng.random() < 0.9 else value(rng)}
        if rng.random() < 0.2:
            given[rng.choice(["moe-capacity", "moe_capacity_mode", "other", "MoE_Capacity"])] = 1
        said = refusal(lambda given=given: capacity_config(given))
        accepted += said is None
    assert 400 < accepted < 1900
