"""The native step of every family against transformers, in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from medusa_chat.model.backbone import Backbone
from medusa_chat.model.linear.joined import join_linears
from medusa_chat.native.families import unsupported
from medusa_chat.native.library import UnavailableError
from medusa_chat.native.model import NativeModel
from tests.helpers.native_library import need_library
from tests.helpers.native_tiny import Native, path_to, random_parents, shape
from tests.helpers.tiny import ARCHITECTURES, SMALL, prompt_ids, random_backbone

need_library()

SIZES = {
    "hidden 80, heads of 80": shape(1, 1, 80, 80),
    "heads of 96": shape(3, 1, 96, 96),
    "heads of 64, vocabulary 4,097": {"head_dim": 64, "vocabulary": 4097},
    "heads of 128": shape(5, 5, 128, 40),
    "heads of 256": shape(2, 1, 256, 32),
    "odd sizes": shape(3, 3, 10, 51) | {"intermediate_size": 33, "vocabulary": 61},
}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 1000.0,
    },
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1000.0,
    },
}


def close(ours: Any, theirs: Any) -> Any:
    return (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def check(backbone: Any, length: Any = 40) -> None:
    """A text's last token's logits, and a tree behind it, against the torch step."""
    native, tokens = Native(backbone), prompt_ids(length, backbone.vocabulary)
    with torch.inference_mode():
        theirs = backbone.hidden_of_text(torch.tensor(tokens))
        native.cache.rewind(0)
        hidden, logits = native.tree(tokens, None)
        assert close(hidden, theirs)
        assert close(logits, backbone.logits(theirs))
        native.text(tokens, seed=1)
        parents = random_parents(12, seed=length)
        rows = prompt_ids(12, backbone.vocabulary, seed=5)
        hidden, logits = native.tree(rows, parents)
        for row in range(12):
            path = [rows[each] for each in path_to(row, parents)]
            assert close(hidden[row], backbone.hidden_of_text(torch.tensor(tokens + path))[-1])


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_family_computes_what_transformers_does(kind: str) -> None:
    check(random_backbone(kind))


@pytest.mark.parametrize("name", SIZES)
def test_odd_sizes(name: Any) -> None:
    check(random_backbone("llama", **SIZES[name]))


@pytest.mark.parametrize("name", ROPES)
def test_static_rotary_scalings(name: Any) -> None:
    check(random_backbone("llama", rope_parameters=ROPES[name]))


def test_longrope_within_the_original_range() -> None:
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.5] * 4,
        "long_factor": [4.0] * 4,
        "rope_theta": 1000.0,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 1.0,
    }
    sizes = {"max_position_embeddings": 512, "original_max_position_embeddings": 64}
    backbone = random_backbone("phi3", rope_parameters=rope, **sizes)
    assert backbone.context == 64
    check(backbone)


def test_partial_rotary_positions() -> None:
    rope = {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}
    check(random_backbone("phi3", rope_parameters=rope))


def test_biases_everywhere() -> None:
    backbone = random_backbone("llama", attention_bias=True, mlp_bias=True)
    for name, parameter in backbone.model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    check(backbone)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_joined_layers_are_read_too(kind: str) -> None:
    backbone = random_backbone(kind)
    assert join_linears(backbone.model) == 4
    check(backbone)


def test_released_weights_are_gone_and_the_step_runs_on() -> None:
    for kind in ("llama-tied", "phi3"):
        backbone, twin = random_backbone(kind), random_backbone(kind)
        tokens = prompt_ids(20)
        theirs = twin.hidden_of_text(torch.tensor(tokens))
        native = Native(backbone, release=True)
        assert backbone.model.model.layers[0].mlp.down_proj.weight is None
        assert close(native.tree(tokens, None)[0], theirs)


def test_what_it_does_not_run_is_said_in_one_line() -> None:
    config: dict[str, Any] = {
        key: value for key, value in SMALL.items() if key != "num_key_value_heads"
    }
    other = Backbone(
        AutoModelForCausalLM.from_config(GPTNeoXConfig(**config, vocab_size=64)).eval()
    )
    assert unsupported(other) == "the native step does not know gpt_neox models"
    with pytest.raises(UnavailableError, match="gpt_neox"):
        NativeModel(other, "float32")
    reason = unsupported(random_backbone("llama", hidden_act="relu"))
    assert reason is not None
    assert "relu" in reason
    assert unsupported(random_backbone("llama")) is None


def test_greedy_text_is_that_of_transformers() -> None:
    backbone = random_backbone("llama", vocabulary=320)
    native, prompt = Native(backbone), prompt_ids(20, 320)
    text = torch.tensor([prompt])
    expected = backbone.model.generate(
        text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=40
    )
    token = int(native.step.prefill(prompt).argmax())
    made = [token]
    while len(made) < 40:
        settled = native.step.chosen([token], [0], greedy=True)
        native.step.keep([0])
        token = settled.next
        made.append(token)
    assert made == expected[0, 20:].tolist()
