"""The GPU benchmarks run: tiny, under Triton's interpreter where there is no GPU.

Their gates judge, their figures don't. What can't run here, the calls into vLLM's CUDA kernels, is
bound to the signatures of the installed vLLM.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

INTERPRET = [] if torch.cuda.is_available() else ["--interpret"]
QUICK = {
    "layer": ["bench_moe_layer.py", *INTERPRET],
    "ranks": ["emulate_ep.py", *INTERPRET],
    "tune": ["tune_experts.py", *INTERPRET],
    "engine": ["bench_engine.py"],
}


def environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "OUT")}
    return {**kept, **more}


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment(**env),
    )


def read(path: Path) -> list[dict[str, str]]:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# date ") and lines[1].startswith("# device "), lines[:2]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert rows and all(None not in row.values() for row in rows)
    return rows


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shapes(repo_root: Path) -> ModuleType:
    """benchmarks/_shapes.py as a module."""
    return load(repo_root / "benchmarks" / "_shapes.py")


@pytest.fixture(scope="module")
def tables(repo_root: Path) -> ModuleType:
    """benchmarks/_tables.py as a module."""
    return load(repo_root / "benchmarks" / "_tables.py")


@pytest.fixture(scope="module")
def gates(repo_root: Path) -> ModuleType:
    """benchmarks/_gates.py as a module."""
    return load(repo_root / "benchmarks" / "_gates.py")


@pytest.fixture(scope="module")
def report(repo_root: Path, tables: ModuleType) -> ModuleType:
    """benchmarks/moe_layer_report.py as a module, which imports `_tables` by that name."""
    return load(repo_root / "benchmarks" / "moe_layer_report.py")


@pytest.mark.parametrize("name", [n for n in QUICK if n != "engine"])
def test_quick_run_writes_a_table(repo_root: Path, tmp_path: Path, name: str) -> None:
    script, *options = QUICK[name]
    out = tmp_path / "out.csv"
    command = [sys.executable, str(repo_root / "benchmarks" / script), "--quick", *options]
    done = run([*command, "--out", str(out)])
    assert done.returncode == 0, done.stdout + done.stderr
    read(out)
    if name == "layer":  # a second run finds its rows there, and measures nothing
        before = out.read_text()
        done = run([*command, "--out", str(out)])
        assert done.returncode == 0, done.stdout + done.stderr
        assert out.read_text() == before


@pytest.mark.engine
@pytest.mark.slow
def test_quick_engine_run(repo_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine.csv"
    script = str(repo_root / "benchmarks" / "bench_engine.py")
    done = run([sys.executable, script, "--quick", "--out", str(out)])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(out)
    assert {row["contender"] for row in rows} == {"stock", "drop-1.5"}
    bound = [row for row in rows if row["contender"] == "drop-1.5" and row["load"] == "prefill"]
    before, after = (float(bound[0][f"max_over_mean_{when}"]) for when in ("before", "after"))
    assert before > 2.2 and after < before  # the skew that was asked for is there


def test_what_calls_vllm_fits_its_signatures(repo_root: Path) -> None:
    """The opponent's calls bind to the installed vLLM; their kernels need a GPU."""
    code = """
import inspect, os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, sys.argv[1])
import torch
import _shapes
import _tables
import bench_moe_layer as bench
from _opponents import Vllm, opponents

device, dtype = torch.device("cpu"), torch.bfloat16
layers = [_shapes.make_layer(_shapes.TINY, device, dtype)]
bound = []
for mode in ("off", "drop"):
    case = bench.Case(bench.Point(_shapes.TINY, 40, 3.0, mode, 1.0), layers, device, dtype)
    vllm = Vllm(case)
    assert vllm.block_m in (16, 32, 64, 128), vllm.block_m
    for name, result in (("fused_experts", None), ("topk_softmax", None), ("align", None)):
        signature = inspect.signature(getattr(vllm, name))
        def stand_in(*args, signature=signature, name=name, **kwargs):
            signature.bind(*args, **kwargs)
            bound.append(name)
        setattr(vllm, name, stand_in)
    vllm.experts(0), vllm.route(0), vllm.whole(0)
    phantom = vllm.ids[0].max().item() == _shapes.TINY.experts
    assert phantom == (mode == "drop") == (vllm.map_E is not None)
    columns = [column for column, _, _ in opponents(case, ["vllm"])]
    limited = ["vllm_experts_ms", "vllm_route_ms"]  # its routing is timed in every mode
    assert columns == limited + ["vllm_layer_ms"] * (mode == "off"), columns
assert bound.count("fused_experts") == 4 and bound.count("align") == 2, bound

# run_gpu.py's gates of them, with torch in the place of their kernels: right, then spoiled.
import _gates, _opponents
from gpu.case import Case

class Stand(Vllm):
    spoiled = False
    def experts(self, r, weights=None, ids=None):
        routed, layer = self.case.routed[r], self.case.layer(r)
        chosen = (routed.weights, routed.experts) if weights is None else (weights, ids)
        out = _gates.loop(layer, self.case.hidden[r], *chosen, dtype).to(dtype)
        out[7] *= 1.2 if self.spoiled else 1
        return out
    def topk_softmax(self, weights, ids, indices, logits, renormalize):
        best = logits.float().softmax(-1).topk(2)
        weights.copy_(best.values / best.values.sum(1, keepdim=True)), ids.copy_(best.indices)
        ids.copy_(ids.roll(int(self.spoiled), 0))
    def __setattr__(self, name, value):
        if name not in ("topk_softmax", "align"):
            super().__setattr__(name, value)
    def align(self, ids, block_m, E):
        A = ids.numel()
        return (torch.arange(A + 5 - self.spoiled).clamp(max=A), None, None)

_opponents.Vllm = Stand
ours = Case(_shapes.TINY, 40, layers, device, "")
for part in ("experts", "layer", "routing"):
    Stand.spoiled = False
    call = ours.call(part, "vllm")
    call.gate(), call.run(0)
    Stand.spoiled = True
    try:
        call.gate()
    except _gates.GateError:
        continue
    raise SystemExit(f"{part}: what is wrong passes")
"""
    done = run([sys.executable, "-c", code, str(repo_root / "benchmarks")])
    assert done.returncode == 0, done.stdout + done.stderr


def test_routing_goals_are_judged_with_a_limit_too(
    report: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(mode: str, tokens: int, share: float, over: float | str) -> dict[str, str]:
        return {
            **{"mode": mode, "tokens": str(tokens), "route_share": str(share)},
            "vllm_route_over_ours": str(over),
        }

    def judged(rows: list[dict[str, str]]) -> list[str]:
        report.routing_goals(rows)
        return [
            f"{line.split()[0]} {line.rpartition(': ')[2]}"
            for line in capsys.readouterr().out.splitlines()
        ]

    dropless = [row("off", 8192, 0.04, 1.2), row("off", 1024, 0.2, 0.5)]
    assert judged(dropless) == ["PASS 0.040 (1 rows)", "PASS 1.200 (1 rows)"] + 2 * [
        "WAITS - (0 rows)"
    ]
    slow = [row("drop", 8192, 0.02, 1.1), row("expanded", 8192, 0.06, 0.8)]
    limited = ["FAIL 0.060 (2 rows)", "FAIL 0.800 (2 rows)"]
    assert judged(dropless + slow)[2:] == limited
    # Without vLLM its column is empty: then nothing is judged against it.
    assert judged([row("drop", 8192, 0.02, "")])[2:] == ["PASS 0.020 (1 rows)", "WAITS - (0 rows)"]


def test_router_has_the_skew_that_is_asked_for(shapes: ModuleType) -> None:
    cpu = torch.device("cpu")
    for shape in shapes.SHAPES.values():
        for peak in (1.0, 3.0, 7.0):
            logits = shapes.router_logits(4096, shape, peak, cpu, torch.float32, seed=1)
            ids = logits.topk(shape.top_k).indices.reshape(-1)
            load = torch.bincount(ids, minlength=shape.experts).max().item()
            mean = 4096 * shape.top_k / shape.experts
            wanted = min(peak, 0.98 * shape.experts / shape.top_k)
            slack = 0.1 if peak > 1 else 0.3  # of an even router the largest load is noise
            assert load / mean == pytest.approx(wanted, rel=slack), (shape.name, peak)


def test_skew_is_the_same_under_other_defaults(shapes: ModuleType) -> None:
    """vLLM loads weights with the device and the dtype of the model as torch's defaults."""
    expected = shapes.expert_bias(16, 2, 3.0)
    shapes.expert_bias.cache_clear()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert shapes.expert_bias(16, 2, 3.0) == expected
    finally:
        torch.set_default_dtype(before)


def test_capacity_can_be_set_exactly(shapes: ModuleType) -> None:
    for shape in shapes.SHAPES.values():
        plan = shapes.make_plan(shape, "drop", 1.5)
        for T, C in ((4096, 768), (4095, 129), (17, 3)):
            assert shapes.capacity_of(shapes.with_capacity(plan, C, T), T) == C


def test_gate_refuses_what_is_wrong(gates: ModuleType, shapes: ModuleType) -> None:
    """A fault of one row is found, whichever it is."""
    torch.manual_seed(0)
    layer = shapes.make_layer(shapes.TINY, torch.device("cpu"), torch.bfloat16)
    hidden = torch.randn(90, shapes.TINY.hidden).bfloat16()
    weights, experts = torch.rand(90, 8).topk(2)
    experts = experts.int()
    experts[0, 1] = -1
    case = layer, hidden, weights, experts
    good = gates.loop(*case, torch.bfloat16).bfloat16()
    expected = gates.reference(*case)
    assert gates.gate_experts("good", good, expected) <= 1

    def spoiled(row: int, factor: float) -> torch.Tensor:
        wrong = good.clone()
        wrong[row] *= factor
        return wrong

    for row in (0, 89):
        with pytest.raises(gates.GateError, match=f"is off by .* worst in row {row}$"):
            gates.gate_experts("wrong", spoiled(row, 1.2), expected)
    for wrong in (good * 1.05, good.roll(1, 0), spoiled(70, torch.nan)):
        with pytest.raises(gates.GateError, match="is off by"):
            gates.gate_experts("wrong", wrong, expected)
    order, offsets, _ = gates.seats_of(experts, 8)
    gates.gate_seats("good", SimpleNamespace(order=order, offsets=offsets), experts, 8)
    with pytest.raises(gates.GateError, match="seats are not those"):
        swapped = order[[1, 0, *range(2, 180)]]
        gates.gate_seats("wrong", SimpleNamespace(order=swapped, offsets=offsets), experts, 8)


def test_table_is_continued_and_kept_apart(tables: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    head = ["# date 2026-01-01", "# device A"]
    tables.Table(path, ("a", "b"), ("a",), head).add({"a": 1, "b": 0.123456789})
    table = tables.Table(path, ("a", "b"), ("a",), head)
    assert table.has({"a": 1}) and not table.has({"a": 2})
    assert table.rows == [{"a": "1", "b": "0.12346"}]
    # What was begun once may only have been cut off; what was begun twice is left out.
    for attempts in (1, 2):
        table.begin({"a": 2})
        again = tables.Table(path, ("a", "b"), ("a",), head)
        assert again.has({"a": 2}) == (attempts == 2)
    with pytest.raises(SystemExit, match="another device"):
        tables.Table(path, ("a", "b"), ("a",), ["# date 2026-01-02", "# device B"])
    with pytest.raises(SystemExit, match="other columns"):
        tables.Table(path, ("a", "c"), ("a",), head)


def test_estimate_of_weight_traffic(repo_root: Path, shapes: ModuleType) -> None:
    """The weights of few tokens are read once, not so with GROUP_M = 1 and tiles for the mean."""
    script = load(repo_root / "benchmarks" / "estimate_experts.py")
    mixtral, chip = shapes.SHAPES["mixtral-8x7b"], script.Chip((9, 0), 132)
    args = SimpleNamespace(tflops=700, gbps=3000, l2=50, draws=3, tail=None)
    for tokens in (64, 128):
        sizes = (mixtral.top_k, mixtral.experts, mixtral.hidden, mixtral.intermediate)
        now = script.default_config(tokens, *sizes, chip=chip)
        earlier = script.before(now, mixtral, tokens)
        traffic = [script.layer(mixtral, tokens, c, args, chip)["traffic"] for c in (now, earlier)]
        assert traffic[0] <= 1.05 and traffic[1] > 1.15, traffic
    # Loads 3 and 20 in tiles of 16 rows: three of them, times four tiles of columns.
    tile = script.GemmConfig(16, 16, 16, programs_per_sm=1)
    product = script.Product((3, 20, 0), 64, 32, tile)
    found = script.estimate(product, script.Chip((9, 0), 4), (1e12, 1e9), 1e6)
    assert found["padding"] == 48 / 23 and found["waves"] == 1.0 and found["traffic"] == 1.0
    assert script.estimate(product, script.Chip((9, 0), 5), (1e12, 1e9), 1e6)["waves"] == 15 / 12
