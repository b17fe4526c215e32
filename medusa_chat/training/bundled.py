"""The recipe of the bundled backbone: tokenizer, text mix, a Llama from scratch, two phases.

    python -m medusa_chat.training.bundled --data FOLDER --out build/backbone --phase language

FOLDER has a JSONL file of conversations for each source that the mixes below name. The first phase
learns the language of all sources, on short rows at a constant rate. The second learns to be the
assistant: agent sources only, loss on the assistant's tokens only, long rows of several
conversations, rate falling to zero. `--resume` goes on from the last checkpoint of either. The
heads come from the ordinary `medusa-chat distill` and `medusa-chat train`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from medusa_chat.model.pretrained import load_tokenizer, load_weights
from medusa_chat.model.templates import ChatTemplate
from medusa_chat.training.data import Document, Example, PackedRows, encode, read_documents
from medusa_chat.training.stories import story_conversation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.config import Message

    Conversations = list[list[Message]]
    Sources = dict[str, Conversations]  # by name

SYSTEM = "You are Medusa, a friendly assistant that runs on this computer."
CONTEXT = 1024
# Times that an epoch of each phase contains each source.
LANGUAGE_MIX = {
    "sgd_accentor": 1,
    "star": 1,
    "taskmaster4_coffee": 1,
    "taskmaster3_movies": 1,
    "multiwoz21": 1,
    "woz2": 1,
    "synthetic_persona_chat": 1,
    "bot_smalltalk": 3,
    "own_templates": 3,
    "country_facts": 2,
    "fairytale": 1,
    "self_dialogue": 0.35,
    "stories": 1,
}
ASSISTANT_MIX = {
    "sgd_accentor": 0.35,
    "star": 0.5,
    "taskmaster4_coffee": 0.5,
    "taskmaster3_movies": 0.5,
    "multiwoz21": 1,
    "woz2": 1,
    "bot_smalltalk": 2,
    "own_templates": 2,
    "country_facts": 2,
    "fairytale": 0.2,
    "stories": 0.6,
}
STORIES = 3000
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] | trim }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(conversations: Conversations, size: int = 4096) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which each digit is a token, for times and prices."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (message["content"] for each in conversations for message in each)
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
    )
    wrapped.add_special_tokens({"additional_special_tokens": special[3:]})
    wrapped.chat_template = TEMPLATE
    return wrapped


def read_sources(folder: Path, seed: int) -> Sources:
    """Read the conversations of every source, and make those of the story grammar."""
    rng = random.Random(seed)
    sources: Sources = {}
    for path in sorted(folder.glob("*.jsonl")):
        sources[path.stem] = [list(document.messages) for document in read_documents(path)]
    sources["stories"] = [story_conversation(rng) for _ in range(STORIES)]
    return sources


def mixed(sources: Sources, mix: dict[str, float], seed: int) -> Conversations:
    """Make one epoch: shuffle the sources in the mix, and add the system prompt to some."""
    rng = random.Random(seed)
    chosen: Conversations = []
    for name, weight in mix.items():
        whole, part = divmod(weight, 1)
        chosen += sources[name] * int(whole)
        chosen += rng.sample(sources[name], int(part * len(sources[name])))
    rng.shuffle(chosen)
    system: Message = {"role": "system", "content": SYSTEM}
    return [[system, *each] if rng.random() < 0.25 else each for each in chosen]


def chained(conversations: Conversations, seed: int) -> Iterator[list[Message]]:
    """Join one to four conversations, so that the model learns to follow a change of topic."""
    rng = random.Random(seed)
    remaining = iter(conversations)
    for first in remaining:
        joined = list(first)
        for _ in range(rng.choice((0, 0, 1, 2, 3))):
            following = next(remaining, [])
            joined += [message for message in following if message["role"] != "system"]
        yield joined


def encoded(
    tokenizer: Any, conversations: Conversations, everything: bool = False
) -> Iterator[Example]:
    """Tokenize conversations."""
    template = ChatTemplate(tokenizer, "bundled")
    for conversation in conversations:
        yield from encode(template, Document(tuple(conversation)), everything)


def new_backbone(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, intermediate: int
) -> LlamaForCausalLM:
    """Make a Llama with random weights and tied embeddings."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=intermediate,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def fit(
    model: Any,
    rows: PackedRows,
    out: Path,
    options: argparse.Namespace,
    *,
    batch: int,
    schedule: str,
) -> None:
    """Train the model in place with transformers' Trainer."""
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        learning_rate=options.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=min(100, options.steps // 10),
        weight_decay=0.1,
        adam_beta2=0.95,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=True,
        logging_steps=25,
        save_steps=250,
        save_total_limit=2,
        report_to=[],
        seed=options.seed,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    checkpoint = last_checkpoint(out) if options.resume and out.is_dir() else None
    trainer.train(resume_from_checkpoint=checkpoint)


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint in a folder of Trainer's."""
    found: str | None = get_last_checkpoint(str(folder))
    return found


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the backbone in bfloat16, its tokenizer and its generation config."""
    model.bfloat16()
    model.config.use_cache = True  # Trainer turns it off
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    """Train one phase."""
    options = parse()
    torch.manual_seed(options.seed)
    sources = read_sources(options.data, options.seed)
    if options.phase == "language":
        train_language(sources, options)
    else:
        train_assistant(sources, options)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled backbone from scratch.")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of conversations, a JSONL file a source"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--phase", choices=["language", "assistant"], required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args()


def train_language(sources: Sources, options: argparse.Namespace) -> None:
    """First phase: all tokens of all sources, on short rows at a constant rate."""
    out = options.out / "language"
    tokenizer = train_tokenizer([each for name in LANGUAGE_MIX for each in sources[name]])
    model = new_backbone(tokenizer, 320, 6, 864)
    conversations = mixed(sources, LANGUAGE_MIX, options.seed)
    rows = PackedRows(encoded(tokenizer, conversations, everything=True), 256)
    tokenizer.save_pretrained(out)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {len(rows) * 256:,} tokens", flush=True)
    fit(model, rows, out, options, batch=16, schedule="constant_with_warmup")


def train_assistant(sources: Sources, options: argparse.Namespace) -> None:
    """Second phase: the assistant's tokens, on long rows at a falling rate. Writes the result."""
    language = options.out / "language"
    tokenizer = load_tokenizer(language)
    model = load_weights(Path(last_checkpoint(language) or language), dtype=torch.float32)
    conversations = list(chained(mixed(sources, ASSISTANT_MIX, options.seed + 1), options.seed))
    rows = PackedRows(encoded(tokenizer, conversations), CONTEXT)
    print(f"{len(rows) * CONTEXT:,} tokens", flush=True)
    fit(model, rows, options.out / "assistant", options, batch=4, schedule="linear")
    save(model, tokenizer, options.out)


if __name__ == "__main__":
    main()
