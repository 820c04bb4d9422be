"""What the quality tables say of answers, on rows written by hand."""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def quality(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The benchmark's modules, which stand in a folder and in no package."""
    for folder in ("benchmarks", "benchmarks/quality"):
        monkeypatch.syspath_prepend(str(repo_root / folder))
    before = set(sys.modules)
    import report_tasks
    import settings
    import tasks

    yield SimpleNamespace(report_tasks=report_tasks, settings=settings, tasks=tasks)
    for name in set(sys.modules) - before:
        if name in ("report_tasks", "settings", "tasks", "engine", "text"):
            del sys.modules[name]


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_flips_are_counted_against_no_limit(quality: SimpleNamespace, tmp_path: Path) -> None:
    said = {"drop inf": "ABCD", "drop 1": "ABDA", "drop 0.5": "AB"}  # the right ones: ABAA
    rows = [
        {"model": "m", "setting": setting, "question": str(number)}
        | {"right": "ABAA"[number], "said": letter}
        | {x: "0" if setting == "drop inf" else "-0.5" for x in "ABCD"}
        for setting, letters in said.items()
        for number, letter in enumerate(letters)
    ]
    quality.report_tasks.choice_section(rows, tmp_path / "summary.csv")
    free, ours = read(tmp_path / "summary.csv")  # what isn't complete is left out
    assert (free["accuracy"], free["flips"], free["shift"]) == ("0.5", "0", "0")
    assert (ours["setting"], ours["accuracy"], ours["delta"]) == ("drop 1", "0.75", "0.25")
    assert (ours["flips"], ours["lost"], ours["won"], ours["shift"]) == ("2", "0", "1", "0.5")
    assert float(ours["error"]) == pytest.approx(0.25)


def test_answers_agree_up_to_the_first_difference(quality: SimpleNamespace, tmp_path: Path) -> None:
    answers = {"drop inf": ["1 2 3 4", "5 6"], "drop 1": ["1 2 9 4 5", "5 6"]}
    rows = [
        {"model": "m", "setting": setting, "question": str(number), "tokens": tokens}
        | {"known": "" if number else str(int(setting == "drop inf")), "ended": "1"}
        for setting, each in answers.items()
        for number, tokens in enumerate(each)
    ]
    quality.report_tasks.answers_section(rows, tmp_path / "summary.csv")
    free, ours = read(tmp_path / "summary.csv")
    assert (free["equal"], free["agree"], free["right"], free["known"]) == ("2", "1", "1", "1")
    assert (ours["equal"], ours["agree"], ours["right"]) == ("1", "0.75", "0")
    assert (ours["length"], ours["longest_change"], ours["ended"]) == ("3.5", "1", "2")


def test_sequences_are_packed_in_their_order(quality: SimpleNamespace) -> None:
    sequences = [[1] * 3, [2] * 4, [3] * 9, [4]]
    assert list(quality.tasks.packed(sequences, 7)) == [sequences[:2], sequences[2:3], [[4]]]


def test_settings_of_decode_keep(quality: SimpleNamespace) -> None:
    def names(requests: int, *keep: str | int) -> list[str]:
        return [each.name for each in quality.settings.decode_settings(requests, 8, keep)]

    free, kept = "drop inf", "drop inf decode_keep={}".format
    assert names(16, 3, "2:7", "16:4", 8) == [free, kept(3), kept(4)]
    auto = quality.settings.auto_keep(16, 8)
    assert names(16, "auto", auto) == [free, kept(auto)]
    (*_, last) = quality.settings.CapacityConfig(decode_keep="auto").keeps(8)
    assert quality.settings.auto_keep(1000, 8) == last
