"""Sampling: the settings of one reply. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

from medusa_chat.settings import (
    check_choices,
    check_names,
    parse_value,
    require,
    require_above,
    require_at_least,
    require_between,
    setting,
)

Mode = Literal["greedy", "typical", "exact", "vanilla"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_SEED = 2**32 - 1
COLD = 1e-5  # a temperature below this counts as 0: logits divided by it could overflow


@dataclass(frozen=True)
class Sampling:
    """Settings of one reply. Each field is also a `--flag` and a name for `/set`.

    Epsilon and delta are the paper's (section 2.3.1); the released code has delta = sqrt(epsilon).
    """

    mode: Mode = setting("greedy", "greedy, typical, exact or vanilla")
    temperature: float = setting(0.7, "higher is more varied; 0 is greedy")
    top_p: float = setting(
        1.0, "draw from the likeliest tokens that add up to this probability; 1 is off"
    )
    top_k: int = setting(0, "draw from this many likeliest tokens; 0 is off")
    min_p: float = setting(
        0.0, "leave out tokens below this share of the likeliest one's probability; 0 is off"
    )
    repetition_penalty: float = setting(
        1.0, "divide the scores of tokens that prompt or reply hold; 1 is off, 1.1 is usual"
    )
    presence_penalty: float = setting(
        0.0, "lower the scores of tokens that the reply holds by this much; 0 is off"
    )
    frequency_penalty: float = setting(
        0.0, "lower them by this much for each time that the reply holds them; 0 is off"
    )
    epsilon: float = setting(0.09, "typical acceptance: the hard threshold")
    delta: float = setting(0.3, "typical acceptance: the entropy factor")
    seed: int = setting(0, "the same seed gives the same reply")
    max_new_tokens: int = setting(512, "longest reply")
    stop: tuple[str, ...] = setting((), "end a reply before this text; \\n is a newline")
    ignore_eos: bool = setting(False, "continue after the model ends its reply")

    def __post_init__(self) -> None:
        check_choices(self)
        require_at_least(self, 0, "temperature", "top_k")
        require_at_least(self, 1, "max_new_tokens")
        require_above(self, 0, "top_p", "epsilon", "delta", "repetition_penalty")
        require_between(self, -2, 2, "presence_penalty", "frequency_penalty")
        require_between(self, 0, 1, "top_p", "min_p", "epsilon")
        require_between(self, 0, MAX_SEED, "seed")
        require(all(self.stop), "a stop string may not be empty")

    @property
    def greedy(self) -> bool:
        """True if the reply is the argmax path, in any mode."""
        return self.mode == "greedy" or self.temperature < COLD

    @property
    def penalized(self) -> bool:
        """True if tokens that the text holds already are penalized."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def with_value(self, name: str, text: str) -> Sampling:
        """Return a copy with field `name` read from `text`, as `/set` gives it."""
        check_names(Sampling, [name])
        return replace(self, **{name: parse_value(name, get_type_hints(Sampling)[name], text)})
