"""Other decoders: transformers over the same weights, and llama.cpp over a GGUF file."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from medusa_chat.config import ModelSpec, UserError
from medusa_chat.decoding.reply import eos_ids
from medusa_chat.model.linear.packed import pack_linears
from medusa_chat.model.linear.quantization import quant_of
from medusa_chat.model.pretrained import load_pretrained
from medusa_chat.sampling import Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.decoding.engine import Engine

TRANSFORMERS = "transformers"
LLAMA_CPP = "llama.cpp"
PLAIN = Sampling()
LOOKUP = 10  # tokens that transformers copies at once (prompt_lookup_num_tokens)


@dataclass(frozen=True)
class PeerReply:
    """A greedy reply of another decoder.

    Attributes:
        tokens: how many it has, EOS included.
        first: seconds from the prompt to the first token.
        seconds: seconds from the prompt to the end.
    """

    text: str
    tokens: int
    first: float
    seconds: float


class Peer(Protocol):
    """Another decoder."""

    def reply(self, prompt: list[int], max_new_tokens: int) -> PeerReply:
        """Answer ids of the engine's tokenizer greedily."""


def check_peers(peers: Sequence[str]) -> None:
    """Raise UserError for a peer that cannot be measured, before the long work."""
    for peer in peers:
        name, _, file = peer.partition("=")
        if peer != TRANSFORMERS and (name != LLAMA_CPP or not file):
            raise UserError(f"--peer is {TRANSFORMERS} or {LLAMA_CPP}=FILE.gguf, not {peer!r}")
        if name == LLAMA_CPP:
            _llama_class()
            if not Path(file).is_file():
                raise UserError(f"--peer {peer}: there is no file {file}")


def load_peers(engine: Engine, peers: Sequence[str]) -> dict[str, Peer]:
    """Load the decoders that `--peer` names; transformers serves with and without lookup."""
    found: dict[str, Peer] = {}
    for peer in peers:
        name, _, file = peer.partition("=")
        if name == TRANSFORMERS:
            plain = TransformersPeer(engine)
            found |= {TRANSFORMERS: plain, f"{TRANSFORMERS}-lookup": plain.with_lookup(LOOKUP)}
        else:
            found[f"{LLAMA_CPP} {Path(file).name}"] = LlamaCppPeer(engine, Path(file))
    return found


class TransformersPeer:
    """Greedy generate() of transformers, with its default attention and cache."""

    def __init__(self, engine: Engine) -> None:
        backbone = engine.backbone
        spec = ModelSpec(engine.name, backbone.model.name_or_path)
        quant = quant_of(backbone.model.config) or _packed_quant(engine) or "none"
        model, _ = load_pretrained(spec, backbone.dtype, quant, backbone.device)
        self.model = model.eval()
        self._tokenizer = engine.tokenizer
        self._lookup = 0
        if quant == "int8":
            # On a CPU bitsandbytes cuts activations to 8 bits. The engine does not.
            pack_linears(self.model)

    def with_lookup(self, tokens: int) -> TransformersPeer:
        """Return a peer of the same model that copies so many tokens from the text at once."""
        other = object.__new__(TransformersPeer)
        vars(other).update(vars(self), _lookup=tokens)
        return other

    def reply(self, prompt: list[int], max_new_tokens: int) -> PeerReply:
        """Answer ids greedily."""
        clock = _FirstToken()
        started = time.perf_counter()
        ids = self.generate(prompt, max_new_tokens, streamer=clock)
        seconds = time.perf_counter() - started
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return PeerReply(text, len(ids), clock.first - started, seconds)

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        sampling: Sampling = PLAIN,
        streamer: Any = None,
    ) -> list[int]:
        """Return the ids of the greedy reply, EOS included.

        Args:
            prompt: ids.
            max_new_tokens: of the reply.
            sampling: its penalties count, and those of the model's own generation config do not.
            streamer: of transformers.
        """
        ids = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            repetition_penalty=sampling.repetition_penalty,
            logits_processor=[_ReplyPenalties(len(prompt), sampling)],
            prompt_lookup_num_tokens=self._lookup or None,
            streamer=streamer,
        )
        reply: list[int] = output[0, len(prompt) :].tolist()
        return reply


@dataclass(frozen=True)
class _ReplyPenalties:
    """A logits processor with the penalties that transformers does not have."""

    prompt: int
    sampling: Sampling

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Penalize the reply's tokens. ids: [1, text]; scores: [1, V]."""
        counts = torch.bincount(ids[0, self.prompt :], minlength=scores.shape[-1])
        presence, frequency = self.sampling.presence_penalty, self.sampling.frequency_penalty
        return scores - frequency * counts - presence * (counts > 0)


class _FirstToken:
    """A streamer of transformers that notes when the first token came."""

    def __init__(self) -> None:
        self.first = 0.0
        self._prompt_seen = False

    def put(self, _tokens: Any) -> None:
        """Take the prompt, then tokens."""
        if self._prompt_seen and not self.first:
            self.first = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        """Note the end as the first token where none came before."""
        self.first = self.first or time.perf_counter()


class LlamaCppPeer:
    """llama.cpp through llama-cpp-python: greedy, with the engine's threads and context.

    It takes the engine's ids if both vocabularies have one size, else the prompt's text.
    """

    def __init__(self, engine: Engine, file: Path) -> None:
        threads = engine.backbone.threads
        try:
            self._llama = _llama_class()(
                model_path=str(file),
                n_ctx=engine.context,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except (ValueError, RuntimeError) as error:
            raise UserError(f"llama.cpp cannot load {file}: {error}") from None
        self._tokenizer = engine.tokenizer
        self._same = self._llama.n_vocab() == engine.backbone.vocabulary
        own = eos_ids(engine.backbone.model, engine.tokenizer) if self._same else frozenset[int]()
        self._ends = own | {self._llama.token_eos()}

    def reply(self, prompt: list[int], max_new_tokens: int) -> PeerReply:
        """Answer ids greedily, after their prefill from an empty cache."""
        ids = prompt if self._same else self._ids_of(self._tokenizer.decode(prompt))
        self._llama.reset()
        tokens: list[int] = []
        started = first = time.perf_counter()
        for token in self._llama.generate(ids, temp=0.0, repeat_penalty=1.0, reset=True):
            tokens.append(int(token))
            if len(tokens) == 1:
                first = time.perf_counter()
            if token in self._ends or len(tokens) >= max_new_tokens:
                break
        seconds = time.perf_counter() - started
        text = self._llama.detokenize(tokens).decode(errors="replace")
        return PeerReply(text, len(tokens), first - started, seconds)

    def _ids_of(self, text: str) -> list[int]:
        ids: list[int] = self._llama.tokenize(text.encode(), add_bos=False, special=True)
        return ids


def _packed_quant(engine: Engine) -> str | None:
    """Return the quantization of weights that the native step packed from plain files."""
    native = engine.backbone.native
    return native.weights if native and native.weights in ("int8", "nf4") else None


def _llama_class() -> Any:
    try:
        from llama_cpp import Llama
    except ImportError:
        raise UserError(
            "--peer llama.cpp=FILE needs llama-cpp-python: pip install llama-cpp-python"
        ) from None
    return Llama
