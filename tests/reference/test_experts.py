"""`vllm_capmoe.experts` against a float32 loop written here, for every activation and path.

Floats are compared by torch's own error: ours against float32 is at most twice that of the same
loop in the dtype under test. Results are poisoned with NaN before each call.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from naive_activations import activate
from torch import Tensor

from vllm_capmoe import experts as module
from vllm_capmoe.experts import (
    ACTIVATIONS,
    fused_experts_prepared,
    fused_experts_torch,
    prepare_weights,
    unpack_weights,
)

PARAMETERS: dict[str, dict[str, float]] = {
    "swigluoai_uninterleave": {"swiglu_alpha": 1.702, "swiglu_beta": 1.0, "swiglu_limit": 1.5},
    "situ": {"situ_beta": 1.5, "situ_linear_beta": 2.5},
    "swiglustep": {"swiglu_limit": 0.75},
}
PATHS = ("plain", "prepared")


def reference(case: dict[str, Any], dtype: torch.dtype, **options: Any) -> Tensor:
    """Loop over tokens' places by expert, products in `dtype`, sum in float32. Returns float32."""
    x, weights, ids = case["hidden_TH"], case["weights_TK"], case["experts_TK"]
    on_input = options.pop("apply_router_weight_on_input", False)
    expert_map = options.pop("expert_map", None)
    name = options.pop("activation")
    b13, b2 = options.pop("w13_bias", None), options.pop("w2_bias", None)
    local = ids.long().clone()
    if expert_map is not None:
        local = torch.where(ids >= 0, expert_map[ids.long().clamp(min=0)].long(), -1)
    total = torch.zeros(x.shape)
    for e in range(case["w13"].shape[0]):
        for token, place in (local == e).nonzero().tolist():
            w = weights[token, place]
            row = x[token : token + 1]
            row = (row * w).to(x.dtype) if on_input else row
            h = F.linear(row.to(dtype), case["w13"][e].to(dtype))
            h = h if b13 is None else (h + b13[e].to(dtype))
            y = F.linear(activate(name, h, **options), case["w2"][e].to(dtype))
            y = y if b2 is None else (y + b2[e].to(dtype))
            total[token] += y[0].float() * (1.0 if on_input else w)
    return total.to(dtype).float()


def make_case(
    tokens: int = 13,
    hidden: int = 24,
    intermediate: int = 40,
    experts: int = 5,
    k: int = 2,
    *,
    gated: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    id_dtype: torch.dtype = torch.int32,
    seed: int = 0,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    wide = intermediate * (2 if gated else 1)
    scores = torch.randn(tokens, experts, generator=g).softmax(-1)
    weights, ids = scores.topk(k) if tokens else (torch.zeros(0, k), torch.zeros(0, k))
    w13 = torch.randn(experts, wide, hidden, generator=g) * 2 * hidden**-0.5
    w2 = torch.randn(experts, hidden, intermediate, generator=g) * intermediate**-0.5
    return {
        "hidden_TH": torch.randn(tokens, hidden, generator=g).to(dtype),
        "w13": w13.to(dtype),
        "w2": w2.to(dtype),
        "weights_TK": weights.contiguous(),
        "experts_TK": ids.to(id_dtype).contiguous(),
    }


def make_biases(case: dict[str, Any], seed: int = 9) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    w13, w2 = case["w13"], case["w2"]
    return {
        "w13_bias": torch.randn(w13.shape[:2], generator=g).to(w13.dtype),
        "w2_bias": torch.randn(w2.shape[:2], generator=g).to(w2.dtype),
    }


def compute(path: str, case: dict[str, Any], **options: Any) -> Tensor:
    """Ours by one of the two paths, into a poisoned buffer."""
    out = torch.full_like(case["hidden_TH"], math.nan)
    if path == "plain":
        result = fused_experts_torch(**case, **options, out=out)
    else:
        call = {"expert_map", "apply_router_weight_on_input"}
        fixed = {name: value for name, value in options.items() if name not in call}
        prepared = prepare_weights(case["w13"], case["w2"], **fixed)
        if prepared is None:
            pytest.skip(f"oneDNN has no prepacked product for {case['w13'].dtype} here")
        result = fused_experts_prepared(
            case["hidden_TH"],
            prepared,
            case["weights_TK"],
            case["experts_TK"],
            out=out,
            **{name: value for name, value in options.items() if name in call},
        )
    assert result is out
    return result


def check(path: str, *cases: dict[str, Any], **options: Any) -> None:
    """Hold ours to twice torch's own error, over all the cases together."""
    errors, torch_errors = [], []
    for case in cases:
        ours = compute(path, case, **options)
        exact = reference(case, torch.float32, **options)
        dtype = case["hidden_TH"].dtype
        assert ours.dtype == dtype and ours.shape == case["hidden_TH"].shape
        assert not ours.isnan().any()
        errors.append((ours.float() - exact).abs().flatten())
        torch_errors.append((reference(case, dtype, **options) - exact).abs().flatten())
    error, torch_error = torch.cat(errors), torch.cat(torch_errors)
    # In float32 torch's own error is 0 by this definition: allow rounding of sums of 100 terms.
    slack = {torch.float32: 2e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}[dtype]
    if error.numel():
        assert error.max() <= 2 * torch_error.max() + slack, (error.max(), torch_error.max())
        assert error.mean() <= 2 * torch_error.mean() + slack


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, bias: bool, path: str) -> None:
    case = make_case(gated=not name.endswith("_no_mul"))
    options = PARAMETERS.get(name, {}) | (make_biases(case) if bias else {})
    check(path, case, activation=name, **options)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_dtypes(dtype: torch.dtype, id_dtype: torch.dtype, path: str) -> None:
    case = make_case(dtype=dtype, id_dtype=id_dtype)
    check(path, case, activation="silu", **make_biases(case))


def test_limits_take_effect() -> None:
    case = make_case()
    for name in ("silu", "swigluoai"):
        check("prepared", case, activation=name, swiglu_limit=0.5)
        check("plain", case, activation=name, swiglu_limit=0.5)
        free, cut = (compute("plain", case, activation=name, swiglu_limit=v) for v in (None, 0.5))
        assert (free - cut).abs().max() > 0.1


def test_float32_biases_serve_bfloat16_weights() -> None:
    case = make_case()
    biases = {name: bias.float() for name, bias in make_biases(case).items()}
    for path in PATHS:
        check(path, case, activation="swigluoai", **biases)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate", "experts"),
    [(1, 8, 8, 1), (1, 64, 32, 4), (2, 7, 5, 3), (3, 1, 1, 2), (33, 17, 31, 4), (101, 33, 65, 9)],
)
def test_sizes(tokens: int, hidden: int, intermediate: int, experts: int, path: str) -> None:
    """Few outputs are too small a sample of errors: there several seeds count together."""
    seeds = range(1 if tokens > 3 else 16)
    size = (tokens, hidden, intermediate, experts)
    check(path, *(make_case(*size, k=min(2, experts), seed=s) for s in seeds), activation="silu")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", range(1, 6))
def test_any_number_of_experts_per_token(k: int, path: str) -> None:
    check(path, make_case(k=k), activation="silu")


@pytest.mark.parametrize("path", PATHS)
def test_dropped_assignments_and_their_weights_are_not_read(path: str) -> None:
    case = make_case(tokens=40, k=3)
    g = torch.Generator().manual_seed(1)
    case["experts_TK"][torch.rand(40, 3, generator=g) < 0.4] = -1
    case["experts_TK"][7] = -1
    check(path, case, activation="silu")
    case["weights_TK"][case["experts_TK"] < 0] = math.nan
    assert not compute(path, case, activation="silu").isnan().any()
    assert (compute(path, case, activation="silu")[7] == 0).all()


def test_dropped_assignments_cost_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = module._PlainExperts.forward

    def count(self: Any, expert: int, x_NH: Tensor) -> Tensor:
        seen.append(x_NH.shape[0])
        return forward(self, expert, x_NH)

    monkeypatch.setattr(module._PlainExperts, "forward", count)
    case = make_case(tokens=20, experts=4)
    case["experts_TK"][:, 1] = -1
    compute("plain", case, activation="silu")
    assert sum(seen) == 20
    seen.clear()
    case["experts_TK"][:] = -1
    compute("plain", case, activation="silu")
    assert seen == []


@pytest.mark.parametrize("path", PATHS)
def test_only_experts_with_tokens_are_read(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen decode tokens on three of nine experts: one product each for these, none besides."""
    case = make_case(tokens=16, experts=9)
    case["experts_TK"] = torch.tensor([1, 4, 8])[case["experts_TK"].long() % 3]
    want = compute(path, case, activation="silu")
    idle = [0, 2, 3, 5, 6, 7]
    case["w13"][idle] = case["w2"][idle] = math.nan
    calls: list[int] = []
    kind = {"plain": module._PlainExperts, "prepared": module.PreparedExperts}[path]
    forward = kind.forward

    def count(self: Any, expert: int, x_NH: Tensor) -> Tensor:
        calls.append(expert)
        return forward(self, expert, x_NH)

    monkeypatch.setattr(kind, "forward", count)
    assert torch.equal(compute(path, case, activation="silu"), want)
    assert calls == [1, 4, 8]


@pytest.mark.parametrize("path", PATHS)
def test_expert_map(path: str) -> None:
    """Experts 1, 4 and 6 of 7 live here, in another order; -1 ids stay dropped."""
    case = make_case(experts=3, tokens=30)
    g = torch.Generator().manual_seed(2)
    case["experts_TK"] = torch.rand(30, 7, generator=g).topk(2).indices.int()
    case["experts_TK"][::5, 0] = -1
    expert_map = torch.tensor([-1, 2, -1, -1, 0, -1, 1], dtype=torch.int32)
    check(path, case, activation="silu", expert_map=expert_map)
    nowhere = torch.full((7,), -1, dtype=torch.int32)
    assert (compute(path, case, activation="silu", expert_map=nowhere) == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [30, 65, 513, 1100])
def test_one_expert_takes_all(tokens: int, path: str) -> None:
    """513 and 1100 rows need more than one block."""
    case = make_case(tokens, 8, 16, experts=3, k=1)
    case["experts_TK"][:] = 1
    check(path, case, activation="silu")


@pytest.mark.parametrize("path", PATHS)
def test_uneven_loads_over_several_groups(path: str) -> None:
    case = make_case(900, 8, 16, experts=6)
    case["experts_TK"][:700, 0] = 2
    case["experts_TK"][::3, 1] = -1
    case["experts_TK"][case["experts_TK"] == 4] = -1  # an empty expert in the middle
    check(path, case, activation="silu")


@pytest.mark.parametrize("path", PATHS)
def test_an_expert_twice_in_a_row_counts_twice(path: str) -> None:
    case = make_case(tokens=6)
    case["experts_TK"][:, 1] = case["experts_TK"][:, 0]
    check(path, case, activation="silu")


@pytest.mark.parametrize("path", PATHS)
def test_zero_tokens_and_zero_places(path: str) -> None:
    assert compute(path, make_case(tokens=0), activation="silu").shape == (0, 24)
    case = make_case(tokens=4)
    case["weights_TK"], case["experts_TK"] = case["weights_TK"][:, :0], case["experts_TK"][:, :0]
    assert (compute(path, case, activation="silu") == 0).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [1, 3])
def test_router_weight_on_input(k: int, path: str) -> None:
    case = make_case(k=k, tokens=37)
    options = {"activation": "silu", "apply_router_weight_on_input": True}
    check(path, case, **options, **make_biases(case))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens", [1, 50, 700])
def test_sum_is_float32_in_ascending_order_and_repeats_bitwise(tokens: int, path: str) -> None:
    """Bit for bit the float32 sum, ascending by expert, of each expert's own rounded output."""
    case = make_case(tokens, experts=6, k=6)
    case["experts_TK"] = case["experts_TK"].flip(1).contiguous()
    case["weights_TK"] = case["weights_TK"].flip(1).contiguous()
    ours = compute(path, case, activation="silu")
    for _ in range(3):
        assert torch.equal(compute(path, case, activation="silu"), ours)
    total = torch.zeros(case["hidden_TH"].shape)
    for e in range(6):
        ones = case | {
            "weights_TK": torch.ones(tokens, 1),
            "experts_TK": torch.full((tokens, 1), e, dtype=torch.int32),
        }
        place = (case["experts_TK"] == e).int().argmax(1, keepdim=True)
        y = compute(path, ones, activation="silu").float()
        total += y * case["weights_TK"].gather(1, place)
    assert torch.equal(ours, total.bfloat16())


@pytest.mark.parametrize("path", PATHS)
def test_order_of_the_places_changes_nothing(path: str) -> None:
    case = make_case(tokens=20, experts=4, k=4)
    ours = compute(path, case, activation="silu")
    for order in itertools.islice(itertools.permutations(range(4)), 1, 24, 7):
        other = case | {n: case[n][:, list(order)].clone() for n in ("weights_TK", "experts_TK")}
        assert torch.equal(compute(path, other, activation="silu"), ours)


def test_out_may_be_the_input_and_inputs_stay_as_they_are() -> None:
    case = make_case()
    before = {name: value.clone() for name, value in case.items()}
    expected = fused_experts_torch(**case, activation="swigluoai")
    for name, value in case.items():
        assert torch.equal(value, before[name]), name
    case["hidden_TH"] = case["hidden_TH"].clone()
    fused_experts_torch(**case, activation="swigluoai", out=case["hidden_TH"])
    assert torch.equal(case["hidden_TH"], expected)


def test_strided_inputs() -> None:
    case = make_case(tokens=1)
    expected = {path: compute(path, case, activation="silu") for path in PATHS}
    wide = torch.zeros(1, 2 * 24, dtype=torch.bfloat16)
    wide[:, ::2] = case["hidden_TH"]
    w13 = case["w13"].transpose(1, 2).contiguous().transpose(1, 2)
    strided = case | {"hidden_TH": wide[:, ::2], "w13": w13}
    for path in PATHS:
        torch.testing.assert_close(compute(path, strided, activation="silu"), expected[path])


def test_release_frees_the_originals_and_keeps_their_shape() -> None:
    case = make_case()
    expected = compute("prepared", case, activation="silu")
    w13, w2 = (torch.nn.Parameter(case[n].clone(), requires_grad=False) for n in ("w13", "w2"))
    prepared = prepare_weights(w13, w2, activation="silu", release=True)
    if prepared is None:
        pytest.skip("oneDNN has no prepacked bfloat16 product here")
    assert w13.shape == case["w13"].shape and w2.shape == case["w2"].shape
    assert w13.untyped_storage().nbytes() == w2.untyped_storage().nbytes() == 2
    call = [case[n] for n in ("weights_TK", "experts_TK")]
    assert torch.equal(fused_experts_prepared(case["hidden_TH"], prepared, *call), expected)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_unpacked_weights_are_the_packed_ones(name: str) -> None:
    case = make_case(gated=not name.endswith("_no_mul"))
    options = PARAMETERS.get(name, {})
    prepared = prepare_weights(case["w13"], case["w2"], activation=name, **options)
    if prepared is None:
        pytest.skip("oneDNN has no prepacked bfloat16 product here")
    w13, w2 = unpack_weights(prepared)
    assert torch.equal(w13, case["w13"]) and torch.equal(w2, case["w2"])
    assert w13.is_contiguous() and w2.is_contiguous()


def test_no_packed_product_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_can_pack", lambda dtype: False)
    case = make_case()
    w13 = case["w13"].clone()
    assert prepare_weights(w13, case["w2"], activation="silu", release=True) is None
    assert torch.equal(w13, case["w13"])


def test_padded_rows_adds_a_sixteenth_at_most() -> None:
    sizes = [module.padded_rows(n) for n in range(1, 513)]
    assert sizes[:32] == list(range(1, 33))
    assert all(n <= size < n * 17 / 16 + 1e-9 for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 32 + 4 * 16
    assert module.padded_rows(100) == 100 and module.padded_rows(101) == 104


def test_worked_example() -> None:
    out = fused_experts_torch(
        torch.tensor([[3.0]]),
        torch.tensor([[[1.0]], [[2.0]]]),
        torch.tensor([[[1.0]], [[10.0]]]),
        torch.tensor([[0.5, 0.1]]),
        torch.tensor([[0, 1]]),
        activation="relu2_no_mul",
    )
    torch.testing.assert_close(out, torch.tensor([[40.5]]))


def test_experts_of_no_width_give_zero():
    """What the kernels refuse, plain torch computes: sums over nothing."""
    sizes = torch.zeros(2, 0, 4), torch.zeros(2, 4, 0)
    assert prepare_weights(*sizes, activation="silu") is None
    call = torch.rand(3, 1), torch.zeros(3, 1).int()
    got = fused_experts_torch(torch.rand(3, 4), *sizes, *call, activation="silu")
    assert torch.equal(got, torch.zeros(3, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, r"'relu'.*silu.*swigluoai"),
        (
            {"activation": "silu_no_mul"},
            r"w13 has the shape \[5, 80, 24\], but it must be \[5, 40, 24\]",
        ),
        ({"activation": "swigluoai_uninterleave"}, "swiglu_limit None"),
        ({"activation": "situ"}, "situ_beta None"),
        ({"w13": torch.zeros(5, 80).bfloat16()}, r"\[5, 80\], but it must be \[5, 80, 24\]"),
        (
            {"w13": torch.zeros(5, 80, 24)},
            "w13 is torch.float32, but it must be torch.bfloat16, by w2",
        ),
        ({"hidden_TH": torch.zeros(13, 23).bfloat16()}, r"\[13, 23\], but it must be \[T, 24\]"),
        ({"hidden_TH": torch.zeros(13, 24)}, "torch.float32, but it must be torch.bfloat16"),
        ({"experts_TK": torch.zeros(12, 2).int()}, r"\[12, 2\], but it must be \[13, K\]"),
        (
            {"experts_TK": torch.zeros(13, 2)},
            "torch.float32, but it must be torch.int32 or torch.int64",
        ),
        ({"experts_TK": torch.full((13, 2), 5)}, "ids 5 to 5, but they must be from -1 to 4"),
        ({"experts_TK": torch.full((13, 2), -2)}, "ids -2 to -2, but they must be from -1 to 4"),
        ({"weights_TK": torch.zeros(13, 3)}, r"\[13, 3\], but it must be \[13, 2\]"),
        ({"weights_TK": torch.zeros(13, 2).half()}, "torch.float16, but it must be torch.float32"),
        ({"expert_map": torch.zeros(9)}, "torch.float32, but it must be torch.int32"),
        ({"expert_map": torch.full((9,), 5).int()}, "leads to expert 5, but it must be at most 4"),
        ({"w13_bias": torch.zeros(5, 24)}, r"w13_bias .*\[5, 24\], but it must be \[5, 80\]"),
        ({"w2_bias": torch.zeros(5, 80)}, r"w2_bias .*\[5, 80\], but it must be \[5, 24\]"),
        (
            {"w2_bias": torch.zeros(5, 24).int()},
            "w2_bias is torch.int32, but it must be torch.bfloat16",
        ),
        ({"out": torch.zeros(13, 23).bfloat16()}, r"out .*\[13, 23\], but it must be \[13, 24\]"),
        ({"out": torch.zeros(13, 24)}, "out is torch.float32, but it must be torch.bfloat16"),
    ],
)
def test_errors_name_both_values(change: dict[str, Any], message: str) -> None:
    case = make_case() | {"activation": "silu"} | change
    with pytest.raises(ValueError, match=message):
        fused_experts_torch(**case)
