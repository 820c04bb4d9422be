"""Make a small Mixtral checkpoint with an unbalanced router, for demos and tests.

    python examples/make_mixtral.py OUT_DIR [--layers 4 --experts 8 --skew 1.0 ...]

The result is a folder as `mistralai/Mixtral-8x7B-Instruct-v0.1` is one: config.json, safetensors
under the same tensor names, and Mixtral's tokenizer (32000 pieces; the sentencepiece file ships in
`mistral_common`). vLLM and transformers load it offline. It is made in seconds, and is the same
again for the same options on the same machine.

The weights are random, so the model speaks word salad. What matters is their scale:

- Experts matter: what a mixture-of-experts block adds is about as large as what it is added to.
- The router is unbalanced. Mixtral's router has no bias, and RMSNorm has none either. So every
  embedding gets the same component along one direction u, nothing else in the model reads or
  writes u (their weights are orthogonal to it), and each router row has its own share of u: that
  is a constant logit per expert. The hot expert is another one in every layer.
- Greedy decoding has a margin: logits have standard deviation 4 over the vocabulary.

Letters: H hidden size, I intermediate size, E experts, V vocabulary, L layers.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER_FILE = "tokenizer.model.v1"  # the one of Mixtral-8x7B-Instruct-v0.1
HEAD_DIM = 64

# Sizes of what is in the residual stream, as root mean squares. The embedding has
# 1 = SHARE_U**2 + (its own part)**2.
SHARE_U = 0.6
RMS_ATTENTION = 0.35  # what one attention block adds, roughly
RMS_EXPERT = 1.2  # what one expert returns
STD_LOGIT_ROUTER = 1.0  # over tokens, for one expert
STD_LOGIT_OUTPUT = 4.0  # over the vocabulary, for one token
STD_ATTENTION_SCORE = 2.0  # so that attention picks some tokens rather than averaging all
# Only frequent words are ever the answer: it can be read, and with fewer candidates the best one
# is further ahead of the next (the gap is about STD_LOGIT_OUTPUT / sqrt(2 ln WORDS)).
WORDS = 1000
GAIN_OTHER_PIECES = 0.3

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ ' [INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role: ' + message['role']) }}{% endif %}"
    "{% endfor %}"
)


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Shape and randomness of the checkpoint.

    Raises ValueError where the numbers don't fit together.
    """

    layers: int = 4
    hidden: int = 256
    intermediate: int = 512
    experts: int = 8
    top_k: int = 2
    kv_heads: int = 2
    max_positions: int = 2048
    dtype: str = "bfloat16"
    seed: int = 0
    skew: float = 1.0
    """Logit of the hot expert above the mean of the others, in standard deviations; 0: balanced."""

    def __post_init__(self) -> None:
        for name in ("layers", "hidden", "intermediate", "experts", "kv_heads", "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden % HEAD_DIM:
            raise ValueError(f"hidden must be a multiple of {HEAD_DIM}, got {self.hidden}")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide {self.heads} heads, got {self.kv_heads}")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k must be 1 to {self.experts} experts, got {self.top_k}")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype must be bfloat16, float16 or float32, got {self.dtype!r}")

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM


def tokenizer_source() -> Path:
    """Mixtral's sentencepiece file inside the installed mistral_common."""
    import mistral_common

    path = Path(mistral_common.__file__).parent / "data" / TOKENIZER_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: this mistral_common ships no {TOKENIZER_FILE}")
    return path


def read_pieces(path: Path) -> list[tuple[str, float]]:
    """The pieces of a sentencepiece file with their scores, by token id."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    ids = range(processor.vocab_size())
    return [(processor.id_to_piece(i), processor.get_score(i)) for i in ids]


def write_tokenizer(folder: Path, pieces: list[tuple[str, float]], max_positions: int) -> None:
    """Write tokenizer.json (the same splits as the sentencepiece file) and its configuration."""
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
    from tokenizers.models import BPE

    vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
    # Sentencepiece merges the pair whose piece has the highest score, leftmost first. Runs of
    # spaces have one score, the lowest, so they grow from the left: longest first here.
    ranked = sorted(pieces, key=lambda entry: (-entry[1], -len(entry[0])))
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "pad_token": "</s>",
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_positions,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def model_config(options: ModelOptions, vocab_size: int) -> dict[str, object]:
    """config.json in the form of the published Mixtral checkpoints."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": options.hidden,
        "initializer_range": 0.02,
        "intermediate_size": options.intermediate,
        "max_position_embeddings": options.max_positions,
        "num_attention_heads": options.heads,
        "num_experts_per_tok": options.top_k,
        "num_hidden_layers": options.layers,
        "num_key_value_heads": options.kv_heads,
        "num_local_experts": options.experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": options.dtype,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def router_bias_E(options: ModelOptions, layer: int, generator: torch.Generator) -> torch.Tensor:
    """Constant router logits of one layer, [E] float32, in standard deviations.

    The hot expert gets `skew`, the others fall evenly from 0.5 * skew to -0.5 * skew * 1.5 or so,
    in random order: a router as found in the wild has a few cold experts, too.
    """
    others = torch.linspace(0.5, -0.75, max(options.experts - 1, 0)) * options.skew
    order = torch.randperm(options.experts, generator=generator)
    # The hot expert walks through all experts, so that neighbouring layers differ.
    hot = (3 * layer + options.seed + 1) % options.experts
    bias_E = torch.empty(options.experts)
    bias_E[order[order != hot]] = others
    bias_E[hot] = options.skew
    return bias_E


def tensors(options: ModelOptions, pieces: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and float32 value of every tensor of the checkpoint, in a fixed order."""
    H, I, E = options.hidden, options.intermediate, options.experts  # noqa: E741
    V, kv_width = len(pieces), options.kv_heads * HEAD_DIM
    generator = torch.Generator().manual_seed(options.seed)
    # Unit vector u with entries of one size: no single channel sticks out.
    u_H = (torch.randint(0, 2, (H,), generator=generator) * 2 - 1) / math.sqrt(H)

    def rows(count: int, width: int, std: float) -> torch.Tensor:
        """Random [count, width]; a vector of root mean square 1 maps to entries of size std."""
        return torch.randn(count, width, generator=generator) * (std / math.sqrt(width))

    def blind(count: int, std: float) -> torch.Tensor:
        """As rows(count, H, std), blind to u: what it returns doesn't depend on that component."""
        matrix = rows(count, H, std)
        return matrix - (matrix @ u_H)[:, None] * u_H

    def mute(width: int, std: float) -> torch.Tensor:
        """As rows(H, width, std), adding nothing along u."""
        matrix = rows(H, width, std)
        return matrix - u_H[:, None] * (u_H @ matrix)

    token_rms = math.sqrt(1 - SHARE_U**2)
    yield (
        "model.embed_tokens.weight",
        blind(V, token_rms * math.sqrt(H)) + SHARE_U * math.sqrt(H) * u_H,
    )
    # Mean square of the residual stream without u, as it grows; the router's share of u is
    # scaled by what RMSNorm leaves of u.
    square = token_rms**2
    # Of the k experts' outputs with weights that sum to one, about 0.75 of one expert's remains.
    mix = 0.75 if options.top_k > 1 else 1.0
    score_std = math.sqrt(STD_ATTENTION_SCORE)  # query times key, each with this deviation
    for layer in range(options.layers):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", torch.ones(H)
        yield f"{name}.self_attn.q_proj.weight", blind(H, score_std)
        yield f"{name}.self_attn.k_proj.weight", blind(kv_width, score_std)
        yield f"{name}.self_attn.v_proj.weight", blind(kv_width, 1.0)
        yield f"{name}.self_attn.o_proj.weight", mute(H, 2 * RMS_ATTENTION)
        square += RMS_ATTENTION**2
        share_u = SHARE_U / math.sqrt(SHARE_U**2 + square)
        yield f"{name}.post_attention_layernorm.weight", torch.ones(H)
        bias_E = router_bias_E(options, layer, generator) * STD_LOGIT_ROUTER
        yield (
            f"{name}.block_sparse_moe.gate.weight",
            blind(E, STD_LOGIT_ROUTER) + bias_E[:, None] * u_H / (share_u * math.sqrt(H)),
        )
        for expert in range(E):
            prefix = f"{name}.block_sparse_moe.experts.{expert}"
            # Gate and up entries have deviation 1.5; silu(gate) * up then has about 1.4.
            yield f"{prefix}.w1.weight", blind(I, 1.5)
            yield f"{prefix}.w3.weight", blind(I, 1.5)
            yield f"{prefix}.w2.weight", mute(I, RMS_EXPERT / 1.4)
        square += (mix * RMS_EXPERT) ** 2
    yield "model.norm.weight", torch.ones(H)
    words = [i for i, piece in enumerate(pieces) if is_word(piece)][:WORDS]  # by frequency
    gain_V = torch.full((V,), GAIN_OTHER_PIECES)
    gain_V[words] = 1.0
    yield "lm_head.weight", blind(V, STD_LOGIT_OUTPUT) * gain_V[:, None]


def is_word(piece: str) -> bool:
    """True for pieces that start a word of plain letters."""
    return piece.startswith("▁") and len(piece) > 3 and piece[1:].isascii() and piece[1:].isalpha()


def make_checkpoint(path: str | Path, **options: int | float | str) -> Path:
    """Write the checkpoint into the folder `path`, replacing a checkpoint that is there.

    `options` are the fields of ModelOptions. The folder appears whole or not at all.

    Returns the folder. Raises ValueError for options that don't fit together, and
    FileExistsError where `path` exists and is no model folder.
    """
    chosen = ModelOptions(**options)  # type: ignore[arg-type]
    source = tokenizer_source()
    pieces = read_pieces(source)
    with new_folder(path) as folder:
        write_json(folder / "config.json", model_config(chosen, len(pieces)))
        write_json(
            folder / "generation_config.json",
            {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False},
        )
        write_tokenizer(folder, pieces, chosen.max_positions)
        shutil.copyfile(source, folder / "tokenizer.model")
        dtype = getattr(torch, chosen.dtype)
        with one_thread():
            state = {
                name: value.to(dtype).contiguous()
                for name, value in tensors(chosen, [piece for piece, _ in pieces])
            }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return Path(path).absolute()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: with several threads their last bits depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which becomes the model folder `path` at the end, or nothing on an error.

    Raises FileExistsError where `path` exists and is no model folder.
    """
    target = Path(path).absolute()
    if target.exists() and not (target / "config.json").exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is no model folder (no config.json in it)")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield scratch
        for file in scratch.iterdir():
            file.chmod(0o644)
        scratch.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Make a small Mixtral checkpoint with an unbalanced router."
    )
    parser.add_argument("out_dir", type=Path)
    for field in dataclasses.fields(ModelOptions):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"default {field.default}",
        )
    arguments = vars(parser.parse_args())
    started = time.monotonic()
    try:
        path = make_checkpoint(arguments.pop("out_dir"), **arguments)
    except (ValueError, OSError) as error:
        print(f"make_mixtral: {error}", file=sys.stderr)
        return 1
    size = sum(os.path.getsize(file) for file in path.iterdir()) / 1e6
    print(
        f"{path}: Mixtral with {arguments['layers']} layers, hidden {arguments['hidden']}, "
        f"{arguments['experts']} experts (top-{arguments['top_k']}), {size:.0f} MB, "
        f"made in {time.monotonic() - started:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
