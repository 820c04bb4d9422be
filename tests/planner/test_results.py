"""What an engine's process leaves, also where it was ended in the middle of a line."""

from pathlib import Path

from vllm_capmoe.config import CapacityConfig
from vllm_capmoe.planner.cli import _flags, _settings
from vllm_capmoe.planner.results import read


def test_a_line_that_was_cut_short_is_taken_off(tmp_path: Path) -> None:
    file = tmp_path / "observed.jsonl"
    assert list(read(file)) == []
    file.write_text('{"prompts": 32}\n{"prompts": 3}\n{"pro')
    assert list(read(file)) == [{"prompts": 32}, {"prompts": 3}]
    with file.open("a") as more:
        more.write('{"prompts": 1}\n')
    assert [chunk["prompts"] for chunk in read(file)] == [32, 3, 1]


def test_the_flags_are_all_that_was_tried_for_a_shell(tmp_path: Path) -> None:
    base = CapacityConfig(level="device", min_capacity=1)
    settings = _settings(base, "expanded", ranks=8)
    assert _flags(settings, Path("my plan/layers.json")) == (
        "--moe-capacity-mode expanded --moe-capacity-level device --moe-capacity-max-experts none "
        "--moe-capacity-min-capacity 1 --moe-capacity-layers '@my plan/layers.json'"
    )
    assert _settings(base, "expanded", ranks=1).max_experts == "auto"
    assert _settings(base, "reroute", ranks=8).max_experts == "auto"
