"""Models of random weights for the engine benchmark: config.json, and a load format for vLLM.

The tensors are made on the device, under the names of a checkpoint, and go through the model's own
`load_weights`. Their scale is that of examples/make_mixtral.py, which explains it: every embedding
has the same component along a direction u, which nothing in the model writes and only the routers
read, so a router's share of u is a constant logit per expert, and its skew is known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _shapes

LOAD_FORMAT = "capmoe_random"
SHARE_U = 0.6  # of an embedding of root mean square 1, along u
RMS_ATTENTION = 0.35  # what attention adds
RMS_EXPERT = 1.2  # what one expert returns
MIX = 0.75  # of one expert's, what the k experts of a token add up to

_MIXTRAL = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
# Many small experts, 1.2 GB of them in 6 layers: for steps of decode tokens.
_FINE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "moe_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 6,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 8192,
    "rope_theta": 1000000.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral-8x7b": _MIXTRAL,
    "olmoe": {
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "vocab_size": 50304,
        "rope_theta": 10000.0,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_hidden_layers": 48,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
    },
    "fine": _FINE,
    "tiny-fine": _FINE
    | {
        "hidden_size": 128,
        "moe_intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "num_hidden_layers": 2,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "vocab_size": 512,
    },
    "tiny": _MIXTRAL
    | {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "vocab_size": 512,
    },
}


def write_config(folder: Path, model: str, layers: int) -> Path:
    """A model folder with a config.json and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    config = MODELS[model] | {
        "num_hidden_layers": layers,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def register_loader() -> None:
    """Teach vLLM, in this process, the load format `LOAD_FORMAT`."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader(LOAD_FORMAT)
    class RandomLoader(BaseModelLoader):
        def download_model(self, model_config: Any) -> None:
            """Nothing to download."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            device = next(model.parameters()).device
            skew = self.load_config.model_loader_extra_config["skew"]
            model.load_weights(tensors(model_config.hf_config, device, skew))


def tensors(config: Any, device: Any, skew: float, seed: int = 0) -> Iterator[tuple[str, Any]]:
    """Name and bfloat16 value of every tensor of the checkpoint, made when asked for.

    config: the model's, as transformers has it. skew: largest load over the mean, in each layer at
    another expert.
    """
    import torch

    kind = config.model_type
    H, V, k = config.hidden_size, config.vocab_size, config.num_experts_per_tok
    I = getattr(config, "moe_intermediate_size", config.intermediate_size)  # noqa: E741
    E = config.num_local_experts if kind == "mixtral" else config.num_experts
    head = getattr(config, "head_dim", None) or H // config.num_attention_heads
    q_width, kv_width = config.num_attention_heads * head, config.num_key_value_heads * head
    generator = torch.Generator(device).manual_seed(seed)
    sign_H = torch.randint(0, 2, (H,), generator=generator, device=device) * 2 - 1
    u_H = sign_H.float() / math.sqrt(H)

    def rows(count: int, width: int, std: float) -> Any:
        """[count, width]; maps a vector of root mean square 1 to entries of that deviation."""
        new = torch.randn(count, width, generator=generator, device=device, dtype=torch.float32)
        return new.mul_(std / math.sqrt(width))

    def blind(count: int, std: float) -> Any:
        """Doesn't read u."""
        matrix = rows(count, H, std)
        return matrix.sub_((matrix @ u_H)[:, None] * u_H)

    def mute(width: int, std: float) -> Any:
        """Doesn't write u."""
        matrix = rows(H, width, std)
        return matrix.sub_(u_H[:, None] * (u_H @ matrix))

    def ones(count: int) -> Any:
        return torch.ones(count, device=device, dtype=torch.bfloat16)

    moe, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    if kind == "mixtral":
        moe, names = "block_sparse_moe", ("w1", "w3", "w2")
    bias_E = torch.tensor(_shapes.expert_bias(E, k, skew), dtype=torch.float32, device=device)
    own = math.sqrt(1 - SHARE_U**2)
    scale = math.sqrt(H)
    yield "model.embed_tokens.weight", (blind(V, own * scale) + SHARE_U * scale * u_H).bfloat16()
    square = own**2  # mean square of the residual stream without u
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", ones(H)
        yield f"{name}.self_attn.q_proj.weight", blind(q_width, math.sqrt(2)).bfloat16()
        yield f"{name}.self_attn.k_proj.weight", blind(kv_width, math.sqrt(2)).bfloat16()
        yield f"{name}.self_attn.v_proj.weight", blind(kv_width, 1.0).bfloat16()
        yield f"{name}.self_attn.o_proj.weight", mute(q_width, 2 * RMS_ATTENTION).bfloat16()
        if kind == "olmoe":
            yield f"{name}.self_attn.q_norm.weight", ones(q_width)
            yield f"{name}.self_attn.k_norm.weight", ones(kv_width)
        if kind == "qwen3_moe":
            yield f"{name}.self_attn.q_norm.weight", ones(head)
            yield f"{name}.self_attn.k_norm.weight", ones(head)
        square += RMS_ATTENTION**2
        yield f"{name}.post_attention_layernorm.weight", ones(H)
        # RMSNorm leaves share_u of u; the noise of the other part has deviation 1.
        share_u = SHARE_U / math.sqrt(SHARE_U**2 + square)
        own_share = math.sqrt(1 - share_u**2)
        gate = blind(E, 1.0 / own_share)
        gate += bias_E.roll(3 * layer + 1)[:, None] * u_H / (share_u * scale)
        yield f"{name}.{moe}.gate.weight", gate.bfloat16()
        for expert in range(E):
            prefix = f"{name}.{moe}.experts.{expert}"
            yield f"{prefix}.{names[0]}.weight", blind(I, 1.5).bfloat16()
            yield f"{prefix}.{names[1]}.weight", blind(I, 1.5).bfloat16()
            yield f"{prefix}.{names[2]}.weight", mute(I, RMS_EXPERT / 1.4).bfloat16()
        square += (MIX * RMS_EXPERT) ** 2
    yield "model.norm.weight", ones(H)
    yield "lm_head.weight", blind(V, 4.0).bfloat16()
