"""The table of vLLM's expert kernels, and what vLLM chooses by it: its real classes and oracles."""

import contextlib
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from routers import MIXTRAL, make, prompt_of_one_request
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import fused_moe
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.oracle import fp8, mxfp4, unquantized
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kFp8Dynamic128Sym,
    kFp8Static128BlockSym,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum

from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration import kernels, layer_checks
from vllm_capmoe.integration.compat import vllm_version
from vllm_capmoe.integration.kernels import KERNELS, Dropped, dropped_by
from vllm_capmoe.integration.layer_checks import check_layer

REFUSED = (Dropped.REFUSED, Dropped.REFUSED_IN_MODE)
# Nothing is dropped: vLLM's choice stays, and its batches of a fixed size are served.
DROPLESS: tuple[dict[str, Any], ...] = (
    {"mode": "off", "decode_keep": 1},
    {"mode": "drop", "observe": True},
)
# Not on CUDA and not on the CPU: a mode is refused there.
ELSEWHERE = ("aiter", "xpu", "rdna3", "mxfp8_native")


@functools.cache
def vllms_classes() -> list[type]:
    """All classes of vLLM that compute experts, from every module that can be imported here."""
    for module in pkgutil.walk_packages(fused_moe.__path__, fused_moe.__name__ + "."):
        if "prepare_finalize" not in module.name and ".router." not in module.name:
            importlib.import_module(module.name)

    def below(kind: type) -> Iterator[type]:
        for sub in kind.__subclasses__():
            yield from (sub, *below(sub))

    found = [c for c in below(mk.FusedMoEExperts) if c.__module__.startswith("vllm.")]
    return [c for c in found if not inspect.isabstract(c) and not c.__name__.endswith("Base")]


def test_the_table_has_every_kernel_of_vllm_and_no_other():
    here = {
        kind.__name__
        for kind in vllms_classes()
        if not any(word in kind.__module__ for word in ELSEWHERE)
    }
    newer = set() if vllm_version().startswith("0.33") else {"TrtLlmMxfp4LoRAExperts"}
    assert set(KERNELS) == here | newer


def test_what_vllm_calls_monolithic_or_batched_is_refused_and_nothing_else_by_mistake():
    for kind in vllms_classes():
        batched = kind.activation_format() is mk.FusedMoEActivationFormat.BatchedExperts
        if kind.is_monolithic():
            assert dropped_by(kind) is Dropped.REFUSED, kind
        elif batched and kind.__name__ in KERNELS:
            assert dropped_by(kind) is Dropped.REFUSED_IN_MODE, kind
        elif kind.__name__ in KERNELS:
            assert dropped_by(kind) is KERNELS[kind.__name__][0], kind


def test_a_class_that_only_looks_like_vllms_is_not_known_to_skip():
    triton = next(kind for kind in vllms_classes() if kind.__name__ == "TritonExperts")
    assert dropped_by(triton) is Dropped.SKIPPED
    assert dropped_by(type("TritonExperts", (triton,), {})) is Dropped.WEIGHT_ZERO


def test_the_page_is_what_the_table_says(repo_root: Path):
    """If it fails: python -m vllm_capmoe.integration.kernels > docs/vllm_kernels.md"""
    assert (repo_root / "docs" / "vllm_kernels.md").read_text() == kernels.markdown()


# --- What vLLM chooses on a Hopper ----------------------------------------------------------


def moe_config(routing: RoutingMethodType, activation: MoEActivation, ep: int) -> FusedMoEConfig:
    parallel = FusedMoEParallelConfig.make_no_parallel()
    parallel.ep_size, parallel.use_ep = ep, ep > 1
    return FusedMoEConfig(
        num_experts=32,
        experts_per_token=4,
        hidden_dim=2048,
        intermediate_size=1024,
        num_local_experts=32 // ep,
        num_logical_experts=32,
        activation=activation,
        device="cuda",
        routing_method=routing,
        moe_parallel_config=parallel,
        in_dtype=torch.bfloat16,
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the oracles ask of the platform and of other libraries, as an H100 would answer."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "_enum", PlatformEnum.CUDA)
    monkeypatch.setattr(
        platform,
        "get_device_capability",
        classmethod(lambda cls, device_id=0: DeviceCapability(9, 0)),
    )
    monkeypatch.setattr(platform, "supports_fp8", classmethod(lambda cls: True))
    for module, name in (
        ("flashinfer_cutlass_moe", "has_flashinfer_cutlass_fused_moe"),
        ("gpt_oss_triton_kernels_moe", "has_triton_kernels"),
    ):
        module = importlib.import_module(f"{fused_moe.__name__}.experts.{module}")
        monkeypatch.setattr(module, name, lambda: True)


@contextlib.contextmanager
def choosing(mode: str, **settings: Any) -> Iterator[None]:
    """vLLM's oracles as they are under a mode."""
    vllm_config = VllmConfig()
    vllm_config.model_config = SimpleNamespace(
        quantization_config=None, hf_text_config=SimpleNamespace()
    )  # all that the oracles read of the model
    vllm_config.additional_config = {
        "moe_capacity": CapacityConfig(mode=mode, **settings).to_dict()
    }
    with pytest.MonkeyPatch.context() as patch, set_current_vllm_config(vllm_config):
        for seam in kernels.patches():
            patch.setattr(seam.owner, seam.name, seam.make(seam.original()[1]))
        yield


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("ep", [1, 2])
def test_fp8_in_blocks_goes_to_a_kernel_that_skips(ep: int):
    config = moe_config(RoutingMethodType.Custom, MoEActivation.SILU, ep)
    keys = (kFp8Static128BlockSym, kFp8Dynamic128Sym)
    with choosing("off"):
        backend, stock = fp8.select_fp8_moe_backend(config, *keys, allow_vllm_cutlass=True)
    assert backend.name == ("FLASHINFER_CUTLASS" if ep > 1 else "TRITON")
    with choosing("drop"):
        _, ours = fp8.select_fp8_moe_backend(config, *keys, allow_vllm_cutlass=True)
        assert dropped_by(ours) is Dropped.SKIPPED
        config.moe_backend = "flashinfer_cutlass"  # who names one gets it
        backend, named = fp8.select_fp8_moe_backend(config, *keys, allow_vllm_cutlass=True)
    assert backend.name == "FLASHINFER_CUTLASS" and dropped_by(named) is Dropped.WEIGHT_ZERO
    assert ep == 1 or named is stock
    config.moe_backend = "auto"
    for settings in DROPLESS:
        with choosing(**settings):
            _, kept = fp8.select_fp8_moe_backend(config, *keys, allow_vllm_cutlass=True)
        assert kept is stock


@pytest.mark.usefixtures("hopper")
def test_preferred_backends_skip_by_the_table():
    for oracle, backends in ((fp8, fp8.Fp8MoeBackend), (unquantized, None)):
        kinds = backends or unquantized.UnquantizedMoeBackend
        for name in set(kernels.PREFERRED) & set(kinds.__members__):
            for kind in oracle.backend_to_kernel_cls(kinds[name]):
                assert dropped_by(kind) is Dropped.SKIPPED
    with choosing("drop"):
        config = moe_config(RoutingMethodType.Custom, MoEActivation.SILU, 1)
        for order in (
            fp8._get_priority_backends(config, kFp8Static128BlockSym, kFp8Dynamic128Sym),
            unquantized._get_priority_backends(config),
        ):
            assert order[0].name in kernels.PREFERRED


@pytest.mark.usefixtures("hopper")
def test_gpt_oss_goes_past_the_kernel_that_routes_by_itself():
    """On 0.32 by what our router says; vLLM's own says Renormalize for it."""
    made = make(MIXTRAL, prompt_of_one_request(), mode="drop")
    assert made.routing_method_type is RoutingMethodType.Custom
    assert not made.supports_monolithic_kernels
    activation = MoEActivation.SWIGLUOAI
    with choosing("off"):
        stock = mxfp4.select_mxfp4_moe_backend(
            moe_config(RoutingMethodType.Renormalize, activation, 1)
        )
    assert stock[1].is_monolithic()
    with choosing("drop"):
        _, kind = mxfp4.select_mxfp4_moe_backend(
            moe_config(made.routing_method_type, activation, 1)
        )
    assert not kind.is_monolithic() and dropped_by(kind) is Dropped.SKIPPED


def test_on_cuda_no_monolithic_kernel_takes_custom_and_all_others_do():
    keys = (kFp8Static128BlockSym, kFp8Dynamic128Sym)
    for kind in vllms_classes():
        if kind.__name__ not in KERNELS or re.search("cpu|zentorch", kind.__module__):
            continue
        try:
            served = kind._supports_routing_method(RoutingMethodType.Custom, *keys)
        except ValueError:  # weights of another kind
            assert kind.is_monolithic(), kind
            continue
        if kind.is_monolithic() or dropped_by(kind) not in REFUSED:
            assert served is not kind.is_monolithic(), kind


# --- Refused before weights are loaded ------------------------------------------------------


def layer(kind: type | None, router: Any) -> Any:
    method = SimpleNamespace(moe_kernel=None, experts_cls=kind)
    return SimpleNamespace(
        layer_name="model.layers.0.mlp.experts",
        router=router,
        routed_experts=SimpleNamespace(quant_method=method),
        is_monolithic=kind is not None and kind.is_monolithic(),
    )


def test_a_layer_is_refused_by_the_table():
    router = make(MIXTRAL, prompt_of_one_request(), mode="drop")
    config = CapacityConfig(mode="drop")
    for kind in vllms_classes():
        made = layer(kind, router)
        if dropped_by(kind) in REFUSED:
            pattern = rf"'drop', but layer model.*\(.*{kind.__name__}\): accept"
            with pytest.raises(ValueError, match=pattern):
                check_layer(config, made)
        else:
            check_layer(config, made)
        for settings in DROPLESS:
            asks = CapacityConfig(**settings)
            if dropped_by(kind) is Dropped.REFUSED:
                with pytest.raises(ValueError, match=kind.__name__):
                    check_layer(asks, made)
            else:
                check_layer(asks, made)
        made.router = router.inner
        with pytest.raises(ValueError, match=r"routes by itself.*\(CPURouter"):
            check_layer(config, made)
    check_layer(config, layer(None, router))  # its kernel is made with its weights


def test_a_layer_is_looked_at_when_it_is_made():
    router = make(MIXTRAL, prompt_of_one_request(), mode="drop")
    monolithic = next(kind for kind in vllms_classes() if kind.is_monolithic())
    (init,) = layer_checks.patches()
    made = init.make(lambda self: vars(self).update(vars(layer(monolithic, router))))
    with choosing("off"):
        made(SimpleNamespace())
    with choosing("drop"), pytest.raises(ValueError, match=monolithic.__name__):
        made(SimpleNamespace())
