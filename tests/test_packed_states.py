"""Packed rows in training: documents do not see one another, and logits are the model's own."""

from __future__ import annotations

from math import exp

import pytest
import torch
from torch.nn import functional

from medusa_chat.training.data import Example, PackedRows
from medusa_chat.training.evaluate import perplexity
from medusa_chat.training.lm_heads import output_layer
from medusa_chat.training.packed_states import hidden_states
from tests.helpers.tiny import prompt_ids, random_model

KINDS = ["llama", "qwen2-mixed", "gemma2", "gemma3", "granite", "granite4"]
SIZES = (13, 1, 18)  # of the documents of a row


@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_do_not_see_one_another(kind: str) -> None:
    model = random_model(kind)
    documents = [torch.tensor(prompt_ids(size, seed=size)) for size in SIZES]
    positions = torch.cat([torch.arange(size) for size in SIZES])
    with torch.no_grad():
        packed = hidden_states(model, torch.cat(documents)[None], positions[None])[0]
        for alone, found in zip(documents, packed.split(SIZES), strict=True):
            expected = model.base_model(input_ids=alone[None]).last_hidden_state[0]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_perplexity_are_those_of_the_model(kind: str) -> None:
    model = random_model(kind)
    ids = torch.tensor([prompt_ids(30)])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        hidden = model.base_model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(output_layer(model)(hidden), expected, atol=2e-5, rtol=1e-4)
    rows = PackedRows([Example(ids[0].tolist(), [True] * 30)], 30)
    loss = functional.cross_entropy(expected[0, :-1], ids[0, 1:])
    assert perplexity(model, rows) == pytest.approx(exp(loss), rel=1e-4)
