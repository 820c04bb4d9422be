"""Launch configurations of the expert kernels: heuristics, files, grids. No kernel runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capmoe_kernels import launch
from capmoe_kernels.experts import _use_tma, grid_size, workspace_sizes
from capmoe_kernels.launch import (
    Chip,
    ExpertsConfig,
    GemmConfig,
    ceil_div,
    default_config,
    num_tiles_bound,
    shared_bytes,
)

H100, A100, L40, B200 = (
    Chip((9, 0), 132),
    Chip((8, 0), 108),
    Chip((8, 9), 142),
    Chip((10, 0), 148),
)
CHIPS = [H100, A100, L40, B200, Chip((7, 5), 40), Chip(None, 304)]
# width, experts, hidden, intermediate
SHAPES = [
    (2, 8, 4096, 14336),  # Mixtral-8x7B
    (2, 1, 4096, 14336),  # one of its eight ranks
    (8, 64, 2048, 1024),  # OLMoE
    (8, 128, 2048, 768),  # Qwen3-30B-A3B
    (6, 64, 2048, 1408),  # DeepSeek-V2-Lite
    (3, 5, 33, 17),
]
TOKENS = [1, 2, 16, 64, 120, 256, 480, 1024, 8192, 65536]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_heuristics_fit_every_chip(chip: Chip, itemsize: int) -> None:
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    for (width, experts, hidden, intermediate), tokens in itertools.product(SHAPES, TOKENS):
        config = default_config(
            tokens, width, experts, hidden, intermediate, chip=chip, itemsize=itemsize
        )
        for gemm in (config.gate_up, config.down):
            assert shared_bytes(gemm, itemsize) <= chip.shared_limit
            assert gemm.programs_per_sm * shared_bytes(gemm, itemsize) <= chip.shared_limit + 1024
            assert not (gemm.use_tma and not chip.has_tma)
        assert config.down.split_k <= max(1, intermediate // config.down.block_k)
        # Buffers without a configuration suffice for every one of the heuristics.
        enough = workspace_sizes(tokens, width, hidden, intermediate, dtype)
        needed = workspace_sizes(tokens, width, hidden, intermediate, dtype, config)
        assert enough[0] >= needed[0] and enough[1] >= needed[1]
        assert ExpertsConfig.from_dict(config.to_dict()) == config


def test_heuristics_follow_the_rows_of_an_expert() -> None:
    def block_m(tokens: int, **options: int) -> int:
        return default_config(tokens, 2, 8, 4096, 14336, chip=H100, **options).gate_up.block_m

    # Half as many rows again as the mean, since loads scatter.
    assert [block_m(t) for t in (1, 40, 64, 128, 256, 8192)] == [16, 16, 32, 64, 128, 128]
    assert block_m(8192, max_rows=64) == 64  # a capacity bounds the rows
    assert block_m(64, global_experts=64) == 16  # an eighth of the assignments come here
    # Mixtral's w2 has too few tiles for one token; the sum is cut. With many tokens it is not.
    assert default_config(1, 2, 8, 4096, 14336, chip=H100).down.split_k == 2
    assert default_config(1, 2, 1, 4096, 14336, chip=H100, global_experts=8).down.split_k == 4
    assert default_config(64, 2, 8, 4096, 14336, chip=H100).down.split_k == 1


def test_the_second_tile_of_an_expert_runs_beside_the_first() -> None:
    """Else its weights come from memory again, a wave later."""
    for tokens, itemsize, chip in itertools.product(TOKENS, (2, 4), CHIPS):
        for shape in SHAPES:
            width, experts, hidden, intermediate = shape
            config = default_config(
                tokens, width, experts, hidden, intermediate, chip=chip, itemsize=itemsize
            )
            assert config.gate_up.group_m == config.down.group_m == 8


def test_long_sums_overlap_a_tile_s_end_with_the_next_one_s_start() -> None:
    """On Hopper, and only for the large tile, which has its multiprocessor to itself."""

    def flattened(tokens: int, shape: tuple[int, ...], chip: Chip = H100) -> tuple[bool, bool]:
        config = default_config(tokens, *shape, chip=chip)
        for gemm in (config.gate_up, config.down):
            assert shared_bytes(gemm, 2) <= chip.shared_limit
            assert gemm.num_stages == 4 or not gemm.flatten  # no stage is given up for it
        return config.gate_up.flatten, config.down.flatten

    mixtral, fine = SHAPES[0], SHAPES[3]
    assert flattened(8192, mixtral) == (True, True)
    assert flattened(8192, (2, 8, 2048, 14336)) == (False, True)
    assert flattened(8192, fine) == flattened(64, mixtral) == (False, False)
    assert flattened(8192, mixtral, B200) == (False, False)


def test_tile_bound_holds_and_is_reached() -> None:
    rng = random.Random(0)
    for _ in range(300):
        experts, assignments, block_m = rng.randint(1, 6), rng.randint(0, 60), rng.choice([4, 16])
        cuts = sorted(rng.randint(0, assignments) for _ in range(experts - 1))
        loads = [b - a for a, b in itertools.pairwise([0, *cuts, assignments])]
        tiles = sum(ceil_div(load, block_m) for load in loads)
        assert tiles <= num_tiles_bound(assignments, experts, block_m)
        assert tiles <= num_tiles_bound(assignments, experts, block_m, max(loads))
    assert num_tiles_bound(100, 8, 16) == 13
    assert num_tiles_bound(7 * 1 + 93, 8, 16) == sum(ceil_div(n, 16) for n in [1] * 7 + [93])
    assert num_tiles_bound(100, 8, 16, max_rows=16) == 8
    assert num_tiles_bound(0, 8, 16) == 0


def test_grid_is_bounded_by_the_chip_and_the_capacity() -> None:
    tile = GemmConfig(128, 256, 64, programs_per_sm=2)
    assert grid_size(16384, 8, 16, tile, H100, None) == 264
    assert grid_size(2, 8, 16, tile, H100, None) == 32
    assert grid_size(16384, 8, 16, tile, H100, 128) == 128
    assert grid_size(0, 8, 16, tile, H100, None) == 1  # an empty grid can't be launched


def test_descriptors_are_for_rows_of_whole_16_bytes() -> None:
    tile = GemmConfig(16, 32, 16)
    for columns, serves in ((16, True), (12, False)):
        matrix = torch.empty(2, 8, columns, dtype=torch.bfloat16)
        assert _use_tma(tile, H100, matrix) == serves
    assert not _use_tma(tile, A100, torch.empty(2, 8, 16, dtype=torch.bfloat16))


VLLM = {
    "BLOCK_SIZE_M": 16,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 4,
}


def test_files(tmp_path: Path) -> None:
    ours = {**VLLM, "SPLIT_K": 2, "down": {"BLOCK_SIZE_N": 32, "SWAP_AB": True}}
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"triton_version": "3.6.0", "1": VLLM, "64": ours}))
    configs = launch.load_configs(path)
    plain = GemmConfig(16, 64, 128, 1, 4, 4)
    assert configs[1] == ExpertsConfig(plain, plain)
    assert configs[64].gate_up == plain
    assert configs[64].down == dataclasses.replace(plain, block_n=32, swap_ab=True, split_k=2)
    picked = [launch.nearest_config(configs, t) for t in (1, 30, 33, 5000)]
    assert picked == [configs[1], configs[1], configs[64], configs[64]]


@pytest.mark.parametrize("change,words", [
    ({"BLOCK_SIZE_M": 48}, ["block_m is 48", "power of two"]),
    ({"BLOCK_SIZE_K": 8}, ["block_k is 8"]),
    ({"num_warps": 3}, ["num_warps is 3"]),
    ({"num_stages": 0}, ["num_stages is 0"]),
    ({"SWAP_AB": 1}, ["swap_ab is 1", "true or false"]),
    ({"input_precision": "bf16"}, ["input_precision is 'bf16'", "tf32x3"]),
    ({"BLOCK_M": 16}, ["'BLOCK_M'", "BLOCK_SIZE_M"]),
    ({"PDL": 1}, ["pdl is 1"]),
    ({"gate_up": {"SPLIT_K": 2}}, ["split_k 2", "must be 1"]),
    ({"combine": {"block_h": 100, "num_warps": 4}}, ["block_h is 100"]),
])  # fmt: skip
def test_bad_files(tmp_path: Path, change: dict[str, object], words: list[str]) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"1": {**VLLM, **change}}))
    with pytest.raises(ValueError) as error:
        launch.load_configs(path)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_tuned_file_goes_before_heuristics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = launch.config_file_name(8, 14336, "NVIDIA H200 141GB")
    assert name == "E=8,N=14336,device_name=NVIDIA_H200.json"
    (tmp_path / name).write_text(json.dumps({"1": VLLM}))
    shape = (4, 2, 8, 4096, 14336)

    def choose() -> ExpertsConfig:
        launch.choose_config.cache_clear()
        return launch.choose_config(*shape, chip=H100, device_name="NVIDIA H200")

    assert choose() == default_config(*shape, chip=H100)
    monkeypatch.setenv(launch.CONFIG_FOLDER_VARIABLE, str(tmp_path))
    assert choose().gate_up == GemmConfig(16, 64, 128, 1, 4, 4)
    # The user's folder goes before the package's, which serves where the user's has nothing.
    package = tmp_path / "package"
    package.mkdir()
    (package / name).write_text(json.dumps({"1": {**VLLM, "GROUP_SIZE_M": 3}}))
    monkeypatch.setattr(launch, "CONFIG_FOLDER", package)
    launch._tuned.cache_clear()
    assert choose().gate_up.group_m == 1
    monkeypatch.setenv(launch.CONFIG_FOLDER_VARIABLE, str(tmp_path / "nothing here"))
    assert choose().gate_up.group_m == 3
    launch.choose_config.cache_clear()
    launch._tuned.cache_clear()


def test_tuned_values_are_cut_to_the_chip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = launch.config_file_name(8, 14336, "small one")
    deep = {**VLLM, "BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 128, "num_stages": 6}
    (tmp_path / name).write_text(json.dumps({"1": deep}))
    monkeypatch.setenv(launch.CONFIG_FOLDER_VARIABLE, str(tmp_path))
    whole = launch.load_configs(tmp_path / name)[1]
    config = launch.choose_config(4, 2, 8, 4096, 14336, chip=L40, device_name="small one")
    for given, cut in ((whole.gate_up, config.gate_up), (whole.down, config.down)):
        assert shared_bytes(given, 2) > L40.shared_limit >= shared_bytes(cut, 2)
    launch.choose_config.cache_clear()


def test_of_two_keys_as_near_the_larger_one_is_used() -> None:
    configs = {
        key: ExpertsConfig(GemmConfig(16, 64, 128, key), GemmConfig(16, 64, 128))
        for key in (2, 4, 8)
    }
    assert [launch.nearest_config(configs, t).gate_up.group_m for t in (1, 3, 5, 6, 7)] == [
        2, 4, 4, 8, 8,
    ]  # fmt: skip


def test_needs_the_standard_library_only() -> None:
    code = (
        "import sys, capmoe_kernels.launch; print({'torch', 'triton', 'vllm'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
