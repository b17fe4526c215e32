"""Every supported backbone, through files: our greedy text is that of transformers' generate()."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    GPT2Config,
    GPTNeoXConfig,
    MambaConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from medusa_chat.config import LoadOptions, ModelSpec, UserError
from medusa_chat.model.loading import load_model
from tests.helpers.tiny import (
    ARCHITECTURES,
    SMALL,
    TORCH_ONLY,
    WINDOW,
    OracleHeads,
    decode,
    ids_of,
    make_engine,
    prompt_ids,
    random_heads,
    random_model,
    random_tree,
    reply,
    save_model,
)

if TYPE_CHECKING:
    from pathlib import Path

NEW = 40  # with a prompt of 20 the text is five windows long


@pytest.mark.parametrize("kind", [*ARCHITECTURES, *TORCH_ONLY])
def test_greedy_text_is_that_of_transformers_generate(kind: Any, tmp_path: Path) -> None:
    folder = str(save_model(tmp_path, random_model(kind)))
    options = LoadOptions(device="cpu", dtype="float32", engine="torch")
    backbone = load_model(ModelSpec("tiny", folder), options).backbone
    for seed in range(2):
        prompt = prompt_ids(20, seed=seed)
        expected = _generate(folder, prompt)
        assert (
            reply(make_engine(backbone), prompt, mode="vanilla", temperature=0, max_new_tokens=NEW)
            == expected
        )
        tree = random_tree(seed, nodes=24, depth=4, width=5, spine=3)
        random = make_engine(backbone, random_heads(backbone, seed=seed), tree)
        assert reply(random, prompt, mode="greedy", max_new_tokens=NEW) == expected
        oracle = OracleHeads(
            4, backbone.vocabulary, prompt + expected, ranks=(0, 0, 1, -1), seed=seed
        )
        steps = decode(
            make_engine(backbone, oracle, tree), prompt, mode="greedy", max_new_tokens=NEW
        )
        assert ids_of(steps) == expected
        assert max(step.accepted for step in steps) >= 2


def _generate(folder: str, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    text = torch.tensor([prompt])
    output = model.generate(
        text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=NEW
    )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def test_a_backbone_without_a_bare_model_attribute() -> None:
    """GPT-2 keeps its body under another name and learns its positions."""
    small: dict[str, Any] = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 64,
        "n_positions": 64,
        "initializer_range": 0.3,
    }
    plain: dict[str, Any] = dict(SMALL)
    del plain["num_key_value_heads"]
    for config in (
        GPT2Config(**small, bos_token_id=None, eos_token_id=None),
        GPTNeoXConfig(**plain, vocab_size=64),
    ):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        model.generation_config.eos_token_id = None
        prompt = prompt_ids(20)
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=44)[
            0, 20:
        ].tolist()
        from medusa_chat.model.backbone import Backbone

        backbone = Backbone(model)
        oracle = OracleHeads(4, 64, prompt + expected)
        steps = decode(
            make_engine(backbone, oracle, "mc_sim_7b_63", context=64), prompt, max_new_tokens=99
        )
        assert ids_of(steps) == expected
        assert steps[-1].finish == "context"


@pytest.mark.parametrize(
    "kind", [kind for kind in ARCHITECTURES if "sliding_window" in ARCHITECTURES[kind][1]]
)
def test_the_windows_of_these_models_matter(kind: Any) -> None:
    """Otherwise the test above would pass with a mask that does not slide."""
    if ARCHITECTURES[kind][1]["sliding_window"] is None:
        pytest.skip("no window")
    text = torch.tensor([prompt_ids(3 * WINDOW)])
    narrow, wide = random_model(kind), random_model(kind, sliding_window=500)
    with torch.inference_mode():
        near, far = narrow(text).logits[0], wide(text).logits[0]
    assert not torch.allclose(near[-1], far[-1], atol=1e-2)
    assert torch.allclose(near[:WINDOW], far[:WINDOW], atol=1e-4)


RECURRENT = {
    "mamba": MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4),
    "falcon_mamba": FalconMambaConfig(
        hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4
    ),
    "rwkv": RwkvConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32),
    "recurrent_gemma": RecurrentGemmaConfig(
        hidden_size=16,
        num_hidden_layers=3,
        vocab_size=32,
        num_attention_heads=2,
        intermediate_size=16,
        lru_width=16,
    ),
    "qwen3_next": Qwen3NextConfig(
        hidden_size=16,
        num_hidden_layers=4,
        vocab_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=16,
        linear_num_value_heads=2,
        linear_num_key_heads=1,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=8,
    ),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_recurrent_backbone_is_refused_in_one_line(kind: Any, tmp_path: Path) -> None:
    """By its config alone: no weights have to be there, so none are read in vain."""
    RECURRENT[kind].save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot take back rejected guesses") as refusal:
        load_model(
            ModelSpec(kind, str(tmp_path)),
            LoadOptions(device="cpu", dtype="float32", engine="torch"),
        )
    assert "\n" not in str(refusal.value)
    assert kind in str(refusal.value)
