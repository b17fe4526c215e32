"""Heads trained with a parent bias and a vocabulary: `train --parent-bias --head-vocabulary`."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from medusa_chat.cli import main
from medusa_chat.config import UserError
from medusa_chat.files import digest, read_json, write_json
from medusa_chat.model.layouts import OWN_HEADS, read_heads
from medusa_chat.model.templates import ChatTemplate
from medusa_chat.training.data import Example, PackedRows
from medusa_chat.training.starting import choose_vocabulary, coverage, special_ids
from tests.helpers.complaints import complaint, refusal
from tests.helpers.made_trainees import made_by_runs
from tests.helpers.tiny import END, random_model, tokenizer
from tests.helpers.tiny_runs import do, products, tiny_run

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from medusa_chat.model.heads import MedusaHeads
    from medusa_chat.training.trainee import Trainee
    from medusa_chat.training.trainer import PackedTexts

H, V, N, RANK = 32, 320, 40, 3
BOTH: dict[str, Any] = {"parent_bias": RANK, "head_vocabulary": N}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Trainee, PackedTexts]]:
    """What the runs make."""
    return made_by_runs(monkeypatch)


def heads_in(folder: Path) -> MedusaHeads:
    return read_heads(folder / OWN_HEADS, H, V).heads


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / OWN_HEADS)


# ---- the vocabulary ----


def rows_of(*documents: list[int]) -> PackedRows:
    return PackedRows([Example(ids, [True] * len(ids)) for ids in documents], 8)


def test_the_most_frequent_targets_and_every_special_token_are_ranked() -> None:
    rows = rows_of([9, 5, 5, 6, 7, 7, 7, 9], [9, 9, 9, 6, 20])
    # The first token of a document is no target: 7 comes three times, 5, 6 and 9 twice, 20 once.
    for count, expected in ((4, {7, 9, 30, 31}), (5, {5, 7, 9, 30, 31}), (6, {5, 6, 7, 9, 30, 31})):
        chosen = choose_vocabulary(rows, count, {30, 31}, 32)
        assert chosen is not None
        assert set(chosen.tokens.tolist()) == expected
    whole = choose_vocabulary(rows, 31, {30, 31}, 32)  # what no text holds comes last, by its id
    assert whole is not None
    assert whole.tokens.tolist() == [*range(29), 30, 31]
    assert choose_vocabulary(rows, 0, {30}, 32) is None
    for count, reason in ((32, "below the model's 32 tokens"), (2, "above 2, the special tokens")):
        assert reason in refusal(choose_vocabulary, rows, count, {30, 31}, 32)


def test_the_share_of_the_targets_is_told() -> None:
    rows = rows_of([9, 5, 5, 6, 7, 7, 7, 9], [9, 9, 9, 6, 20])
    chosen = choose_vocabulary(rows, 3, {30, 31}, 32)
    assert chosen is not None
    assert coverage(rows, chosen) == (
        "the heads rank 3 of 32 tokens, which are 27.27% of the targets; the others have no loss"
    )


def test_a_run_chooses_the_vocabulary_of_its_text(
    tmp_path: Path, made: list[tuple[Trainee, PackedTexts]]
) -> None:
    _, said = do(tiny_run(tmp_path, "out", head_vocabulary=N))
    found = heads_in(tmp_path / "out").vocabulary
    assert found is not None
    rows = made[0][1].rows
    labels = [label for i in range(len(rows)) for label in rows[i]["labels"].tolist()]
    counts = Counter(label for label in labels if label >= 0)
    special = set(tokenizer().all_special_ids)
    frequent = sorted(set(range(V)) - special, key=lambda token: (-counts[token], token))
    expected = sorted([*special, *frequent[: N - len(special)]])
    assert found.tokens.tolist() == expected
    share = sum(counts[token] for token in expected) / counts.total()
    assert f"the heads rank {N} of {V} tokens, which are {share:.2%} of the targets" in said[1]


def test_what_ends_a_reply_is_special() -> None:
    made = tokenizer()
    stop = str(made.convert_ids_to_tokens(made("the")["input_ids"][-1]))

    class Stopping(ChatTemplate):
        """A template with a stop text of one token, and one of several."""

        @property
        def stop(self) -> tuple[str, ...]:
            return (stop, "of many tokens")

    model = random_model("llama", V)
    assert special_ids(model, ChatTemplate(made, "tiny")) == set(made.all_special_ids)
    model.generation_config.eos_token_id = [END, 7, V + 1]  # the last has no row in the LM head
    ends = {END, 7, *made.all_special_ids}
    assert special_ids(model, ChatTemplate(made, "tiny")) == ends
    assert special_ids(model, Stopping(made, "tiny")) == ends | {made.convert_tokens_to_ids(stop)}


# ---- new heads ----


@pytest.mark.parametrize("own", ["own", "shared"])
@pytest.mark.parametrize("changes", [{"parent_bias": RANK}, {"head_vocabulary": N}, BOTH], ids=str)
def test_new_heads_learn_with_both(own: str, changes: dict[str, Any], tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "out", lm_heads=own, max_steps=20, learning_rate=0.02, **changes)
    steps, said = do(run)
    for first, last in zip(steps[0].head_loss, steps[-1].head_loss, strict=True):
        assert last < first
    tensors = tensors_in(tmp_path / "out")
    rows = N if "head_vocabulary" in changes else V
    assert ("token_map" in tensors) is ("head_vocabulary" in changes)
    assert ("0.1.weight" in tensors) is (own == "own")
    if own == "own":
        assert tensors["0.1.weight"].shape == (rows, H)
    if "parent_bias" in changes:
        assert tensors["parent_bias.first"].shape == (rows + (rows < V), RANK)
        assert tensors["parent_bias.second"].shape == (rows, RANK)
        assert tensors["parent_bias.second"].any()
        assert "with a parent bias of rank 3 (" in said[0]
        assert "trained alone" not in said[0]
    assert heads_in(tmp_path / "out").heads == 2


@pytest.mark.parametrize("name", ["medusa2", "distilled"])
def test_joint_recipes_train_both(name: str, tmp_path: Path) -> None:
    do(tiny_run(tmp_path, "out", name, lm_heads="shared", **BOTH))
    tensors = tensors_in(tmp_path / "out")
    assert tensors["parent_bias.second"].any()
    assert len(tensors["token_map"]) == N


# ---- given heads ----


@pytest.mark.parametrize("vocabulary", [0, N])
def test_a_bias_for_given_heads_is_trained_alone(tmp_path: Path, vocabulary: int) -> None:
    do(tiny_run(tmp_path, "first", head_vocabulary=vocabulary, lm_heads="own"))
    given: dict[str, Any] = {"heads_from": str(tmp_path / "first"), "parent_bias": RANK}
    steps, said = do(tiny_run(tmp_path, "second", max_steps=30, learning_rate=0.02, **given))
    before, after = tensors_in(tmp_path / "first"), tensors_in(tmp_path / "second")
    assert after.keys() - before.keys() == {"parent_bias.first", "parent_bias.second"}
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
    assert after["parent_bias.second"].any()
    assert sum(steps[-1].head_loss) < sum(steps[0].head_loss)
    rows = vocabulary or V
    trained = RANK * (2 * rows + (vocabulary > 0))
    assert "which is trained alone" in said[0]
    assert f"{trained:,} parameters are trained" in said[0]


def test_given_heads_with_a_bias_are_trained_as_a_whole(tmp_path: Path) -> None:
    do(tiny_run(tmp_path, "first", lm_heads="own", **BOTH))
    for out, rank in (("same", RANK), ("none", 0)):
        given: dict[str, Any] = {"heads_from": str(tmp_path / "first"), "parent_bias": rank}
        _, said = do(tiny_run(tmp_path, out, learning_rate=0.02, **given))
        assert "trained alone" not in said[0]
        before, after = tensors_in(tmp_path / "first"), tensors_in(tmp_path / out)
        assert before.keys() == after.keys()
        assert torch.equal(before.pop("token_map"), after["token_map"])
        assert all(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_joint_recipe_freezes_no_heads(tmp_path: Path) -> None:
    do(tiny_run(tmp_path, "first", lm_heads="own"))
    given: dict[str, Any] = {"heads_from": str(tmp_path / "first"), "parent_bias": RANK}
    do(tiny_run(tmp_path, "second", "medusa2", **given))
    before, after = tensors_in(tmp_path / "first"), tensors_in(tmp_path / "second")
    assert not torch.equal(before["0.0.linear.weight"], after["0.0.linear.weight"])


def test_what_given_heads_have_cannot_become_something_else(tmp_path: Path) -> None:
    do(tiny_run(tmp_path, "first", **BOTH))
    given: dict[str, Any] = {"heads_from": str(tmp_path / "first")}
    assert "have a parent bias of rank 3, which cannot become 5: leave --parent-bias out" in (
        refusal(do, tiny_run(tmp_path, "a", parent_bias=5, **given))
    )
    assert "rank 40 tokens, which cannot become 41: leave --head-vocabulary out" in (
        refusal(do, tiny_run(tmp_path, "b", head_vocabulary=41, **given))
    )
    do(tiny_run(tmp_path, "c", **BOTH, **given))  # the same


# ---- checkpoints ----


@pytest.mark.parametrize("given", [False, True])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, given: bool) -> None:
    changes: dict[str, Any] = dict(BOTH)
    if given:
        do(tiny_run(tmp_path, "first", head_vocabulary=N))
        changes = {"heads_from": str(tmp_path / "first"), "parent_bias": RANK}
    do(tiny_run(tmp_path, "out", **changes))
    before = products(tmp_path / "out")
    checkpoints = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-10", "checkpoint-8"]
    kept = load_file(checkpoints / "checkpoint-8" / "model.safetensors")
    assert {"heads.vocabulary.tokens", "heads.parent_bias.first", "heads.weight"} <= kept.keys()
    shutil.rmtree(checkpoints / "checkpoint-10")
    (tmp_path / "out" / OWN_HEADS).unlink()
    do(tiny_run(tmp_path, "out", resume=True, **changes))
    assert products(tmp_path / "out") == before
    (tmp_path / "out" / OWN_HEADS).unlink()
    do(tiny_run(tmp_path, "out", resume=True, **changes))  # from the last step's
    assert products(tmp_path / "out") == before


def test_a_checkpoint_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    do(tiny_run(tmp_path, "out", **BOTH))
    checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-10"
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    tensors["heads.vocabulary.tokens"][0] += 1
    save_file(tensors, file, {"format": "pt"})
    sums = read_json(checkpoint / "checksums.json")
    write_json(checkpoint / "checksums.json", sums | {file.name: digest(file)})
    with pytest.raises(UserError, match=r"rank other tokens than the data give now: the tokenizer"):
        do(tiny_run(tmp_path, "out", resume=True, **BOTH))


# ---- the command ----


def test_the_flags_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, "out")
    words = ["train", "--model", run.model, "--data", str(run.data[0]), "--max-steps", "2"]
    words += ["--length", "32", "--batch-size", "2"]
    both = ["--parent-bias", str(RANK), "--head-vocabulary", str(N)]
    assert main([*words, *both, "--out", str(run.out)]) == 0
    assert f"the heads rank {N} of {V} tokens" in capsys.readouterr().err
    second = ["--heads-from", str(run.out), "--out", str(tmp_path / "second")]
    assert main([*words, *second]) == 0
    for folder in (run.out, tmp_path / "second"):
        heads = heads_in(folder)
        assert heads.vocabulary is not None
        assert heads.parent_bias is not None
        assert (len(heads.vocabulary), heads.parent_bias.rank) == (N, RANK)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tiny_run(tmp_path, "out")
    words = ["train", "--model", run.model, "--out", run.out, "--data", run.data[0]]
    words += ["--max-steps", 2, "--length", 32]
    assert "below the model's 320 tokens" in complaint(capsys, *words, "--head-vocabulary", 320)
    assert "parent_bias must be 0 or more" in complaint(capsys, *words, "--parent-bias", -1)
    assert "must be a whole number" in complaint(capsys, *words, "--parent-bias", "some")
