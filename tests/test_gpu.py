"""What needs CUDA. Run with `pytest -m gpu`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

import medusa_chat
from medusa_chat.decoding.acceptance import TreeTensors
from medusa_chat.decoding.graphs.capture import CudaGraphs
from medusa_chat.decoding.graphs.static_step import StaticStep
from medusa_chat.model.attention.rule import TRITON, Choice, Shape, choose_attention, kernel_for
from medusa_chat.model.attention.tree_attention import TreeMask, torch_attention
from medusa_chat.model.fused.rule import choose_operations
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.sampling import MODES, Mode, Sampling
from medusa_chat.training import entropy, losses
from medusa_chat.training.data import IGNORED
from tests.helpers.tiny import random_model, random_tree, save_model
from tests.helpers.tiny_runs import backbone_folder, do, tiny_run

if TYPE_CHECKING:
    from pathlib import Path

    from medusa_chat.config import Message
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.decoding.graphs.capture import Key

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


TALE: list[Message] = [{"role": "user", "content": "Tell me a fairy tale."}]


@pytest.mark.parametrize("mode", MODES)
def test_the_gpu_says_what_the_cpu_says(mode: Mode) -> None:
    replies = []
    for device in ("cpu", "cuda"):
        engine = medusa_chat.load(device=device, dtype="float32", tree="mc_sim_7b_63")
        sampling = Sampling(mode=mode, max_new_tokens=64, seed=5)
        steps = engine.generate(TALE, sampling)
        replies.append([token.id for step in steps for token in step.tokens])
    assert replies[0] == replies[1]


def captured_graphs(engine: Engine) -> set[Key]:
    """What was recorded as graphs and is kept."""
    static = engine.runner.fast
    assert isinstance(static, StaticStep)
    assert isinstance(static.record, CudaGraphs)
    return set(static.recorded)


# Turns of one conversation, so that modes, trees and seeds change over the same graphs.
TURNS = [
    Sampling(),
    Sampling(mode="typical", seed=1),
    Sampling(mode="exact", seed=2),
    Sampling(mode="vanilla", temperature=0),
    Sampling(mode="exact", seed=3, top_p=0.9, temperature=1.2),
    Sampling(mode="typical", seed=4, top_k=20),
    Sampling(mode="vanilla", seed=5, min_p=0.02),
    Sampling(),
]


@pytest.mark.parametrize("tree", ["mc_sim_7b_63", "chain-3", "dynamic-16", "auto"])
def test_captured_steps_say_what_eager_steps_say(tree: str) -> None:
    """In float32, over replies long enough that the text outgrows a span of the cache."""
    eager, captured = (
        medusa_chat.load(device="cuda", dtype="float32", tree=tree, eager=how, probing=False)
        for how in (True, None)
    )
    if tree == "auto":
        captured.trees.use(eager.trees.current)  # each has measured for itself
    for sampling in TURNS:
        how = replace(sampling, max_new_tokens=300, ignore_eos=True)
        said = [
            [token.id for step in engine.generate(TALE, how) for token in step.tokens]
            for engine in (eager, captured)
        ]
        assert said[0] == said[1], sampling.mode
    assert len({key[2] for key in captured_graphs(captured) if key[0] == "forward"}) > 1


def test_after_one_reply_no_setting_records_anything_and_a_reply_may_be_broken_off() -> None:
    """Temperature, truncation, seeds, trees of as many rows, and modes that were used before."""
    engine = medusa_chat.load(
        device="cuda", dtype="float32", tree="static-32", probing=False, copies=False
    )

    def say(sampling: Sampling, steps: int = 99) -> list[int]:
        with closing(engine.generate(TALE, replace(sampling, max_new_tokens=60))) as reply:
            return [token.id for step in islice(reply, steps) for token in step.tokens]

    whole = say(TURNS[0])
    for sampling in TURNS:
        say(sampling)
    known = captured_graphs(engine)
    usual, other = engine.trees.current, random_tree(5, 23, engine.heads, 6, spine=2)
    assert len(other) < len(usual)
    for sampling in TURNS:
        for tree in (other, usual):
            engine.trees.use(tree)
            say(sampling, 3)
            say(replace(sampling, seed=77, temperature=0.4, epsilon=0.2, delta=0.5))
    assert captured_graphs(engine) == known
    assert say(TURNS[0]) == whole


def test_a_step_that_cannot_be_recorded_is_taken_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operation reads the host in the middle of a recording; the device stays as it was."""
    eager = medusa_chat.load(
        device="cuda", dtype="float32", tree="static-16", probing=False, eager=True
    )
    broken = medusa_chat.load(device="cuda", dtype="float32", tree="static-16", probing=False)
    logits = broken.backbone.logits
    monkeypatch.setattr(
        broken.backbone, "logits", lambda hidden: logits(hidden) + 0 * logits(hidden).sum().item()
    )
    stream = torch.cuda.current_stream()
    said = [
        [
            token.id
            for step in engine.generate(TALE, Sampling(max_new_tokens=60))
            for token in step.tokens
        ]
        for engine in (eager, broken)
    ]
    assert said[0] == said[1]
    assert broken.runner.fast is None
    assert any("--eager" in notice for notice in broken.notices)
    assert torch.cuda.current_stream() == stream


def save_with_heads(folder: Path, kind: str) -> None:
    """A random model and two heads of one block."""
    save_model(folder, random_model(kind, 320, hidden_size=64, intermediate_size=128, head_dim=16))
    heads = folder / "medusa_heads" / "medusa_lm_head.safetensors"
    save_file(
        {
            f"{k}.0.linear.{name}": torch.randn(shape) * 0.1
            for k in range(2)
            for name, shape in (("weight", (64, 64)), ("bias", (64,)))
        },
        heads,
    )


@pytest.mark.parametrize("quant", ["none", "nf4", "nf4-double"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2"])
def test_captured_steps_of_random_models_in_16_bits(kind: str, quant: str, tmp_path: Path) -> None:
    """A forward has the same rows either way; only attention over a span could round otherwise."""
    save_with_heads(tmp_path, kind)
    told = []
    for eager in (True, None):
        engine = medusa_chat.load(
            str(tmp_path), device="cuda", quant=quant, tree="chain-2", probing=False, eager=eager
        )
        steps = engine.generate([1, 2, 3], Sampling(max_new_tokens=40, ignore_eos=True))
        told.append([token.id for step in steps for token in step.tokens])
    assert told[0][:8] == told[1][:8]  # near-ties may part them later


def tree_behind(
    nodes: int, length: int, span: int, number: torch.dtype, window: int | None = None
) -> TreeMask:
    tensors = TreeTensors.of(random_tree(nodes, nodes - 1, 8, 6), torch.device("cuda"))
    start = torch.tensor(length, device="cuda")
    return TreeMask.of(
        tensors.ancestors, tensors.depths + length, start, span, number, window=window
    )


# Nodes, text, span, window, softcap.
LENGTHS = [
    (1, 0, 256, None, None),
    (1, 2000, 2048, None, None),
    (16, 900, 1024, 512, None),
    (64, 1984, 2048, None, None),
    (64, 1500, 2048, 4, 30.0),
    (128, 128, 256, None, 50.0),
    (33, 5000, 8192, 4096, None),
]


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (28, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_kernel_is_its_twin(
    lengths: tuple[int, int, int, int | None, float | None],
    heads: tuple[int, int],
    size: int,
    number: torch.dtype,
) -> None:
    """What lies behind the text is not a number. Both are held against the twin in float32.

    Each case compiles for itself, so that a run can be cut and spread over processes (-n 8).
    """
    pytest.importorskip("triton")
    attend = kernel_for(torch.device("cuda"))
    atol, rtol = (2e-5, 2e-5) if number == torch.float32 else (5e-3, 2e-2)
    nodes, length, span, window, softcap = lengths
    mask = tree_behind(nodes, length, span, torch.float32, window)
    rows = len(mask.ancestors)
    query = torch.randn(1, rows, heads[0], size, device="cuda", dtype=number).transpose(1, 2)
    cache = torch.randn(2, 1, heads[1], span, size, device="cuda", dtype=number)
    expected = torch_attention(
        query.float(), cache[0].float(), cache[1].float(), mask, size**-0.5, softcap
    )
    cache[:, :, :, length + rows :] = torch.nan
    ours = attend(query, cache[0], cache[1], mask, size**-0.5, softcap)
    torch.testing.assert_close(ours.float(), expected, atol=atol, rtol=rtol)


def test_the_kernel_reads_caches_of_more_than_2_to_the_31_numbers() -> None:
    pytest.importorskip("triton")
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB")
    cache = torch.empty(1, 3, 9 * 2**20, 128, device="cuda", dtype=torch.bfloat16)[:, :, :512]
    cache.normal_()
    mask = tree_behind(8, 500, 512, torch.bfloat16)
    query = torch.randn(1, 6, 8, 128, device="cuda").bfloat16()
    ours = kernel_for(torch.device("cuda"))(query, cache, cache, mask, 0.1, None)
    theirs = torch_attention(query, cache, cache, mask, 0.1)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=5e-3)


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 96, 128, 256])
def test_the_rule_takes_the_kernel_from_ampere_on(size: int, number: torch.dtype) -> None:
    pytest.importorskip("triton")
    choice = choose_attention(torch.device("cuda"), Shape(32, 8, size, number))
    new_enough = torch.cuda.get_device_capability() >= (8, 0)
    assert (choice.name == TRITON) is new_enough, choice.reason


@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_operations_of_layers_are_their_twins(number: torch.dtype) -> None:
    pytest.importorskip("triton")
    operations, reason = choose_operations(torch.device("cuda"), number)
    assert operations is not None, reason


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3-mixed", "gemma2"])
def test_a_step_with_the_kernel_is_captured_and_says_what_the_eager_one_says(
    kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("triton")
    from medusa_chat.model.attention.kernel import attend

    save_with_heads(tmp_path, kind)
    told = []
    for eager in (True, None):
        engine = medusa_chat.load(
            str(tmp_path),
            device="cuda",
            dtype="float32",
            tree="chain-2",
            probing=False,
            eager=eager,
        )
        engine.backbone.attention = Choice("kernel", attend)
        steps = engine.generate([1, 2, 3], Sampling(max_new_tokens=300, ignore_eos=True))
        told.append([token.id for step in steps for token in step.tokens])
    assert told[0] == told[1]
    assert len({key[2] for key in captured_graphs(engine) if key[0] == "forward"}) > 1


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_ligers_kernel_gives_our_loss_and_gradients(
    own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    lm_head = torch.nn.Linear(64, 320, bias=False, device="cuda")
    heads = MedusaHeads(3, 2, 64, 320 if own else None).cuda()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    hidden = torch.randn(4, 50, 64, device="cuda")
    labels = torch.randint(0, 320, (4, 50), device="cuda")
    labels[:, :7] = IGNORED
    positions = torch.arange(50, device="cuda").expand(4, 50)
    trained = [*heads.parameters(), lm_head.weight] if not own else list(heads.parameters())
    kernel = entropy._liger()
    assert kernel is not None
    found = []
    for chosen in (kernel, None):
        monkeypatch.setattr(entropy, "_liger", lambda chosen=chosen: chosen)
        assert (entropy._fused(hidden[0], lm_head) is not None) is (chosen is not None)
        total = losses.heads_loss(heads, lm_head, hidden, labels, positions, 0.8).total
        found.append((total, *torch.autograd.grad(total, trained)))
        nothing = torch.full_like(labels, IGNORED)
        assert losses.heads_loss(heads, lm_head, hidden, nothing, positions, 0.8).total == 0
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3 * ours.abs().max().item())


@pytest.mark.parametrize("recipe", ["medusa1", "medusa2", "distilled"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_recipes_run_on_the_gpu(recipe: str, quant: str, tmp_path: Path) -> None:
    backbone_folder(tmp_path / "backbone", hidden_size=64, intermediate_size=128)
    steps, _ = do(
        tiny_run(
            tmp_path, "out", recipe, quant=quant, max_steps=30, learning_rate=0.02, batch_size=4
        )
    )
    assert steps[-1].head_loss[0] < steps[0].head_loss[0]
    engine = medusa_chat.load(
        str(tmp_path / ("backbone" if recipe == "medusa1" else "out")),
        str(tmp_path / "out"),
        device="cuda",
        tree="chain-2",
        probing=False,
    )
    drawn = engine.generate(TALE, Sampling(max_new_tokens=8, ignore_eos=True))
    assert sum(len(step.tokens) for step in drawn) == 8
