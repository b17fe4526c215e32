"""tokenizer.json and its settings from the vocabulary of a GGUF file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from medusa_chat.config import UserError
from medusa_chat.hub.gguf.config import CONTROL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.hub.gguf.header import Header

USER_DEFINED = 4  # the type of tokens that are found whole in a text, and stand for themselves
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's sign of a space
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS % "1,3"
_QWEN = _WORDS % "1"
# How a byte-level vocabulary splits a text, by the name that the file gives: a pattern, or one of
# GPT-2's splits. Source: llama.cpp, src/llama-vocab.cpp.
GPT2, DIGITS = "gpt2", "gpt2 with single digits"
SPLITS = {
    "default": GPT2,
    "gpt-2": GPT2,
    "phi-2": GPT2,
    "olmo": GPT2,
    "smollm": DIGITS,
    "refact": DIGITS,
    "starcoder": DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "tekken": _TEKKEN,
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
}
ADDS_BOS = ("llama3", "llama-v3", "llama-bpe", "tekken")  # where the file does not say


def tokenizer_of(header: Header) -> Tokenizer:
    """Build the tokenizer of a file.

    Raises:
        UserError: the vocabulary is missing, or of a kind that is not known here.
    """
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama") or not header.metadata.get("tokenizer.ggml.tokens"):
        raise UserError(
            f"cannot load the model {header.file}: its tokenizer is of the kind {kind}, and gpt2"
            " and llama can be read"
        )
    made = _byte_level(header) if kind == "gpt2" else _sentencepiece(header)
    tokens = header.metadata["tokenizer.ggml.tokens"]
    kinds = header.metadata.get("tokenizer.ggml.token_type") or []
    for each in zip(tokens, kinds, strict=False):
        _add_whole(made, *each)
    bos = header.metadata.get("tokenizer.ggml.bos_token_id")
    if adds_bos(header) and bos is not None:
        token = tokens[bos]
        made.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", special_tokens=[(token, bos)]
        )
    return made


def settings_of(header: Header) -> dict[str, Any]:
    """Return tokenizer_config.json: special tokens, the context and the chat template."""
    tokens = header.metadata["tokenizer.ggml.tokens"]
    found: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": int(header.of_family("context_length", 0)) or None,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and index < len(tokens):
            found[f"{name}_token"] = tokens[index]
    template = header.metadata.get("tokenizer.chat_template")
    if template:
        found["chat_template"] = template
    return found


def adds_bos(header: Header) -> bool:
    """Tell if every text begins with BOS."""
    known = header.metadata.get("tokenizer.ggml.add_bos_token")
    if known is not None:
        return bool(known)
    sentencepiece = header.metadata.get("tokenizer.ggml.model") == "llama"
    return sentencepiece or header.metadata.get("tokenizer.ggml.pre") in ADDS_BOS


def _add_whole(made: Tokenizer, token: str, kind: int) -> None:
    """Let a token that is no piece of a word be found whole."""
    if kind == CONTROL:
        made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    elif kind == USER_DEFINED:
        made.add_tokens([AddedToken(token, normalized=False)])


def _byte_level(header: Header) -> Tokenizer:
    name = header.metadata.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS:
        raise UserError(
            f"cannot load the model {header.file}: its tokenizer splits a text in the way of"
            f" {name}, which is not known here"
        )
    tokens = header.metadata["tokenizer.ggml.tokens"]
    merges = header.metadata.get("tokenizer.ggml.merges") or []
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    if SPLITS[name] == _QWEN:
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = _splitter(SPLITS[name])
    made.decoder = decoders.ByteLevel()
    return made


def _splitter(split: str) -> Any:
    if split == GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == DIGITS:
        first: Any = pre_tokenizers.Digits(individual_digits=True)
        second = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        first = pre_tokenizers.Split(Regex(split), behavior="isolated")
        second = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([first, second])


def _sentencepiece(header: Header) -> Tokenizer:
    """Build a SentencePiece BPE, whose merges follow from the scores of its tokens."""
    gemma = header.architecture.startswith("gemma")
    tokens = [_respelled(token) for token in header.metadata["tokenizer.ggml.tokens"]]
    scores: Sequence[float] = header.metadata.get("tokenizer.ggml.scores") or []
    if gemma or len(scores) != len(tokens):  # Gemma's merges follow the order of its tokens
        scores = range(0, -len(tokens), -1)
    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id", 0)
    made = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(tokens, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Replace(" ", SPACE)]
    texts: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.metadata.get("tokenizer.ggml.add_space_prefix", not gemma):
        spaces.insert(0, normalizers.Prepend(SPACE))
        texts.append(decoders.Strip(" ", 1, 0))
    made.normalizer = normalizers.Sequence(spaces)
    made.decoder = decoders.Sequence(texts)
    return made


def _respelled(token: str) -> str:
    """Write a token of spaces alone with SentencePiece's sign."""
    return SPACE * len(token) if token and not token.strip(" ") else token


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return all ways to join two tokens to one, the best of them first."""
    score_of = dict(zip(tokens, scores, strict=True))
    found: list[tuple[float, str, str]] = []
    for token, score in score_of.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in score_of and right in score_of:
                found.append((score, left, right))
    found.sort(key=lambda each: (-each[0], -score_of[each[1]], -score_of[each[2]]))
    return [(left, right) for _, left, right in found]
