"""`vllm-capmoe plan` as a user runs it: on real engines, and with what it must refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import environment

from vllm_capmoe.__main__ import main

COMMAND = [sys.executable, "-m", "vllm_capmoe", "plan"]
TEXT = "The quick brown fox jumps over the lazy dog while the experts wait for their tokens. "
COMPARED = ("assignments", "dropped", "lost", "mass", "peak_before", "peak_after")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 prompts of some 60 tokens and one that is too long, so that there are two chunks."""
    file = tmp_path_factory.mktemp("plan") / "prompts.jsonl"
    lines = [{"prompt": f"{number}: {TEXT * 3}{TEXT[number:]}"} for number in range(40)]
    lines.append({"prompt": TEXT * 99})  # longer than the model takes
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def words(model: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--max-model-len", "512", "--dtype", "float32", "--max-num-batched-tokens", "4096"]
    return [
        *("--model", str(model), "--prompts", str(prompts), "--out", str(out)),
        *("--max-output-tokens", "4", "--moe-capacity-min-capacity", "1", *fixed, *more),
    ]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    more = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # equal batches in all runs
    return subprocess.run(
        [*COMMAND, *words],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )


@pytest.mark.engine
@pytest.mark.cpu
def test_a_plan_predicts_what_its_settings_then_do(
    example_model: Path, prompts: Path, tmp_path: Path
) -> None:
    done = run(
        *words(example_model, prompts, tmp_path, "--ep-size", "4", "--max-loss", "5%"),
        *("--requests", "2", "4", "--enforce-eager", "--check"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plan: dict[str, Any] = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["prompts"], plan["left_out"], len(plan["layers"])) == (40, 1, 4)
    # The example's router loads its busiest expert more than twice the mean.
    assert all(layer["imbalance"] > 1.5 for layer in plan["layers"])
    predicted, check = plan["verdict"]["predicted"], plan["check"]
    assert plan["verdict"]["worth"], plan["verdict"]["reason"]
    assert 0 < predicted["mass_missing_share"] <= 0.05
    assert predicted["moe_layers_speed_bound"] > 1.05
    assert sum(layer["predicted"]["dropped"] for layer in check["layers"]) == predicted["dropped"]
    limited = [layer for layer in check["layers"] if layer["predicted"]["dropped"]]
    # The first limited layer gets what was observed; generated tokens are never dropped.
    for key in ("dropped", "added", "left_without", "lost"):
        assert limited[0]["measured"][key] == limited[0]["predicted"][key], key
    # Those above get other inputs, and in this model experts matter: a layer is off by up to a
    # fifth, all together nearly right.
    told, found = (
        {key: sum(layer[which][key] for layer in check["layers"]) for key in COMPARED}
        for which in ("predicted", "measured")
    )
    assert found["assignments"] == pytest.approx(told["assignments"], abs=40 * 4 * 2 * 4)
    for part, whole in (("dropped", "assignments"), ("lost", "mass")):
        shares = [each[part] / each[whole] for each in (found, told)]
        assert shares[0] == pytest.approx(shares[1], abs=0.01) and shares[0] > 0.05
    for key in ("peak_before", "peak_after", "mass"):
        assert found[key] == pytest.approx(told[key], rel=0.05), key
    assert check["tokens"] > 40 * 50
    assert check["agreement"] < 1 and check["kl"] > 0
    layers = json.loads((tmp_path / "layers.json").read_text())
    assert layers == plan["verdict"]["layers"]
    check_decode(plan["decode"], done.stdout)
    assert "Verdict: turn on" in done.stdout and f"@{tmp_path / 'layers.json'}" in done.stdout
    assert (tmp_path / "plan.html").read_text().count("<svg") == 6
    assert (tmp_path / "plan.html").read_text().count('class="verdict') == 3

    # A second call finds all engines' results, and starts none.
    again = run(
        *words(example_model, prompts, tmp_path, "--ep-size", "4", "--max-loss", "5%"),
        *("--requests", "2", "4", "--enforce-eager"),
    )
    assert again.returncode == 0
    assert json.loads((tmp_path / "plan.json").read_text())["by_factor"] == plan["by_factor"]


def check_decode(decode: list[dict[str, Any]], printed: str) -> None:
    """What steps of 2 and 4 requests would load, and do load when they are timed."""
    assert [found["requests"] for found in decode] == [2, 4]
    for found in decode:
        keep, timed = found["keep"], found["timed"]
        assert set(timed) == {"2", "1"}
        assert timed["1"]["active"] < timed["2"]["active"] and timed["2"]["time"] == 1
        assert timed["1"]["active"] == pytest.approx(found["tried"]["1"]["active"], rel=0.02)
        assert timed["2"]["active"] == pytest.approx(found["active_before"], rel=0.02)
        assert found["worth"] == (timed[str(keep)]["time"] <= 1 / 1.05 if keep else False)
    assert printed.count("Verdict for decode: ") == 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--requests", "42"), "--requests is 42, but there are 41 prompts: up to as many"),
        (("--ep-size", "3"), "--ep-size is 3, but it must divide the model's 8 experts."),
        (("--data-parallel-size", "2"), "--data-parallel-size is 2, but a plan runs in one engine"),
        (
            ("--moe-capacity-decode-keep", "1"),
            "--moe-capacity-decode-keep is given, but a plan finds it by itself",
        ),
        (
            ("--ep-size", "4", "--check", "--moe-capacity-level", "device"),
            "runs on 1 ranks, but the plan is for 4",
        ),
        (("--moe-capacity-factor", "0"), "--moe-capacity-factor is '0', but it must be a number"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    example_model: Path, prompts: Path, tmp_path: Path, capsys: Any, more: Any, message: str
) -> None:
    try:
        status = main(["plan", *words(example_model, prompts, tmp_path, *more)])
    except SystemExit as end:  # argparse's own
        status = int(end.code or 0)
    assert status == 2
    assert message in capsys.readouterr().err


def test_the_environment_is_left_alone(prompts: Path, tmp_path: Path) -> None:
    """A log level that stayed would silence every engine that the process starts later."""
    before = os.environ.get("VLLM_LOGGING_LEVEL")
    assert main(["plan", *words(tmp_path / "no-model", prompts, tmp_path)]) == 2
    assert os.environ.get("VLLM_LOGGING_LEVEL") == before


def test_a_model_or_a_file_that_is_not_there(prompts: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["plan", *words(tmp_path / "no-model", prompts, tmp_path)]) == 2
    assert "no-model" in capsys.readouterr().err
    assert main(["plan", *words(tmp_path, tmp_path / "nothing.jsonl", tmp_path)]) == 2
    assert "nothing.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--max-loss", "150%", "'1%' or 0.01 is accepted"),
        ("--max-loss", "-1%", "expected one argument"),
        ("--max-loss", "much", "'1%' or 0.01 is accepted"),
        ("--ep-size", "0", "an integer >= 1 is accepted"),
        ("--max-prompts", "x", "an integer >= 1 is accepted"),
    ],
)
def test_bad_flags(prompts: Path, tmp_path: Path, capsys: Any, flag: str, value: str, message: str):
    with pytest.raises(SystemExit):
        main(["plan", *words(tmp_path, prompts, tmp_path, flag, value)])
    assert message in capsys.readouterr().err
