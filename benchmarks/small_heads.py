"""What lifts the heads of a small backbone: train one kind of heads on kept hidden states.

    python benchmarks/small_heads.py STATES --data FILE ...    compute the states of conversations
    python benchmarks/small_heads.py STATES [--blocks N] [--parent-bias RANK] [--decoder-layer] ...

The first call runs SmolLM2-135M (or --model) in the native step over its own answers, and writes
STATES. Each later call trains heads on them and prints a line of JSON: how often the true token is
a head's first guess, or among its first five, behind the right token; and the acceptance length of
a chain of first guesses. A 25th of the conversations is held out for that.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaModel

from medusa_chat.config import LoadOptions
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.model.attention.tree_attention import additive
from medusa_chat.model.head_vocabulary import HeadVocabulary
from medusa_chat.model.heads import MedusaHeads
from medusa_chat.model.loading import load_model
from medusa_chat.training.data import IGNORED, PackedRows, encode, read_documents
from medusa_chat.training.guesses import head_parents
from medusa_chat.training.losses import head_targets, heads_loss
from medusa_chat.training.native_states import NativeReader
from medusa_chat.training.packed_states import within_documents

LENGTH = 512  # tokens of a row
HELD_OUT = 25  # one conversation in so many
DECAY = 0.8
WARM_UP = 50  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("states", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", type=Path, nargs="+")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--parent-bias", type=int, default=0, metavar="RANK")
    parser.add_argument("--head-vocabulary", type=int, default=8192)
    parser.add_argument("--decoder-layer", action="store_true", help="one before all heads")
    parser.add_argument("--next-token", action="store_true", help="it reads the root's embedding")
    parser.add_argument("--greedy-targets", action="store_true", help="the likeliest next tokens")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help="of the rows to train on")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.data:
        keep_states(options)
    else:
        print(json.dumps(train(options)))


def keep_states(options: argparse.Namespace) -> None:
    """Write the hidden states of all rows, those of the held-out conversations apart."""
    spec = replace(resolve_model(options.model), heads=None)
    reader = NativeReader(spec, "none", LENGTH, torch.bfloat16)
    plain = LoadOptions(device="cpu", engine="torch", dtype="float32", context=64)
    loaded = load_model(replace(spec, quant="none"), plain)
    documents = [document for file in options.data for document in read_documents(file)]
    kept: dict[str, Any] = {
        "config": loaded.backbone.config,
        "lm_head": loaded.backbone.lm_head.weight.detach().bfloat16(),
    }
    for name, part in (
        ("held_out", documents[::HELD_OUT]),
        ("train", [each for i, each in enumerate(documents) if i % HELD_OUT]),
    ):
        rows = PackedRows((e for each in part for e in encode(loaded.template, each)), LENGTH)
        labels = torch.stack([rows[row]["labels"] for row in range(len(rows))])
        pairs = zip(rows.ids.long(), rows.positions.long(), strict=True)
        hidden = torch.cat([reader(ids[None], places[None]) for ids, places in pairs])
        kept[name] = (rows.ids.long(), rows.positions.long(), labels, hidden)
        print(f"{name}: {len(part)} conversations, {len(rows.targets()):,} targets", flush=True)
    torch.save(kept, options.states)


class Before(nn.Module):
    """What stands before the heads: a decoder layer of the backbone's kind, the root, or nothing.

    All of it adds nothing at first.
    """

    def __init__(self, config: Any, lm_head: Tensor, *, layer: bool, root: bool) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.root = nn.Linear(config.hidden_size, config.hidden_size, bias=False) if root else None
        if self.root is not None:
            nn.init.zeros_(self.root.weight)
        self.body = None
        if layer:
            one = copy.deepcopy(config)
            one.num_hidden_layers, one.layer_types = 1, None
            one._attn_implementation = "sdpa"
            self.body = LlamaModel(one)
            self.body.embed_tokens, self.body.norm = None, nn.Identity()
            nn.init.zeros_(self.body.layers[0].self_attn.o_proj.weight)
            nn.init.zeros_(self.body.layers[0].mlp.down_proj.weight)

    def forward(self, ids: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        """[rows, length, hidden] -> the same; documents of a row do not see one another."""
        if self.root is not None:
            roots = functional.embedding(ids.roll(-1, 1), self.lm_head)
            hidden = hidden + self.root(roots.to(hidden.dtype))
        if self.body is None:
            return hidden
        mask = additive(within_documents(positions), hidden.dtype)[:, None]
        output = self.body(
            inputs_embeds=hidden, position_ids=positions, attention_mask=mask, use_cache=False
        )
        states: Tensor = output.last_hidden_state
        return states


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train one kind of heads; returns its figures on the held-out conversations."""
    torch.manual_seed(options.seed)
    kept = torch.load(options.states, weights_only=False, mmap=True)
    weight = kept["lm_head"].float()
    lm_head = nn.Linear(weight.shape[1], len(weight), bias=False).requires_grad_(False)
    lm_head.weight = nn.Parameter(weight, requires_grad=False)
    count = int(options.share * len(kept["train"][0]))
    rows = tuple(part[:count] for part in kept["train"])
    targets = rows[2][rows[2] != IGNORED]
    frequent = torch.bincount(targets, minlength=len(weight)).topk(options.head_vocabulary).indices
    heads = MedusaHeads(
        options.heads,
        options.blocks,
        weight.shape[1],
        vocabulary=HeadVocabulary(frequent, len(weight)),
        parent_bias=options.parent_bias,
        size=len(weight),
    )
    before = Before(kept["config"], weight, layer=options.decoder_layer, root=options.next_token)
    began = time.monotonic()
    fit(options, heads, before, lm_head, rows)
    trained = [*heads.parameters(), *before.parameters()]
    settings = {key: value for key, value in vars(options).items() if key not in ("states", "data")}
    return settings | {
        "targets": len(targets),
        "trained_parameters": sum(part.numel() for part in trained),
        "minutes": round((time.monotonic() - began) / 60, 1),
        **measure(heads, before, lm_head, kept["held_out"]),
    }


def fit(
    options: argparse.Namespace,
    heads: MedusaHeads,
    before: Before,
    lm_head: nn.Linear,
    rows: tuple[Tensor, ...],
) -> None:
    weights = [*heads.parameters(), *before.parameters()]
    steps = options.passes * len(rows[0]) // 4
    optimizer = torch.optim.AdamW(weights, options.rate, (0.9, 0.95), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 - step / (steps + 1))
    )
    order = torch.cat([torch.randperm(len(rows[0])) for _ in range(options.passes)])
    for step in range(steps):
        ids, positions, labels, hidden = (part[order[4 * step :][:4]] for part in rows)
        with torch.autocast("cpu", torch.bfloat16):
            if options.greedy_targets:
                likeliest = lm_head(hidden).argmax(-1).roll(1, 1)
                labels = likeliest.where(labels != IGNORED, labels)
            states = before(ids, positions, hidden)
            loss = heads_loss(heads, lm_head, states, labels, positions, DECAY, ids).total
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()


@torch.no_grad()
@torch.autocast("cpu", torch.bfloat16)
def measure(
    heads: MedusaHeads, before: Before, lm_head: nn.Linear, rows: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Count right guesses on rows; a target outside the vocabulary is missed."""
    hits = torch.zeros(heads.heads, 2)
    asked = torch.zeros(heads.heads)
    accepted = 0.0
    for start in range(0, len(rows[0]), 4):
        ids, positions, labels, hidden = (part[start : start + 4] for part in rows)
        features = heads.features(before(ids, positions, hidden).flatten(0, 1))
        right = torch.ones(ids.numel(), dtype=torch.bool)
        for k in range(heads.heads):
            targets = head_targets(labels, positions, k + 1).flatten()
            guesses = ranked(heads, features[k], lm_head, head_parents(ids, k + 1).flatten())
            found = guesses == targets[:, None]
            hits[k] += torch.stack([found[:, 0].sum(), found.any(1).sum()])
            asked[k] += (targets != IGNORED).sum()
            right &= found[:, 0]
            accepted += float(right.sum())
    percent = (100 * hits / asked[:, None]).T.tolist()
    top1, top5 = ([round(value, 1) for value in row] for row in percent)
    length = round(1 + accepted / float(asked[0]), 3)
    return {"top1": top1, "top5": top5, "length_of_chain": length}


def ranked(heads: MedusaHeads, features: Tensor, lm_head: nn.Linear, parents: Tensor) -> Tensor:
    """The five likeliest tokens of one head behind each parent: [n, 5]."""
    logits = heads.shared(lm_head)(features).float()
    if heads.parent_bias is not None:
        logits += heads.parent_bias(parents)
    assert heads.vocabulary is not None
    return heads.vocabulary.tokens[logits.topk(5).indices]


if __name__ == "__main__":
    main()
