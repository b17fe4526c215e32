"""The smallest real things to test the engine on: random models, heads, a tokenizer."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteMoeHybridConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from medusa_chat.config import LoadOptions
from medusa_chat.decoding.engine import Engine
from medusa_chat.decoding.trees.tree import AnyTree, Tree
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.heads import HeadVocabulary, MedusaHeads
from medusa_chat.model.layouts import write_heads
from medusa_chat.model.pretrained import attention_settings
from medusa_chat.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from medusa_chat.events import Step

torch.set_num_threads(1)

WINDOW = 12
SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
END = 256 + SPECIAL.index("<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
GRANITE = {
    "logits_scaling": 4.0,
    "embedding_multiplier": 1.5,
    "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
}
# Windows are shorter than the texts, and softcaps small enough to matter.
MIXED = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
}
ARCHITECTURES: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-wide-heads": (LlamaConfig, {"head_dim": 16, "num_key_value_heads": 1}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": (MistralConfig, {"sliding_window": WINDOW, "head_dim": 8}),
    "mistral-full": (MistralConfig, {"sliding_window": None, "head_dim": 8}),
    "qwen2": (Qwen2Config, {}),
    "qwen2-mixed": (
        Qwen2Config,
        {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    ),
    "qwen2-sliding": (
        Qwen2Config,
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": WINDOW},
    ),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "qwen3-mixed": (
        Qwen3Config,
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "sliding_window": WINDOW,
        },
    ),
    "phi3": (Phi3Config, {}),
    "phi3-sliding": (Phi3Config, {"sliding_window": WINDOW}),
    "gemma2": (
        Gemma2Config,
        MIXED
        | {
            "head_dim": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 24,
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        MIXED
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
}
# Families that the native step does not run.
TORCH_ONLY: dict[str, tuple[type, dict[str, Any]]] = {
    "granite": (GraniteConfig, GRANITE),
    "granite4": (
        GraniteMoeHybridConfig,
        GRANITE
        | {
            "layer_types": ["full_attention"] * 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
        },
    ),
}


def random_model(kind: str = "llama", vocabulary: int = 64, seed: int = 2, **changes: Any) -> Any:
    """A transformers model with random weights, in float32."""
    config_class, own = (ARCHITECTURES | TORCH_ONLY)[kind]
    torch.manual_seed(seed)
    config = config_class(**(SMALL | own | {"vocab_size": vocabulary} | changes))
    model = AutoModelForCausalLM.from_config(config, **attention_settings(config))
    model.generation_config.eos_token_id = None
    return model.float().eval()


def random_backbone(
    kind: str = "llama", vocabulary: int = 64, seed: int = 2, **changes: Any
) -> Backbone:
    return Backbone(random_model(kind, vocabulary, seed, **changes))


def random_heads(
    backbone: Backbone,
    heads: int = 4,
    layers: int = 1,
    own: bool = True,
    seed: int = 1,
    *,
    vocabulary: HeadVocabulary | None = None,
    parent_bias: int = 0,
) -> MedusaHeads:
    rows = backbone.vocabulary if vocabulary is None else len(vocabulary)
    made = MedusaHeads(
        heads,
        layers,
        backbone.hidden_size,
        rows if own else None,
        vocabulary=vocabulary,
        parent_bias=parent_bias,
        size=backbone.vocabulary,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return made.requires_grad_(False)


class OracleHeads:
    """Stands in for MedusaHeads: knows the reply, and puts the right token at a random rank.

    The rank is drawn from `ranks`; -1 means that the head misses.
    """

    def __init__(
        self,
        heads: int,
        vocabulary: int,
        text: Sequence[int],
        ranks: Sequence[int] = (0,),
        seed: int = 0,
    ) -> None:
        self.heads, self.tokens = heads, vocabulary
        self.vocabulary = self.parent_bias = None
        self.text, self.ranks, self.random = list(text), list(ranks), random.Random(seed)
        self.engine: Engine | None = None

    def logits(self, _hidden: Tensor, _lm_head: Any) -> Tensor:
        assert self.engine is not None
        rows = [
            self._guesses(self.engine.runner.cache.length + head)
            for head in range(1, self.heads + 1)
        ]
        return torch.stack(rows)[:, None]

    def _guesses(self, position: int) -> Tensor:
        order = self.random.sample(range(self.tokens), self.tokens)
        rank = self.random.choice(self.ranks)
        if position < len(self.text):
            order.remove(self.text[position])
            order.insert(rank if rank >= 0 else self.tokens - 1, self.text[position])
        logits = torch.empty(self.tokens)
        logits[order] = -torch.arange(self.tokens, dtype=torch.float32)
        return logits


def tokenizer(template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Bytes in the order of ByteLevel's alphabet (0 to 93 are printable ASCII), then SPECIAL."""
    alphabet = {
        character: index
        for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=backend)
    made.chat_template = template
    return made


LOAD_OPTIONS = {"copies", "context", "eager", "probing"}  # that an engine reads, besides the tree


def make_engine(
    backbone: Backbone, heads: Any = None, tree: str | AnyTree = "chain-2", **settings: Any
) -> Engine:
    """An engine that never stops at an EOS, takes no probes and copies nothing by default.

    `settings` are LOAD_OPTIONS, or arguments of Engine.
    """
    usual: dict[str, Any] = {"eos": frozenset(), "probing": False, "copies": False}
    usual |= settings
    named = tree if isinstance(tree, str) else "chain-1"
    options = {name: usual.pop(name) for name in LOAD_OPTIONS & set(usual)}
    options["tree"] = "auto" if heads is None else named
    made = usual.pop("tokenizer", None) or tokenizer()
    engine = Engine(backbone, heads, made, LoadOptions(**options), **usual)
    if heads is not None and not isinstance(tree, str):
        engine.trees.use(tree)
    if isinstance(heads, OracleHeads):
        heads.engine = engine
    return engine


def decode(engine: Engine, prompt: Any, **settings: Any) -> list[Step]:
    return list(engine.generate(prompt, Sampling(**settings)))


def ids_of(steps: Sequence[Step]) -> list[int]:
    return [token.id for step in steps for token in step.tokens]


def reply(engine: Engine, prompt: Any, **settings: Any) -> list[int]:
    return ids_of(decode(engine, prompt, **settings))


def prompt_ids(length: int, vocabulary: int = 64, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(vocabulary), k=length)


PROMPT, NEW = prompt_ids(12), 48  # of the fixture `greedy_text`, and tokens of its reply


def random_tree(seed: int, nodes: int, depth: int, width: int, spine: int = 0) -> Tree:
    """A random tree that has the likeliest guesses of the first `spine` heads."""
    chance = random.Random(seed)
    paths: set[tuple[int, ...]] = {(0,) * length for length in range(spine + 1)}
    for _ in range(50 * nodes):
        if len(paths) > nodes:
            break
        parent = chance.choice(sorted(path for path in paths if len(path) < depth))
        paths.add((*parent, chance.randrange(width)))
    return Tree.of(paths - {()}, f"random {seed}")


def save_with_heads(folder: Path) -> Path:
    """The folder of a model that answers in bytes and ends at an EOS, with four heads."""
    save_model(folder, random_model("llama", 320, pad_token_id=0, eos_token_id=END))
    write_heads(random_heads(random_backbone("llama", 320), own=False), folder)
    return folder


def save_model(folder: Path, model: Any, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A folder as transformers makes it: weights, configs, tokenizer."""
    model.save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return folder
