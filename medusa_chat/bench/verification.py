"""`medusa-chat verify`: greedy equals vanilla, exact equals vanilla sampling, and near-ties are told from faults."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medusa_chat.bench.peers import TransformersPeer
from medusa_chat.decoding.acceptance import Numbers, temper, truncate
from medusa_chat.decoding.noise import gumbel
from medusa_chat.decoding.trees.growth import dynamic_tree
from medusa_chat.decoding.trees.tree import AnyTree, Tree, chain, named_tree, paper_trees
from medusa_chat.model.attention.tree_attention import chain_mask
from medusa_chat.model.linear.quantization import quant_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from medusa_chat.config import Sampling
    from medusa_chat.decoding.engine import Engine
    from medusa_chat.model.backbone import Backbone
    from medusa_chat.prompts import Prompt

SAMPLINGS = tuple((temperature, top_p) for temperature in (0.3, 0.7, 1.0) for top_p in (1.0, 0.9))
WITH_COPIES = (
    "auto",
    "mc_sim_7b_63",
    "random-12",
    "dynamic-16",
    "dynamic-64",
)  # trees decoded with copies too
ULPS = (
    16  # two scores closer than this many units in the last place of the dtype may fall either way
)
NOISE = 4  # two scores of a quantized model, than this many times the largest difference that the row count makes
REPLAYED = 32  # tokens whose logits are computed one row at a time too, to measure that difference


@dataclass
class Check:
    """One row of the table: how many replies of a mode and tree equal their reference."""

    name: str
    replies: int = 0
    equal: int = 0
    near_ties: int = 0
    faults: int = 0
    largest_gap: float = 0.0
    first_fault: str = ""


def random_tree(rng: random.Random, nodes: int, depth: int, width: int) -> Tree:
    """A random prefix-closed tree."""
    paths: set[tuple[int, ...]] = set()
    while len(paths) < nodes:
        parent = rng.choice([(), *sorted(path for path in paths if len(path) < depth)])
        paths.add((*parent, rng.randrange(width)))
    return Tree.of(paths, f"random-{nodes}")


def trees_to_check(engine: Engine, seed: int) -> dict[str, AnyTree]:
    """The engine's own tree, every released one, a chain, two random and two dynamic ones, pruned to the heads."""
    rng = random.Random(seed)
    named: dict[str, AnyTree] = {"auto": engine.trees.current} | {
        name: named_tree(name) for name in paper_trees()
    }
    named[f"chain-{engine.heads}"] = chain(engine.heads)
    for nodes in (12, 40):
        named[f"random-{nodes}"] = random_tree(rng, nodes, engine.heads, 10)
    accuracy = engine.runner.accuracy.pruned(engine.heads, engine.backbone.vocabulary)
    return named | {f"dynamic-{nodes}": dynamic_tree(accuracy, nodes) for nodes in (16, 64)}


def verify(
    engine: Engine,
    prompts: list[Prompt],
    sampling: Sampling,
    *,
    turns: int,
    progress: Callable[[int, int], None],
) -> list[Check]:
    """Decode every prompt in every tree and compare with vanilla: greedy on all turns, exact on three temperatures."""
    trees = trees_to_check(engine, sampling.seed)
    peer = TransformersPeer(engine)
    checks: dict[str, Check] = {}

    def compare(
        name: str, ids: list[int], reference: list[int], found: list[int], how: Sampling
    ) -> None:
        _compare(checks.setdefault(name, Check(name)), engine, ids, reference, found, how)

    for done, prompt in enumerate(prompts, 1):
        for ids in _histories(engine, prompt, turns):
            reference = _ids(
                engine, ids, replace(sampling, mode="vanilla", sample=False), engine.trees.current
            )
            plain = replace(sampling, mode="greedy")
            room = min(
                sampling.max_new_tokens, engine.context - len(ids)
            )  # its own end has to be ours
            compare("vanilla, generate()", ids, peer.generate(ids, room), reference, plain)
            for name, tree in trees.items():
                compare(f"greedy, {name}", ids, reference, _ids(engine, ids, plain, tree), plain)
                if name in WITH_COPIES:
                    found = _ids(engine, ids, plain, tree, copies=True)
                    compare(f"greedy, {name}, copies", ids, reference, found, plain)
            for temperature, top_p in SAMPLINGS:
                drawn = replace(
                    sampling, mode="exact", temperature=temperature, top_p=top_p, seed=done
                )
                vanilla = _ids(
                    engine, ids, replace(drawn, mode="vanilla", sample=True), engine.trees.current
                )
                for name, copies in (("auto", False), ("dynamic-16", True)):
                    found = _ids(engine, ids, drawn, trees[name], copies)
                    law = f"exact, {name}{', copies' if copies else ''}, T={temperature}, top-p={top_p}"
                    compare(law, ids, vanilla, found, drawn)
        progress(done, len(prompts))
    return list(checks.values())


def _histories(engine: Engine, prompt: Prompt, turns: int) -> Iterator[list[int]]:
    """Ids of the conversation before each of the first replies, with the answers that the file has."""
    messages = prompt.reference or prompt.opening()
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"][:turns]
    for i in asked:
        ids = engine.encode(list(messages[: i + 1]))
        if len(ids) + 1 < engine.context:
            yield ids


def _ids(
    engine: Engine, prompt: list[int], sampling: Sampling, tree: AnyTree, copies: bool = False
) -> list[int]:
    engine.trees.use(tree)
    engine.trees.use_copies(copies)
    engine.notices.clear()
    return [token.id for step in engine.generate(prompt, sampling) for token in step.tokens]


def _compare(
    check: Check,
    engine: Engine,
    prompt: list[int],
    reference: list[int],
    found: list[int],
    sampling: Sampling,
) -> None:
    check.replies += 1
    if reference == found:
        check.equal += 1
        return
    place = next(
        (i for i, pair in enumerate(zip(reference, found, strict=False)) if pair[0] != pair[1]),
        None,
    )
    if place is None:
        gap, limit = float("inf"), 0.0
    else:
        gap, limit = _gap(
            engine, prompt + reference[:place], reference[place], found[place], sampling
        )
    check.largest_gap = max(check.largest_gap, gap)
    if gap <= limit:
        check.near_ties += 1
        return
    check.faults += 1
    check.first_fault = check.first_fault or (
        f"after {engine.tokenizer.decode((prompt + reference)[-12:])!r}: token {place} differs, gap {gap:.3g}"
    )


def _rounding(backbone: Backbone, noise: float, largest: float) -> float:
    """The gap of two logits that rounding explains, where the largest of all is `largest`.

    Kernels of quantized layers differ by their number of rows in ways that no dtype tells: some cut activations, by
    scales or columns that all rows share. There the difference is measured on plain text, where no tree is involved,
    and held below what 16 bits explain.
    """
    unit = torch.finfo(backbone.dtype).eps * largest
    if not quant_of(backbone.model.config):
        return ULPS * unit
    return min(max(NOISE * noise, 2 * unit), ULPS * torch.finfo(torch.bfloat16).eps * largest)


def _row_noise(backbone: Backbone, text: list[int]) -> float:
    """The largest difference of a logit between all rows at once and the last of them one by one."""
    tokens = torch.tensor(text, device=backbone.device)
    positions = torch.arange(len(text), device=backbone.device)
    start = max(len(text) - REPLAYED, 0)
    together = backbone.logits(backbone.hidden_of_text(tokens)[start:]).float()
    cache = backbone.new_cache(len(text))
    if start:
        mask = chain_mask(start, backbone.dtype, backbone.device)
        backbone.hidden(tokens[:start], positions[:start], mask, cache)
        cache.commit(tuple(range(start)))
    noise = 0.0
    for i in range(start, len(text)):
        alone = backbone.logits(
            backbone.hidden(tokens[i : i + 1], positions[i : i + 1], None, cache)
        ).float()
        cache.commit((0,))
        noise = max(noise, float((alone[0] - together[i - start]).abs().max()))
    return noise


@torch.inference_mode()
def _gap(
    engine: Engine, text: list[int], a: int, b: int, sampling: Sampling
) -> tuple[float, float]:
    """Gap of the two tokens' scores after `text`, teacher-forced, and the gap that rounding explains."""
    backbone = engine.backbone
    logits = backbone.logits(
        backbone.hidden_of_text(torch.tensor(text, device=backbone.device))[-1:]
    ).float()
    noise = _row_noise(backbone, text)
    limit = _rounding(backbone, noise, float(logits.abs().max()))
    if sampling.greedy:
        return abs(float(logits[0, a] - logits[0, b])), limit
    limit /= sampling.temperature
    if any(_at_an_edge(logits, token, sampling, NOISE * noise) for token in (a, b)):
        return limit, limit
    scores = temper(logits, sampling.temperature)
    scores = scores + gumbel(
        sampling.seed, torch.tensor([len(text)], device=scores.device), scores.shape[-1]
    )
    return abs(float(scores[0, a] - scores[0, b])), limit


def _at_an_edge(logits: Tensor, token: int, sampling: Sampling, noise: float) -> bool:
    """Whether noise may put a token in or out of what top-p, top-k and min-p leave. logits: [1, V]."""
    kept = []
    for change in (-noise, noise):
        rounded = logits.clone()
        rounded[0, token] += change
        scores = truncate(temper(rounded, sampling.temperature), *Numbers.of(sampling)[1:4])
        kept.append(bool(scores[0, token].isfinite()))
    return kept[0] != kept[1]
