"""Our experts as vLLM's modular kernels: what vLLM hands them is what they compute with."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routers import MIXTRAL, E, K, T, forward_context, make, prompt_of_one_request
from torch import Tensor
from vllm.forward_context import override_forward_context
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
    biased_moe_quant_config,
)

from vllm_capmoe import experts as torch_experts
from vllm_capmoe.integration import custom_ops
from vllm_capmoe.integration.experts import CapacityExperts, TorchExperts, TritonExperts, _select

HIDDEN, INTERMEDIATE = 32, 16
ALPHA, BETA, LIMIT = 1.3, 0.5, 0.7

Layer = Callable[..., Any]


def moe_config(dtype: torch.dtype = torch.float32, **more: Any) -> FusedMoEConfig:
    return FusedMoEConfig(
        num_experts=E,
        experts_per_token=K,
        hidden_dim=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=E,
        num_logical_experts=E,
        activation=MoEActivation.SWIGLUOAI,
        device="cpu",
        routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=dtype,
        **more,
    )


class GptOss:
    """A layer as gpt-oss has it, with biases and an activation of other than vLLM's parameters."""

    def __init__(self, kind: type[CapacityExperts], dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.hidden = random(T, HIDDEN)
        self.w13, self.b13 = random(E, 2 * INTERMEDIATE, HIDDEN) / 4, random(E, 2 * INTERMEDIATE)
        self.w2, self.b2 = random(E, HIDDEN, INTERMEDIATE) / 4, random(E, HIDDEN)
        self.weights = torch.rand(T, K, generator=generator)
        self.ids = torch.rand(T, E, generator=generator).topk(K).indices.int()
        self.ids[::3, 1] = -1
        quant = biased_moe_quant_config(self.b13, self.b2, ALPHA, BETA, LIMIT)
        self.experts = kind(moe_config(dtype), quant)
        self.layer = SimpleNamespace(
            layer_name="layer",
            w13_weight=torch.nn.Parameter(self.w13.clone(), requires_grad=False),
            w2_weight=torch.nn.Parameter(self.w2.clone(), requires_grad=False),
        )
        self.experts.process_weights_after_loading(self.layer)

    def expected(self, weights: Tensor) -> Tensor:
        """The formula, place by place, in float64."""
        out = torch.zeros(T, HIDDEN, dtype=torch.float64)
        for t, w in (self.ids >= 0).nonzero().tolist():
            e = int(self.ids[t, w])
            h = self.w13[e].double() @ self.hidden[t].double() + self.b13[e].double()
            gate, up = h[::2].clamp(max=LIMIT), h[1::2].clamp(-LIMIT, LIMIT)
            act = (up + BETA) * gate * torch.sigmoid(ALPHA * gate)
            out[t] += weights[t, w] * (self.w2[e].double() @ act + self.b2[e].double())
        return out

    def apply(self, ids: Tensor, on_input: bool = False) -> Tensor:
        custom_ops.register()
        router = make(MIXTRAL, prompt_of_one_request(), mode="drop", factor="inf")
        context = forward_context()
        context.no_compile_layers["layer"] = SimpleNamespace(
            routed_experts=self.layer, router=router
        )
        out, nothing = torch.full_like(self.hidden, torch.nan), torch.empty(0)
        w13, w2 = self.layer.w13_weight, self.layer.w2_weight
        with override_forward_context(context):
            self.experts.apply(
                out, self.hidden, w13, w2, self.weights, ids, MoEActivation.SWIGLUOAI, E, None,
                None, None, nothing, nothing, None, on_input,
            )  # fmt: skip
        return out


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("kind", [TorchExperts, TritonExperts])
def test_biases_and_parameters_of_the_activation_arrive(kind, ids, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = GptOss(kind)
    expected = made.expected(made.weights).float()
    torch.testing.assert_close(made.apply(made.ids.to(ids)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [TorchExperts, TritonExperts])
def test_weights_that_vllm_put_on_the_input_do_not_count_twice(kind, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    made = GptOss(kind)
    expected = made.expected(torch.ones(T, K)).float()
    torch.testing.assert_close(made.apply(made.ids, on_input=True), expected, rtol=1e-4, atol=1e-4)


def test_packed_weights_are_held_once():
    made = GptOss(TorchExperts)
    assert made.experts.prepared is not None
    for parameter in (made.layer.w13_weight, made.layer.w2_weight):
        assert parameter.untyped_storage().nbytes() == 4 and parameter.shape[0] == E


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_come_back_bit_for_bit_and_new_ones_are_packed(dtype):
    made = GptOss(TorchExperts, dtype)
    w13, w2 = made.layer.w13_weight, made.layer.w2_weight
    made.experts.open()
    assert torch.equal(w13, made.w13) and torch.equal(w2, made.w2)
    made.w2 = made.w2 * 2
    w2.data.copy_(made.w2)
    made.b2.zero_()  # the tensor that the configuration holds
    expected = made.expected(made.weights).to(dtype)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(made.apply(made.ids), expected, rtol=tolerance, atol=tolerance)
    packed = w2.untyped_storage().nbytes() == w2.element_size()
    # oneDNN of a CPU without AVX-512 has no packed product of bfloat16.
    assert packed == torch_experts._can_pack(dtype), "not packed again"


def test_what_cannot_be_packed_is_computed_as_it_is(monkeypatch):
    """float16 on a CPU whose oneDNN has no product for it."""
    monkeypatch.setattr(torch_experts, "_can_pack", lambda dtype: False)
    made = GptOss(TorchExperts, torch.float16)
    assert made.experts.prepared is None
    expected = made.expected(made.weights).half()
    torch.testing.assert_close(made.apply(made.ids), expected, rtol=2e-2, atol=2e-2)


def test_experts_that_ours_cannot_compute_are_refused(monkeypatch):
    class Config:
        additional_config = {"moe_capacity": {"mode": "drop"}}
        model_config = SimpleNamespace(quantization=None)
        parallel_config = SimpleNamespace(enable_expert_parallel=False)

    monkeypatch.setattr("vllm.config.get_current_vllm_config", lambda: Config)
    select = _select(lambda config: pytest.fail("vLLM chose"))
    with pytest.raises(ValueError, match="backend is 'auto', but kernel does not support LoRA"):
        select(moe_config(is_lora_enabled=True))
    assert select(moe_config())[1] is TorchExperts
