"""Sampling: the settings of one reply. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from medusa_chat.settings import (
    UserError,
    check_choices,
    check_names,
    make,
    parse_value,
    require,
    require_above,
    require_at_least,
    require_between,
    setting,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Mode = Literal["greedy", "typical", "exact", "vanilla"]
MODES: tuple[Mode, ...] = get_args(Mode)
MAX_SEED = 2**32 - 1
COLD = 1e-5  # a temperature below this counts as 0: logits divided by it could overflow
CONFIG = "the model's generation_config.json"
OF_DRAWS = ("temperature", "top_p", "top_k", "min_p")  # settings that greedy mode does not use
CHAT_DEFAULTS: dict[str, Any] = {"loop_guard": "on"}  # where they are not those of Sampling
CHAT_ONLY = ("overflow", "loop_guard")  # settings that only the chat reads
OF_MODELS = (*OF_DRAWS, "repetition_penalty")  # settings that a model's generation config may have


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
    loop_guard: Literal["on", "off"] = setting("off", "stop a reply that repeats itself")
    overflow: Literal["drop", "stop"] = setting(
        "drop", "when the context is full: drop leaves out the oldest turns, stop ends the reply"
    )

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

    def unused(self, given: Iterable[str]) -> str:
        """Say in one line which of the given settings greedy mode does not use; maybe empty."""
        names = [name for name in OF_DRAWS if name in given]
        if self.mode != "greedy" or not names or self.temperature < COLD:
            return ""
        return f"greedy mode does not use {' and '.join(names)}; exact and typical mode do"


def defaults_of(configured: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Read a model's generation config as defaults of Sampling.

    A model that is meant to be sampled (do_sample) gets exact mode, which keeps to the distribution
    that its makers chose.

    Args:
        configured: the settings that the config has; None is no setting.

    Returns:
        The defaults by name, and a line for each value that is none.
    """
    complaints = []
    sampled = configured.get("do_sample")
    if not isinstance(sampled, bool | None):
        complaints.append(f"{CONFIG}: do_sample must be true or false, not {sampled!r}")
    found: dict[str, Any] = {"mode": "exact"} if sampled is True else {}
    for name in OF_MODELS:
        value = configured.get(name)
        if value is None:
            continue
        try:
            found[name] = _number(name, value)
        except UserError as error:
            complaints.append(f"{CONFIG}: {error}; {name} stays {getattr(Sampling(), name):g}")
    return found, complaints


def _number(name: str, value: Any) -> float:
    """Return a value of a config as that of a setting. Raises UserError."""
    kind = get_type_hints(Sampling)[name]
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not is_number or kind(value) != value:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} must be {wanted}, not {value!r}")
    changed: dict[str, Any] = {name: kind(value)}
    Sampling(**changed)  # refuses a value out of range
    return float(value) if kind is float else int(value)


def choose_settings(
    defaults: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[Sampling, list[str]]:
    """Join a model's defaults with the settings that the user gave, which win.

    Returns:
        The settings, and the lines for the user on them.
    """
    sampling = make(Sampling, {**defaults, **given})
    lines = (describe_defaults(defaults, given), sampling.unused(given))
    return sampling, [line for line in lines if line]


def change_defaults(
    sampling: Sampling, before: Mapping[str, Any], after: Mapping[str, Any]
) -> tuple[Sampling, str]:
    """Exchange the defaults of one model for those of another; what the user changed stays.

    Returns:
        The settings, and a line for the user on the defaults that hold now; maybe empty.
    """
    usual = asdict(Sampling())
    mine = [name for name in ("mode", *OF_MODELS) if name in before or name in after]
    kept = [name for name in mine if getattr(sampling, name) != before.get(name, usual[name])]
    taken = {name: after.get(name, usual[name]) for name in mine if name not in kept}
    return replace(sampling, **taken), describe_defaults(after, kept)


def describe_defaults(defaults: Mapping[str, Any], given: Iterable[str]) -> str:
    """Say in one line which of a model's defaults hold, as the user gave no others; maybe empty."""
    parts = []
    for name, value in defaults.items():
        if name not in given:
            shown = f"{value:g}" if isinstance(value, float | int) else value
            parts.append(f"{name.replace('_', '-')} {shown}")
    return f"defaults of the model: {', '.join(parts)}" if parts else ""
