from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from medusa_chat.config import UserError
from medusa_chat.prompts import read_prompts

if TYPE_CHECKING:
    from pathlib import Path


def test_reads_mt_bench_messages_and_text_in_turn(tmp_path: Path) -> None:
    mt_bench = tmp_path / "question.jsonl"
    mt_bench.write_text(
        json.dumps({"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]})
        + "\n\n"
    )
    talks = tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    talks.write_text(
        json.dumps({"source": "small", "messages": turns}) + "\n" + json.dumps({"messages": turns})
    )
    plain = tmp_path / "plain.txt"
    plain.write_text("One\nTwo\nThree\n")
    prompts = read_prompts([mt_bench, talks, plain])
    assert [(p.category, p.turns) for p in prompts] == [
        ("writing", ("Write.", "Again.")),
        ("small", ("Hi",)),
        ("plain", ("One",)),
        ("talks", ("Hi",)),
        ("plain", ("Two",)),
        ("plain", ("Three",)),
    ]
    assert prompts[1].reference == tuple(turns)
    assert [p.turns[0] for p in read_prompts([plain], limit=2)] == ["One", "Two"]
    assert len(read_prompts([tmp_path])) == 3  # the folder's *.jsonl files


@pytest.mark.parametrize(
    "line",
    [
        '{"turns": []}',
        '{"turns": [1]}',
        '{"messages": 3}',
        '{"messages": [{"role": "user"}]}',
        '{"a": 1}',
        "{oops",
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"turns": ["fine"]}\n' + line + "\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 2"):
        read_prompts([file])


def test_missing_and_empty_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the prompts"):
        read_prompts([tmp_path / "none.txt"])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no prompts"):
        read_prompts([tmp_path / "empty.txt"])
