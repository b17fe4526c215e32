"""Hidden states that the native step computes for training: documents of a row stay apart."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from medusa_chat.config import UserError, make_recipe
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.model import native_weights
from medusa_chat.model.loading import load_model
from medusa_chat.native import library
from medusa_chat.training import native_states
from medusa_chat.training.data import Example, PackedRows
from medusa_chat.training.native_states import NativeReader
from tests.helpers.tiny import random_model, save_model
from tests.helpers.tiny_runs import do, products, tiny_run

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.config import LoadOptions, ModelSpec
    from medusa_chat.model.loading import Loaded

LENGTH = 300  # more than the rows of a step
DOCUMENTS = (1, 7, 290, 40, 300, 5, 100)


def examples() -> list[Example]:
    ids = torch.randint(0, 64, (sum(DOCUMENTS),), generator=torch.Generator().manual_seed(3))
    return [Example(part.tolist(), [True] * len(part), "here") for part in ids.split(DOCUMENTS)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "medusa_heads").glob("*.safetensors")
    return {name: tensor.float() for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3"])
def test_states_are_those_of_transformers(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_weights, "native_dtype", lambda *_: torch.float32)
    model = random_model(kind, 64, max_position_embeddings=512).eval()
    spec = resolve_model(str(save_model(tmp_path / "model", model)))
    rows = PackedRows(examples(), LENGTH)
    reader = NativeReader(spec, "none", LENGTH, torch.float32)
    with torch.no_grad():
        wanted = model.base_model(
            input_ids=rows.ids.long(), position_ids=rows.positions.long(), use_cache=False
        ).last_hidden_state
    found = reader(rows.ids, rows.positions)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_heads_learn_from_them_nearly_the_same(tmp_path: Path) -> None:
    do(tiny_run(tmp_path, "torch", keep_hidden=True, max_steps=20))
    do(tiny_run(tmp_path, "native", keep_hidden=True, hidden_engine="native", max_steps=20))
    own, other = (products(tmp_path / name) for name in ("torch", "native"))
    assert own.keys() == other.keys()
    assert own != other
    heads, others = (weights(tmp_path / name) for name in ("torch", "native"))
    for name, trained in heads.items():
        assert torch.allclose(trained, others[name], atol=0.003), name  # 0.02 for another seed


def test_memory_that_is_to_be_ignored_is_ignored_here_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def load(spec: ModelSpec, options: LoadOptions) -> Loaded:
        seen.append(options.ignore_memory)
        return load_model(spec, options)

    monkeypatch.setattr(native_states, "load_model", load)
    run = tiny_run(tmp_path, "out", keep_hidden=True, hidden_engine="native", max_steps=1)
    do(replace(run, ignore_memory=True))
    assert seen == [True]


def test_a_missing_native_step_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", lambda: "it was not built")
    with pytest.raises(UserError, match=r"^--engine native: it was not built$"):
        do(tiny_run(tmp_path, "out", keep_hidden=True, hidden_engine="native"))


def test_states_that_nothing_keeps_are_refused() -> None:
    with pytest.raises(UserError, match="computes states that are kept: add keep_hidden"):
        make_recipe("medusa1", hidden_engine="native")
