"""The example checkpoint is a real Mixtral, its router is unbalanced, and its experts matter.

Checked with transformers' own Mixtral, an implementation that is not ours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import AutoConfig, AutoTokenizer, MixtralForCausalLM

PROMPTS = [
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "Once upon a time there was a small village at the edge of a deep forest.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n",
    "To bake bread you need flour, water, salt and yeast, and a good deal of patience.",
    "The quick brown fox jumps over the lazy dog. 1234567890",
    "Die Grenzen meiner Sprache bedeuten die Grenzen meiner Welt.",
    "L'été dernier, nous avons visité trois musées à Genève; 東京 is far 🙂.",
    "A prime number is a natural number greater than one that has no other divisors.",
    "Load balancing decides how long the slowest device has to work.",
    "SELECT name, COUNT(*) FROM orders WHERE year >= 2020 GROUP BY name ORDER BY 2 DESC;",
    "The train leaves at half past seven from platform nine, so do not be late.",
    "  leading spaces and\ttabs\n\nand blank lines",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "She opened the letter, read it twice, and put it back in the drawer.",
    "Water boils at one hundred degrees at sea level, and earlier on a mountain.",
    "Write a short poem about the sea in winter.",
    "What is the difference between a list and a tuple in Python?",
    "The committee met on Tuesday to discuss the budget for the next year.",
    "Music was playing somewhere down the street, too far away to hear the words.",
    "An operating system shares the processor among programs.",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is tiny: more threads only wait for each other, long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer(example_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(example_model)


@pytest.fixture(scope="module")
def model(example_model: Path) -> Any:
    return MixtralForCausalLM.from_pretrained(example_model, dtype=torch.float32).eval()


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> tuple[list[int], list[float]]:
    """`count` greedy tokens after the prompt, and how far each was ahead of the second best."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    tokens, margins = [], []
    for _ in range(count):
        best = model(ids).logits[0, -1].topk(2)
        tokens.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        ids = torch.cat([ids, best.indices[None, :1]], dim=1)
    return tokens, margins


def test_configuration_is_a_mixtral(example_model: Path) -> None:
    config = AutoConfig.from_pretrained(example_model)
    assert config.architectures == ["MixtralForCausalLM"]
    assert (config.num_hidden_layers, config.hidden_size) == (4, 256)
    assert (config.num_local_experts, config.num_experts_per_tok) == (8, 2)
    assert config.num_key_value_heads < config.num_attention_heads  # grouped-query attention
    assert (config.head_dim, config.max_position_embeddings) == (64, 2048)
    assert config.dtype == torch.bfloat16


def test_every_weight_is_loaded(example_model: Path) -> None:
    _, info = MixtralForCausalLM.from_pretrained(example_model, output_loading_info=True)
    left = {key: value for key, value in info.items() if value}
    assert not left, left


@pytest.mark.parametrize("prompt", PROMPTS)
def test_tokenizer_agrees_with_sentencepiece(
    example_model: Path, tokenizer: Any, prompt: str
) -> None:
    original = SentencePieceProcessor(model_file=str(example_model / "tokenizer.model"))
    ids = tokenizer(prompt).input_ids
    assert ids == [original.bos_id(), *original.encode(prompt)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt


def test_special_tokens_and_chat_template(tokenizer: Any) -> None:
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert len(tokenizer) == 32000
    chat = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Who are you?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert text == "<s> [INST] Hi [/INST] Hello</s> [INST] Who are you? [/INST]"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids.count(1) == 1 and ids.count(2) == 1  # "<s>", "</s>" are tokens, not text
    with_system = [{"role": "system", "content": "Be brief."}, chat[0]]
    text = tokenizer.apply_chat_template(with_system, tokenize=False)
    assert text == "<s> [INST] Be brief.\n\nHi [/INST]"


@pytest.fixture(scope="module")
def loads_PLE(model: Any, tokenizer: Any) -> torch.Tensor:
    """Tokens that chose each expert, float [prompts, layers, experts]."""
    layers, experts = model.config.num_hidden_layers, model.config.num_local_experts
    loads_PLE = torch.zeros(len(PROMPTS), layers, experts)
    for i, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            logits = model(ids, output_router_logits=True).router_logits
        for layer, logits_TE in enumerate(logits):
            chosen = logits_TE.reshape(-1, experts).topk(2).indices.flatten()
            loads_PLE[i, layer] = chosen.bincount(minlength=experts)
    return loads_PLE


def test_router_is_unbalanced_in_every_layer(loads_PLE: torch.Tensor) -> None:
    """Some expert has more than twice the mean load, for all prompts together and for most alone;
    no expert is dead."""
    loads_LE = loads_PLE.sum(0)
    assert (loads_LE.amax(1) > 2.2 * loads_LE.mean(1)).all(), loads_LE
    assert (loads_LE > 0).all(), loads_LE
    assert (loads_PLE.amax(2) > 2 * loads_PLE.mean(2)).float().mean() > 0.9
    assert len(set(loads_LE.argmax(1).tolist())) > 1, "the same hot expert in every layer"


def test_experts_matter(model: Any, tokenizer: Any, loads_PLE: torch.Tensor) -> None:
    """Without the hot expert of any one layer, greedy answers change."""
    prompts = PROMPTS[:4]
    before = [greedy(model, tokenizer, prompt, 4)[0] for prompt in prompts]
    for layer, hot in zip(model.model.layers, loads_PLE.sum(0).argmax(1).tolist(), strict=True):
        down = layer.mlp.experts.down_proj.data[hot]
        kept = down.clone()
        down.zero_()
        after = [greedy(model, tokenizer, prompt, 4)[0] for prompt in prompts]
        down.copy_(kept)
        assert sum(a != b for a, b in zip(after, before, strict=True)) >= 3


def test_moe_adds_about_as_much_as_is_there(model: Any, tokenizer: Any) -> None:
    """Root mean square of each MoE block's output over that of its residual: no rounding error."""
    outputs: list[float] = []
    hooks = [
        layer.mlp.register_forward_hook(
            lambda _m, _i, out: outputs.append(
                float((out[0] if isinstance(out, tuple) else out).square().mean().sqrt())
            )
        )
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
        hidden = model(ids, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    for output, residual in zip(outputs, hidden[: len(outputs)], strict=True):
        assert 0.25 < output / float(residual.square().mean().sqrt()) < 2


def test_greedy_margins_are_not_tiny(model: Any, tokenizer: Any) -> None:
    margins = torch.tensor([m for p in PROMPTS[:8] for m in greedy(model, tokenizer, p, 8)[1]])
    assert margins.median() > 0.3
    assert (margins > 0.02).float().mean() > 0.9


def test_the_same_options_make_the_same_file(
    make_mixtral: ModuleType, example_model: Path, tmp_path: Path
) -> None:
    again = make_mixtral.make_checkpoint(tmp_path / "again")
    for file in sorted(example_model.iterdir()):
        ours, theirs = file.read_bytes(), (again / file.name).read_bytes()
        assert hashlib.sha256(ours).digest() == hashlib.sha256(theirs).digest(), file.name


def test_an_interrupted_run_leaves_nothing(
    make_mixtral: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(make_mixtral, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_mixtral.make_checkpoint(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": 100}, "hidden must be a multiple of 64, got 100"),
        ({"top_k": 9}, "top_k must be 1 to 8 experts, got 9"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"kv_heads": 3}, "kv_heads must divide 4 heads, got 3"),
        ({"dtype": "int8"}, "dtype must be bfloat16, float16 or float32, got 'int8'"),
    ],
)
def test_bad_options_are_refused(
    make_mixtral: ModuleType, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_mixtral.make_checkpoint(tmp_path / "model", **options)


def test_a_folder_that_is_no_model_is_left_alone(make_mixtral: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no model folder"):
        make_mixtral.make_checkpoint(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_other_shapes_load(make_mixtral: ModuleType, tmp_path: Path) -> None:
    path = make_mixtral.make_checkpoint(
        tmp_path / "model", layers=1, hidden=128, experts=16, top_k=4, kv_heads=1, dtype="float32"
    )
    model = MixtralForCausalLM.from_pretrained(path)
    assert model.config.num_local_experts == 16
    with torch.inference_mode():
        assert model(torch.tensor([[1, 733, 16289]])).logits.isfinite().all()
