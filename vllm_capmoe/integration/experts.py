"""The experts of a layer under a capacity mode, as one of vLLM's modular kernels.

vLLM prepares the rows (and, with data parallelism, gathers them from all ranks), calls `apply`
here, and reduces the result across ranks. Ours take any number of experts per token, dropped
assignments (-1) that cost nothing, and expert maps, which vLLM's CPU kernel doesn't.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import unquantized_fused_moe_method
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.topk_weight_and_reduce import TopKWeightAndReduceNoOP
from vllm.platforms import current_platform
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name

from vllm_capmoe import experts as torch_experts
from vllm_capmoe.experts import PreparedExperts
from vllm_capmoe.integration import checks, layer_checks
from vllm_capmoe.integration.compat import Function, Patch
from vllm_capmoe.integration.router import CapacityRouter
from vllm_capmoe.integration.settings import current_config


class CapacityExperts(mk.FusedMoEExpertsModular):
    """What `TorchExperts` and `TritonExperts` have in common."""

    layer_name: str = ""
    takes_weights = True  # as tensors, with every call; else they are its own

    @property
    def expects_unquantized_inputs(self) -> bool:
        return True

    @staticmethod
    def activation_format() -> mk.FusedMoEActivationFormat:
        return mk.FusedMoEActivationFormat.Standard

    @staticmethod
    def _supports_no_act_and_mul() -> bool:
        return True

    @staticmethod
    def _supports_quant_scheme(weight_key: object, activation_key: object) -> bool:
        return weight_key is None and activation_key is None

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: FusedMoEParallelConfig) -> bool:
        return True

    def workspace_shapes(
        self, M: int, N: int, K: int, *args: object, **kwargs: object
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """No workspaces; the output is [M tokens, K hidden]: weighted and summed already."""
        return (0,), (0,), (M, K)

    def finalize_weight_and_reduce_impl(self) -> mk.TopKWeightAndReduce:
        return TopKWeightAndReduceNoOP()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Let `experts_op` find this object by the layer."""
        self.layer_name = layer.layer_name
        layer.capacity_experts = self

    def _activation_arguments(self) -> dict[str, Any]:
        config = self.activation_config
        return {
            "activation": self.moe_config.activation.value,
            # vLLM's 1 and 0 stand for "not given"; what is given was put into the quant config.
            "swiglu_alpha": self.quant_config.gemm1_alpha,
            "swiglu_beta": self.quant_config.gemm1_beta,
            "swiglu_limit": config.clamp_limit,
            "situ_beta": config.activation_situ_beta,
            "situ_linear_beta": config.activation_situ_linear_beta,
        }

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: MoEActivation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: mk.ExpertTokensMetadata | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        if apply_router_weight_on_input:  # vLLM's prepare step has done it
            topk_weights = torch.ones_like(topk_weights)
        torch.ops.capmoe.experts(
            output,
            hidden_states,
            w1 if self.takes_weights else None,
            w2 if self.takes_weights else None,
            topk_weights,
            topk_ids,
            expert_map,
            _encode_layer_name(self.layer_name),
        )

    def compute(
        self,
        router: CapacityRouter,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor | None,
        w2: Tensor | None,
        weights: Tensor,
        experts: Tensor,
        expert_map: Tensor | None,
    ) -> None:
        """Write the weighted sum of the experts into `output` [T, H]."""
        raise NotImplementedError


class TorchExperts(CapacityExperts):
    """`vllm_capmoe.experts`: plain torch, for the CPU.

    The weights are repacked, and the layer's parameters are left without memory. Where somebody is
    about to read or write them, `open` brings them back; the next step repacks what is there then.
    """

    takes_weights = False  # a compiled graph would hold on to their strides
    prepared: PreparedExperts | None = None
    is_open = True

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cpu()

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation.value in torch_experts.ACTIVATIONS

    def process_weights_after_loading(self, layer: Any) -> None:
        """Repack the loaded weights, and be told of new ones."""
        super().process_weights_after_loading(layer)
        self.layer = layer
        self.repack()
        for parameter in (layer.w13_weight, layer.w2_weight, self.w1_bias, self.w2_bias):
            if hasattr(parameter, "weight_loader"):
                parameter.weight_loader = self._opening(parameter.weight_loader)

    def repack(self) -> None:
        self.is_open = False
        self.prepared = torch_experts.prepare_weights(
            self.layer.w13_weight,
            self.layer.w2_weight,
            w13_bias=self.w1_bias,
            w2_bias=self.w2_bias,
            release=True,
            **self._activation_arguments(),
        )

    def open(self) -> None:
        """Let the layer's parameters hold the weights again, until the next step."""
        if self.prepared is not None:
            w13, w2 = torch_experts.unpack_weights(self.prepared)
            self.layer.w13_weight.data, self.layer.w2_weight.data = w13, w2
        self.prepared, self.is_open = None, True

    def _opening(self, loader: Function) -> Function:
        @functools.wraps(loader)
        def weight_loader(*args: Any, **kwargs: Any) -> Any:
            self.open()
            return loader(*args, **kwargs)

        return weight_loader

    def compute(
        self,
        router: CapacityRouter,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor | None,
        w2: Tensor | None,
        weights: Tensor,
        experts: Tensor,
        expert_map: Tensor | None,
    ) -> None:
        if self.is_open:
            self.repack()
        if self.prepared is not None:
            torch_experts.fused_experts_prepared(
                hidden_states, self.prepared, weights, experts, expert_map=expert_map, out=output
            )
            return
        torch_experts.fused_experts_torch(
            hidden_states,
            self.layer.w13_weight,
            self.layer.w2_weight,
            weights,
            experts,
            expert_map=expert_map,
            w13_bias=self.w1_bias,
            w2_bias=self.w2_bias,
            out=output,
            **self._activation_arguments(),
        )


# Methods of vLLM's workers and model runners that read or write a model's parameters.
_OF_WORKERS = (
    "compute_weight_checksums",
    "reset_weights",
    "save_sharded_state",
    "save_tensorized_model",
    "start_draft_weight_update",
    "start_weight_update",
)
_OF_RUNNERS = ("reload_weights",)


def open_weights_for(worker: Any, layers: Iterable[Any]) -> None:
    """Let the worker find the weights of its MoE layers (`MoERunner`) where vLLM looks for them."""
    experts = [getattr(layer.routed_experts, "capacity_experts", None) for layer in layers]
    packed = [each for each in experts if isinstance(each, TorchExperts)]

    def opening(method: Function) -> Function:
        @functools.wraps(method)
        def with_weights(*args: Any, **kwargs: Any) -> Any:
            for each in packed:
                each.open()
            return method(*args, **kwargs)

        return with_weights

    for owner, names in ((worker, _OF_WORKERS), (worker.model_runner, _OF_RUNNERS)):
        for name in names if packed else ():
            setattr(owner, name, opening(getattr(owner, name)))


class TritonExperts(CapacityExperts):
    """`capmoe_kernels.experts`: Triton, for CUDA (and, for tests, Triton's interpreter)."""

    @staticmethod
    def _supports_current_device() -> bool:
        return current_platform.is_cuda() or checks.triton_is_interpreted()

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        from capmoe_kernels.experts import ACTIVATIONS

        return activation.value in ACTIVATIONS

    def compute(
        self,
        router: CapacityRouter,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor | None,
        w2: Tensor | None,
        weights: Tensor,
        experts: Tensor,
        expert_map: Tensor | None,
    ) -> None:
        from capmoe_kernels.experts import fused_experts

        assert w1 is not None and w2 is not None
        experts = experts.to(torch.int32)  # some all-to-all backends carry int64
        seats = router.seats_of(experts, w2.shape[0], expert_map)
        most_held = None
        if seats is None:  # rows of all ranks, whose experts are mostly elsewhere
            parallel = self.moe_config.moe_parallel_config
            sources = parallel.dp_size * parallel.sp_size
            most_held = router.most_held(experts.shape[0], w2.shape[0], sources)
        fused_experts(
            hidden_states,
            w1,
            w2,
            weights,
            experts,
            seats,
            expert_map=expert_map,
            # Without seats the rows come from several ranks, each with a limit of its own.
            max_rows_per_expert=None if seats is None else router.most_rows(experts.shape[0]),
            most_held=most_held,
            w13_bias=self.w1_bias,
            w2_bias=self.w2_bias,
            out=output,
            **self._activation_arguments(),
        )


def experts_op(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor | None,
    w2: torch.Tensor | None,
    weights: torch.Tensor,
    experts: torch.Tensor,
    expert_map: torch.Tensor | None,
    layer_name: LayerNameType,
) -> None:
    """`torch.ops.capmoe.experts`: the experts of the named layer, written into `output`."""
    runner = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    runner.routed_experts.capacity_experts.compute(
        runner.router, output, hidden_states, w1, w2, weights, experts, expert_map
    )


def experts_fake(
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor | None,
    w2: torch.Tensor | None,
    weights: torch.Tensor,
    experts: torch.Tensor,
    expert_map: torch.Tensor | None,
    layer_name: LayerNameType,
) -> None:
    """Nothing but `output` is written, and its shape is known."""


def patches() -> list[Patch]:
    """What chooses our experts for unquantised layers.

    vllm...unquantized_fused_moe_method.select_unquantized_moe_backend: the name by which that
        module knows the choice of a kernel. It can go once vLLM has a registry of MoE kernels.
    """
    method = unquantized_fused_moe_method
    return [Patch(method, "select_unquantized_moe_backend", _select, ("moe_config",))]


def _select(original: Function) -> Function:
    def select_unquantized_moe_backend(moe_config: FusedMoEConfig) -> Any:
        from vllm.config import get_current_vllm_config

        config = current_config()
        if not config.enabled:
            return original(moe_config)
        backend = checks.resolve_backend(config, get_current_vllm_config())
        if backend == "vllm":
            return original(moe_config)
        # By the name of the backend vLLM decides how to lay out the weights: these leave them.
        ours: tuple[Any, type[CapacityExperts]] = {
            "torch": (UnquantizedMoeBackend.CPU, TorchExperts),
            "triton": (UnquantizedMoeBackend.TRITON, TritonExperts),
        }[backend]
        layer_checks.check_backend(config, moe_config, ours[1])
        return ours

    return select_unquantized_moe_backend
