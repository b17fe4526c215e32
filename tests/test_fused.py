"""Layers with fused operations, here in torch: the same text, and few kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from medusa_chat.decoding import fast
from medusa_chat.model import backbone as backbones
from medusa_chat.model.attention.rule import Choice
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.fused import plain
from medusa_chat.model.fused.layers import FusedAttention, FusedMLP, FusedNorm
from medusa_chat.model.fused.rule import check, choose_operations
from medusa_chat.model.linear.joined import join_linears
from tests.helpers.recording import Recorder
from tests.helpers.tiny import (
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
    random_model,
    random_tree,
    reply,
)

CPU = torch.device("cpu")
FUSED = {"llama", "mistral", "qwen2", "qwen3-mixed", "gemma2", "gemma3"}


def fused_backbone(
    monkeypatch: pytest.MonkeyPatch, kind: str, operations: Any = plain, **changes: Any
) -> Backbone:
    monkeypatch.setattr(backbones, "choose_operations", lambda *_: (operations, ""))
    model = random_model(kind, **changes)
    join_linears(model)
    made = Backbone(model)
    monkeypatch.undo()
    return made


def count_of(backbone: Backbone, kind: type) -> int:
    return sum(isinstance(module, kind) for module in backbone.model.modules())


@pytest.mark.parametrize("kind", [*sorted(FUSED), "phi3-sliding"])
def test_fused_layers_give_the_models_own_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager and recorded, with windows, softcaps, norms of heads and grouped heads."""
    own, fused = random_backbone(kind), fused_backbone(monkeypatch, kind)
    layers = fused.config.num_hidden_layers
    assert count_of(fused, FusedAttention) == (layers if kind in FUSED else 0)
    assert count_of(fused, FusedMLP) == (layers if kind in FUSED else 0)
    assert count_of(fused, FusedNorm) >= 2 * layers + 1
    monkeypatch.setattr(fast, "not_recorded", Recorder())
    tree = random_tree(3, 10, 3, 3, spine=3)
    replies = [
        reply(
            make_engine(backbone, random_heads(backbone), tree=tree, eager=eager),
            prompt_ids(20),
            max_new_tokens=12,
        )
        for backbone, eager in ((own, True), (fused, True), (fused, False))
    ]
    assert replies[0] == replies[1] == replies[2]


def test_a_forward_without_our_cache_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.tensor([prompt_ids(9), prompt_ids(9, seed=1)])
    with torch.inference_mode():
        expected = random_backbone("llama").model(text).logits
        ours = fused_backbone(monkeypatch, "llama").model(text).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def wrong_gate(gates: torch.Tensor, rows: torch.Tensor, _kind: Any) -> torch.Tensor:
    return gates * rows


def test_operations_that_change_a_model_give_way_to_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = SimpleNamespace(norm=plain.norm, rotate=plain.rotate, gate=wrong_gate)
    with pytest.raises(ArithmeticError, match="off by"):
        check(wrong, CPU, torch.float32)
    check(plain, CPU, torch.float32)
    backbone = fused_backbone(monkeypatch, "llama", wrong)
    assert backbone.operations is None
    assert "change the logits" in backbone.operations_reason
    assert count_of(backbone, FusedMLP) == count_of(backbone, FusedNorm) == 0
    assert choose_operations(CPU, torch.float32) == (None, "")
    monkeypatch.setenv("MEDUSA_CHAT_LAYERS", "plain")
    chosen = choose_operations(torch.device("cuda"), torch.float32)
    assert chosen == (None, "MEDUSA_CHAT_LAYERS=plain")


class Kernels(TorchDispatchMode):
    """Counts the kernels that a GPU would start: operations that neither view nor allocate."""

    free = ("empty", "new_empty", "empty_like", "_unsafe_view", "detach")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.inside = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.name().split("::")[1].split(".")[0]
        aliases = [each.alias_info for each in function._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases)
        if not (self.inside or view or name in self.free):
            self.names.append(name)
        return function(*args, **(kwargs or {}))

    def counted(self, function: Any, kernels: int) -> Any:
        """Count a call as so many kernels, whatever it does on a CPU."""

        def call(*arguments: Any) -> Any:
            self.names += [function.__name__] * kernels
            self.inside += 1
            try:
                return function(*arguments)
            finally:
                self.inside -= 1

        return call


def kernels_of(
    layers: int, kind: str, monkeypatch: pytest.MonkeyPatch, *, fused: bool
) -> list[str]:
    """Kernels of a recorded forward over 16 rows in bfloat16."""
    mode = Kernels()
    operations = SimpleNamespace(
        norm=mode.counted(plain.norm, 1),
        gate=mode.counted(plain.gate, 1),
        rotate=mode.counted(plain.rotate, 1),
    )
    changes: dict[str, Any] = {"num_hidden_layers": layers}
    monkeypatch.setattr(backbones, "choose_operations", lambda *_: (operations, ""))
    if not fused:
        monkeypatch.setattr(backbones, "choose_operations", lambda *_: (None, ""))
    model = random_model(kind, **changes).bfloat16()
    join_linears(model)
    backbone = Backbone(model)
    monkeypatch.undo()
    attend = mode.counted(backbone.attention.attend, 2)  # one kernel for the parts, one joins them
    backbone.attention = Choice("counted", attend)
    cache = backbone.new_cache(64)
    tokens, start = torch.zeros(16, dtype=torch.long), torch.tensor(8)
    with torch.inference_mode():
        tree = torch.eye(16, dtype=torch.bool)
        mode.names.clear()
        with mode:
            backbone.hidden_at(tokens, tokens + 8, tree, start, 64, cache)
    return mode.names


@pytest.mark.parametrize(("kind", "most"), [("llama", 12), ("qwen2", 12), ("qwen3", 14)])
def test_a_layer_takes_at_most_14_kernels(
    kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    two, four = (kernels_of(layers, kind, monkeypatch, fused=True) for layers in (2, 4))
    assert (len(four) - len(two)) / 2 <= most, four
    plain_two, plain_four = (
        kernels_of(layers, kind, monkeypatch, fused=False) for layers in (2, 4)
    )
    assert (len(plain_four) - len(plain_two)) / 2 > 2 * most
