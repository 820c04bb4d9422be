"""The prompts' file: what is read, and what is refused with its line."""

import json
from pathlib import Path

import pytest

from vllm_capmoe.planner.prompts import read


def test_reads_texts_and_chats_and_skips_empty_lines(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Tell me a story."}]
    lines = ['"one"', "", '{"prompt": "two\\u2028", "id": 7}', json.dumps({"messages": chat}), "  "]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\r\n".join(lines) + "\n", encoding="utf-8")
    assert read(file) == ["one", "two\u2028", chat]
    assert read(file, most=2) == ["one", "two\u2028"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "it isn't JSON"),
        ("3", "it has 3 as prompt"),
        ("[]", r"it has \[\] as prompt"),
        ('""', "it has an empty prompt"),
        ("{}", "it has the keys of nothing"),
        ('{"text": "a"}', "it has the keys 'text'"),
        ('{"prompt": null}', "it has None as prompt"),
        ('{"messages": []}', r"it has \[\] as messages"),
        ('{"messages": ["a"]}', "as messages"),
        ('{"messages": [{"content": "a"}]}', "as messages"),
        ('{"prompt": ' + json.dumps(["x" * 500]) + "}", r"xxx\.\.\. as prompt"),
        ("[" * 100_000, "it "),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'"good"\n\n{line}\n')
    with pytest.raises(ValueError, match=f"prompts.jsonl, line 3: .*{said}.*is accepted") as error:
        read(file)
    assert len(str(error.value)) < 500
    assert read(file, most=1) == ["good"]


def test_a_file_without_prompts_or_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(ValueError, match="can't be read: No such file"):
        read(file)
    file.write_text("\n\n")
    with pytest.raises(ValueError, match="has no prompts"):
        read(file)
    file.write_bytes(b'"\xff"')
    with pytest.raises(ValueError, match="isn't UTF-8"):
        read(file)
