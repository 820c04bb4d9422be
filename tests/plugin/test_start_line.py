"""The line that says at start-up what is in effect, and the warning beside it."""

from typing import Any

import pytest

from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration import layers
from vllm_capmoe.plan import resolve


def said(monkeypatch: pytest.MonkeyPatch, ranks: int, **settings: Any) -> list[str]:
    """What is logged for a layer of 8 experts on so many ranks."""
    lines: list[str] = []
    for level in ("info_once", "warning_once"):

        def keep(text: str, *arguments: Any, scope: str, level: str = level) -> None:
            lines.append(f"{level}: {text % arguments}")

        monkeypatch.setattr(layers.logger, level, keep)
    config = CapacityConfig(**settings)
    devices = [expert * ranks // 8 for expert in range(8)]
    plan = resolve(config, num_experts=8, top_k=2, expert_device=devices, renormalize=True)
    layers.log_start(config, plan, "torch", ranks, 4)
    return lines


def test_what_auto_chose_is_said(monkeypatch):
    (line,) = said(monkeypatch, 2, mode="expanded")
    for part in ("ranks=2", "backend=torch (auto)", "renormalize=yes (auto)", "max_experts=none"):
        assert part in line
    assert "candidates=global (auto), expanded_experts=2 (auto)" in line


def test_what_was_asked_for_is_said_as_it_is(monkeypatch):
    asked = {"backend": "torch", "renormalize": "never", "candidates": "global"}
    (line,) = said(monkeypatch, 2, mode="expanded", max_experts=3, expanded_experts=1, **asked)
    assert "backend=torch, renormalize=no, candidates=global, expanded_experts=1" in line
    assert line.endswith("max_experts=3") and line.count("(auto)") == 1  # of fill


def test_the_warning_is_of_one_rank_only(monkeypatch):
    assert len(said(monkeypatch, 2, mode="drop")) == 1
    first, second = said(monkeypatch, 1, mode="drop")
    assert first.startswith("info_once: MoE capacity: mode=drop, factor=1.5, level=expert")
    assert second.startswith("warning_once") and "without expert parallelism" in second
