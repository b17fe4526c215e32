"""A reply in the making: ids to text, stop strings, EOS, limits, loops. No torch here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers.decoders import DecodeStream

from medusa_chat.decoding.loop import LoopGuard
from medusa_chat.events import Finish, Token

if TYPE_CHECKING:
    from collections.abc import Sequence

    from medusa_chat.sampling import Sampling

Marked = list[tuple[str, bool]]  # characters, each with whether it is shown


class Reply:
    """Takes the tokens of a reply one by one and notices its end.

    Attributes:
        finish: the reason for the end, or None.
    """

    def __init__(
        self,
        tokenizer: Any,
        sampling: Sampling,
        eos: frozenset[int],
        left: int,
        before: Sequence[int] = (),
    ) -> None:
        """Start an empty reply.

        Args:
            tokenizer: of transformers.
            sampling: its limit, stop strings, `ignore_eos` and `loop_guard` are read.
            eos: ids that end a reply.
            left: tokens that the context still holds.
            before: tokens of the text that the reply goes on with: a first word keeps its space.
        """
        self.finish: Finish | None = None
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=list(before), skip_special_tokens=True)
        self._pending: list[int] = []  # tokens without text yet: bytes of a character
        self._eos = frozenset() if sampling.ignore_eos else eos
        self._limit = min(sampling.max_new_tokens, left)
        self._full: Finish = "length" if sampling.max_new_tokens <= left else "context"
        self._stop = sampling.stop
        self._held: Marked = []  # text that may yet turn out to begin a stop string
        added = self._tokenizer.get_added_tokens_decoder().items() if sampling.stop else ()
        self._special = {token: entry.content for token, entry in added if entry.special}
        self._guard = LoopGuard() if sampling.loop_guard == "on" else None
        self._count = 0

    def ends_at(self, token: int) -> bool:
        """Tell if `token` as the next one would end the reply whatever its text."""
        return token in self._eos or self._count + 1 >= self._limit

    def take(self, ids: Sequence[int], heads: Sequence[int]) -> list[Token]:
        """Add tokens until the reply is over; returns those that belong to it."""
        taken: list[Token] = []
        for token, head in zip(ids, heads, strict=True):
            if self.finish:
                break
            taken.append(Token(token, self._text(token), head))
        return taken

    def _text(self, token: int) -> str:
        self._count += 1
        if token in self._eos:
            self.finish = "eos"
        elif self._count >= self._limit:
            self.finish = self._full
        elif self._guard and self._guard.loops(token):
            self.finish = "loop"
        if token in self._eos:
            return self._released([])
        if not self._stop:
            return self._piece(token)
        # A stop string may name special tokens, which are searched and not shown.
        text = [(char, True) for char in self._piece(token)]
        return self._released(text + [(char, False) for char in self._special.get(token, "")])

    def _piece(self, token: int) -> str:
        """Return the text that a token adds; none while it is part of a character."""
        self._pending.append(token)
        try:
            piece = self._stream.step(self._tokenizer, token)
        except Exception:
            # Bytes that make no character spoil those before them and the stream (tokenizers 0.22).
            piece = self._tokenizer.decode(self._pending, skip_special_tokens=True)
            self._stream = DecodeStream(skip_special_tokens=True)
            self._stream.step(self._tokenizer, token)
        if piece:
            self._pending.clear()
        return piece or ""

    def _released(self, piece: Marked) -> str:
        """Return the text to show: all before a stop string, and nothing that may begin one."""
        held = self._held + piece
        text = "".join(char for char, _ in held)
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        end = len(text)
        if found:
            self.finish = "stop"
            end = min(found)
        elif not self.finish:
            end -= max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = [] if found else held[end:]
        return "".join(char for char, shown in held[:end] if shown)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Collect the EOS ids of a transformers model's generation config and of the tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return frozenset(token for token in (*listed, tokenizer.eos_token_id) if token is not None)


def generation_settings(model: Any) -> dict[str, Any]:
    """Return a transformers model's generation config by name, as its file has it."""
    configured = getattr(model, "generation_config", None)
    return dict(configured.to_dict()) if configured else {}
