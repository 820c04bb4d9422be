"""What can't be served is refused before any weight is loaded, in one sentence that says why."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from engines import VLLM, environment, free_port
from vllm import platforms
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry

import vllm_capmoe
from vllm_capmoe import CapacityConfig
from vllm_capmoe.integration import checks, compat, rpc, worker

vllm_capmoe.register()


def engine_config(model: Path, **settings: Any) -> VllmConfig:
    """What `LLM(...)` does before it starts any process."""
    return EngineArgs(model=str(model), max_model_len=128, **settings).create_engine_config()


@pytest.fixture(scope="session")
def dense_model(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama: the example's tokenizer with another configuration, and no weights at all."""
    path = tmp_path_factory.mktemp("models") / "dense"
    shutil.copytree(example_model, path, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((path / "config.json").read_text())
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    keys += ("num_hidden_layers", "vocab_size", "max_position_embeddings", "rms_norm_eps")
    kept = {key: config[key] for key in keys}
    llama = {**kept, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (path / "config.json").write_text(json.dumps(llama))
    return path


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "max_experts below k": (
        {"moe_capacity_mode": "expanded", "moe_capacity_max_experts": 1},
        "--moe-capacity-max-experts is 1, but .* gives each token 2 experts: an integer >= 2",
    ),
    "local candidates without owners": (
        {"moe_capacity_mode": "expanded", "moe_capacity_candidates": "local"},
        "--moe-capacity-candidates is 'local', but no token belongs to one rank here: 'auto' or",
    ),
    "priority without images": (
        {"moe_capacity_mode": "drop", "moe_capacity_priority": "image-first"},
        "--moe-capacity-priority is 'image-first', but .*: 'uniform' is accepted",
    ),
    "a layer that the model doesn't have": (
        {"moe_capacity_mode": "drop", "moe_capacity_layers": {"1-4": {"factor": 1.0}}},
        "--moe-capacity-layers names the layers '1-4', but .* has the layers 0 to 3",
    ),
    "a setting of one layer": (
        {"moe_capacity_layers": {"2": {"mode": "expanded", "max_experts": 1}}},
        "--moe-capacity-max-experts is 1, but .* gives each token 2 experts",
    ),
    "unknown key": (
        {"additional_config": {"moe_capacity": {"mode": "drop", "gamma": 1}}},
        "unknown key 'gamma', but the accepted keys are mode, factor",
    ),
    "no dict": (
        {"additional_config": {"moe_capacity": "drop"}},
        r"additional_config\[\"moe_capacity\"\] is 'drop', but a dict of settings is accepted",
    ),
    "bad value in the dict": (
        {"additional_config": {"moe_capacity": {"mode": "drop", "factor": "1.5x"}}},
        "--moe-capacity-factor is '1.5x', but it must be a number > 0 or inf",
    ),
    "a kernel of vLLM's, and ours": (
        {"moe_capacity_mode": "drop", "moe_backend": "triton"},
        "--moe-backend is 'triton', but --moe-capacity-backend 'auto' has the experts computed by "
        "'(torch|triton)': 'auto', or --moe-capacity-backend 'vllm', is accepted",
    ),
    "lora": (
        {"moe_capacity_mode": "drop", "enable_lora": True},
        "--moe-capacity-mode is 'drop', but --enable-lora is True",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(example_model, settings, message):
    with pytest.raises(ValueError, match=message):
        engine_config(example_model, **settings)


@pytest.mark.cpu
def test_triton_needs_a_gpu(example_model):
    message = "backend is 'triton', but the platform is 'cpu': 'auto', 'torch' or 'vllm'"
    with pytest.raises(ValueError, match=message):
        engine_config(example_model, moe_capacity_mode="drop", moe_capacity_backend="triton")


def test_the_same_engine_without_the_setting_is_accepted(example_model):
    config = engine_config(example_model, moe_capacity_mode="expanded")
    assert config.additional_config["moe_capacity"]["mode"] == "expanded"


def test_a_dense_model_is_refused_with_a_mode_and_served_without(dense_model):
    with pytest.raises(ValueError, match="has no Mixture-of-Experts layers: a mode other than"):
        engine_config(dense_model, moe_capacity_mode="drop")
    engine_config(dense_model, moe_capacity_mode="off", moe_capacity_factor=1.0)


def test_batch_invariance_refuses_scope_batch(example_model, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="--moe-capacity-scope is 'batch'.*VLLM_BATCH_INVARIANT=1"):
        engine_config(example_model, moe_capacity_mode="drop")
    settings = {"moe_capacity_mode": "drop", "moe_capacity_scope": "request"}
    with pytest.raises(
        ValueError, match="backend is 'auto'.*VLLM_BATCH_INVARIANT=1.*'vllm' is acc"
    ):
        engine_config(example_model, **settings)
    engine_config(example_model, **settings, moe_capacity_backend="vllm")


@pytest.mark.parametrize("plugins", ["", "other", "other,another"])
def test_plugins_without_this_one_are_refused_with_a_mode(example_model, monkeypatch, plugins):
    """The processes that vLLM starts would be without it, and serve stock."""
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    with pytest.raises(
        ValueError, match=f"mode is 'drop', but VLLM_PLUGINS is '{plugins}', .*'cap"
    ):
        engine_config(example_model, moe_capacity_mode="drop")
    engine_config(example_model)
    monkeypatch.setenv("VLLM_PLUGINS", f"capmoe,{plugins}")
    engine_config(example_model, moe_capacity_mode="drop")


def test_decode_keep_is_refused_where_neighbours_must_not_matter(example_model, monkeypatch):
    asked = {"moe_capacity_decode_keep": 1}
    engine_config(example_model, **asked)
    with pytest.raises(ValueError, match="decode-keep is 1, but .*scope is 'request'"):
        engine_config(example_model, **asked, moe_capacity_scope="request")
    with pytest.raises(ValueError, match="decode-keep is 3, but a token has 2 experts"):
        engine_config(example_model, moe_capacity_decode_keep=3)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="decode-keep is 1, under .*VLLM_BATCH_INVARIANT=1"):
        engine_config(example_model, **asked)


def test_a_hidden_padding_mask_is_refused(example_model, monkeypatch):
    monkeypatch.setenv("VLLM_MOE_SKIP_PADDING", "0")
    with pytest.raises(ValueError, match="VLLM_MOE_SKIP_PADDING=0 hides"):
        engine_config(example_model, moe_capacity_mode="drop")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("enable_dbo", True, "--enable-dbo is True: False is accepted"),
        ("prefill_context_parallel_size", 2, "--prefill-context-parallel-size is 2: 1 is accepted"),
        ("enable_elastic_ep", True, "--enable-elastic-ep is True: False is accepted"),
    ],
)
def test_layouts_that_are_not_served(example_model, setting, value, message):
    """Set on the finished configuration, since vLLM's CPU platform turns some of them off."""
    config = engine_config(example_model)
    setattr(config.parallel_config, setting, value)
    with pytest.raises(ValueError, match=f"--moe-capacity-mode is 'drop', but {message}"):
        checks.check_engine(CapacityConfig(mode="drop"), config)


@pytest.mark.parametrize("name", checks.UNSERVED_MODELS)
def test_models_that_would_be_routed_wrongly(example_model, name):
    config = engine_config(example_model)
    config.model_config.model_arch_config.architectures = [name]
    assert ModelRegistry.get_supported_archs() >= {name} or name == "FlintForCausalLM"  # of 0.33
    with pytest.raises(ValueError, match=f"mode is 'drop', but {name} .*: 'off' is accepted"):
        checks.check_engine(CapacityConfig(mode="drop"), config)


def test_rows_of_last_tokens_only_are_refused(example_model):
    config = engine_config(example_model)
    config.cache_config.kv_sharing_fast_prefill = True
    with pytest.raises(ValueError, match="--kv-sharing-fast-prefill is True: False is accepted"):
        checks.check_engine(CapacityConfig(mode="drop"), config)


def test_captured_experts_are_refused(example_model):
    """A capture buffer holds exactly the top-k of a token."""
    config = engine_config(example_model)
    config.aux_output_config.enable_return_routed_experts = True
    with pytest.raises(ValueError, match="--enable-return-routed-experts is True: False is"):
        checks.check_engine(CapacityConfig(mode="drop"), config)


def test_recording_under_cuda_graphs_is_refused(example_model):
    config = engine_config(example_model)
    rpc.moe_capacity_record(config, True)  # no graphs on the CPU
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    with pytest.raises(ValueError, match="FULL_AND_PIECEWISE: --enforce-eager is"):
        rpc.moe_capacity_record(config, True)
    rpc.moe_capacity_record(config, False)


def test_quantised_weights_go_to_vllms_kernels(example_model):
    config = engine_config(example_model)
    config.model_config.quantization = "fp8"
    assert checks.resolve_backend(CapacityConfig(mode="drop"), config) == "vllm"
    with pytest.raises(ValueError, match=r"--moe-capacity-backend is 'torch', but .*\(fp8\)"):
        checks.resolve_backend(CapacityConfig(mode="drop", backend="torch"), config)


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "1.0.0"])
def test_another_vllm_is_refused_with_a_mode_and_served_without(
    example_model, monkeypatch, version
):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(compat.IncompatibleVLLMError, match=f"0.32 and 0.33, but vLLM {version}"):
        engine_config(example_model, moe_capacity_mode="drop")
    engine_config(example_model)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.2rc1"])
def test_supported_versions(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    compat.check_version()


class Moved:
    """A class of a vLLM that has changed."""

    def method(self, other: int) -> int:
        return other


def same(original: compat.Function) -> compat.Function:
    return original


def test_a_seam_that_is_gone_is_named():
    with pytest.raises(compat.IncompatibleVLLMError, match=r"has no .*Moved\.gone"):
        compat.apply(lambda: [compat.Patch(Moved, "gone", same, ())])


def test_a_seam_that_takes_something_else_is_named_and_nothing_is_patched():
    before = Moved.method
    with pytest.raises(compat.IncompatibleVLLMError, match=r"takes .*'other'.*without \['this'\]"):
        compat.apply(
            lambda: [compat.Patch(Moved, "method", lambda original: print, ("other",))],
            lambda: [compat.Patch(Moved, "method", same, ("this",))],
        )
    assert Moved.method is before


def test_a_seam_is_wrapped_at_most_once():
    class Owner:
        @staticmethod
        def method() -> list[str]:
            return ["theirs"]

    def wrapped(original: compat.Function) -> compat.Function:
        return lambda: [*original(), "ours"]

    for _ in range(2):
        compat.apply(lambda: [compat.Patch(Owner, "method", wrapped, ())])
    assert Owner.method() == ["theirs", "ours"]


def test_another_platform_is_refused(example_model, monkeypatch):
    config = engine_config(example_model)
    tpu = SimpleNamespace(device_name="tpu", is_cpu=lambda: False, is_cuda=lambda: False)
    monkeypatch.setattr(platforms, "current_platform", tpu)
    with pytest.raises(ValueError, match="but the platform is 'tpu': it is accepted on CUDA and"):
        checks.resolve_backend(CapacityConfig(mode="drop"), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("vllm.__version__", "0.31.0"), "needs vLLM 0.32 and 0.33, but vLLM 0.31.0 is installed"),
        (("vllm.envs.VLLM_MOE_SKIP_PADDING", False), "VLLM_MOE_SKIP_PADDING=0 hides"),
        (("vllm_capmoe.integration.checks.UNSERVED_MODELS", {"MixtralForCausalLM": "is"}), "is:"),
    ],
)
def test_a_worker_checks_for_itself(example_model, monkeypatch, change, message):
    """It may run on another node than the front end did."""
    held = SimpleNamespace(vllm_config=engine_config(example_model))
    monkeypatch.setattr(*change, raising=False)
    with pytest.raises((ValueError, compat.IncompatibleVLLMError), match=message):
        worker.activate(held, CapacityConfig(mode="drop"))


CHANGED = """
import {module} as module
{change}
import vllm_capmoe
vllm_capmoe.register()
from vllm.engine.arg_utils import EngineArgs
EngineArgs(model={model!r}).create_engine_config()
print("off is served")
EngineArgs(
    model={model!r}, additional_config={{"moe_capacity": {{"mode": "drop"}}}}
).create_engine_config()
print("a mode is served")
"""


@pytest.mark.engine
@pytest.mark.parametrize(
    ("module", "change"),
    [
        (
            "vllm.v1.worker.worker_base",
            "module.WorkerBase.__init__ = lambda self, config, rank: None",
        ),
        (
            "vllm.engine.arg_utils",
            "module.EngineArgs.from_cli_args = classmethod(lambda cls, namespace: None)",
        ),
        ("vllm.engine.arg_utils", "del module.AsyncEngineArgs"),
    ],
)
def test_a_vllm_with_another_seam_serves_off_and_refuses_a_mode(example_model, module, change):
    code = CHANGED.format(module=module, change=change, model=str(example_model))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert "off is served" in done.stdout and "a mode is served" not in done.stdout
    assert "IncompatibleVLLMError" in done.stderr and "leave --moe-capacity-mode off" in done.stderr


@pytest.mark.parametrize("key", ["moe-capacity", "moe_capacity_mode", "MoE_Capacity"])
def test_a_key_that_is_nearly_right_is_refused(example_model, key):
    with pytest.raises(ValueError, match=f"has the key '{key}', but 'moe_capacity' is accepted"):
        engine_config(example_model, additional_config={key: {"mode": "drop"}})


@pytest.mark.engine
@pytest.mark.parametrize(
    ("which", "arguments", "message", "code"),
    [
        ("moe", ["--moe-capacity-factor=0"], "--moe-capacity-factor is '0', but it must be", 2),
        (
            "moe",
            ["--additional-config", '{"moe_capacity": {"mode": "drop", "sharpness": 3}}'],
            "unknown key 'sharpness'",
            1,
        ),
        ("dense", ["--moe-capacity-mode=drop"], "has no Mixture-of-Experts layers", 1),
    ],
)
def test_the_process_ends_before_weights_are_loaded(
    example_model, dense_model, which, arguments, message, code
):
    model = {"moe": example_model, "dense": dense_model}[which]
    command = ["serve", str(model), "--port", str(free_port()), *arguments]
    refused(command, message, code)


@pytest.mark.engine
@pytest.mark.parametrize(
    "command", [("bench", "latency"), ("bench", "throughput"), ("run-batch",)], ids=" ".join
)
def test_the_flags_reach_the_engines_of_other_commands(dense_model, tmp_path, command):
    """Where they are refused for the model: an engine that is given them takes them."""
    files = {"-i": tmp_path / "in", "-o": tmp_path / "out"} if command == ("run-batch",) else {}
    line = '{"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {}}'
    for file in files.values():
        file.write_text(line)
    sizes = [] if files else ["--input-len=8", "--output-len=2"]
    sizes += ["--num-prompts=1", "--dataset-name=random"] if "throughput" in command else []
    given = [str(word) for item in files.items() for word in item]
    arguments = [*command, *given, *sizes, "--model", str(dense_model), "--moe-capacity-mode=drop"]
    refused(arguments, "--moe-capacity-mode is 'drop', but .* has no Mixture-of-Experts layers", 1)


def refused(command: list[str], message: str, code: int) -> None:
    """`vllm` ends with the message, before it has loaded anything."""
    done = subprocess.run(
        [VLLM, *command],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert re.search(message, output), output
    assert "Loading safetensors" not in output and "Loading weights" not in output
