"""Slash-commands that choose how replies are decoded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Group
from rich.text import Text

from medusa_chat.sampling import MODES, Sampling
from medusa_chat.terminal import tree_view
from medusa_chat.terminal.chat.command import Chat, Result, Switch, in_group, one_of, switch
from medusa_chat.terminal.chat.errors import UsageError
from medusa_chat.terminal.reports import tables
from medusa_chat.terminal.theme import LABEL

if TYPE_CHECKING:
    from collections.abc import Iterable

    from medusa_chat.terminal.chat.session import Session

command = in_group("Decode")


def _model_names(session: Session | None, words: list[str]) -> Iterable[str]:
    names = session.names.get("model") if session and not words else None
    return names() if names else ()


def _setting_values(_session: Session | None, words: list[str]) -> Iterable[str]:
    kinds = get_type_hints(Sampling)
    if not words:
        return kinds
    return _choices(kinds.get(words[0])) if len(words) == 1 else ()


def _choices(kind: Any) -> tuple[str, ...]:
    """List the values of a setting that has only a few."""
    if kind is bool:
        return ("on", "off")
    return get_args(kind) if get_origin(kind) is Literal else ()


def _tree_values(session: Session | None, words: list[str]) -> Iterable[str]:
    return session.engine.trees.names() if session and not words else ()


@command("mode", "[MODE]", values=one_of(*MODES))
def _mode(chat: Chat, argument: str) -> Result:
    """Show or choose the decoding mode: greedy, typical, exact or vanilla."""
    if argument:
        return _with(chat, mode=argument)
    return _decoding(chat)


@command("greedy")
def _greedy(chat: Chat) -> Result:
    """Always take the likeliest token: the text of plain greedy decoding, faster."""
    return _with(chat, mode="greedy")


@command("typical", "[EPSILON DELTA]")
def _typical(chat: Chat, argument: str) -> Result:
    """Accept guesses that are typical enough: the fastest sampling, but not exact."""
    if not argument:
        return _with(chat, mode="typical")
    words = argument.split()
    if len(words) != 2:
        raise UsageError
    thresholds = chat.session.sampling.with_value("epsilon", words[0]).with_value("delta", words[1])
    return _with(chat, mode="typical", epsilon=thresholds.epsilon, delta=thresholds.delta)


@command("exact")
def _exact(chat: Chat) -> Result:
    """Sample from the model's exact distribution, faster."""
    return _with(chat, mode="exact")


@command("raw", "[on|off]", values=one_of("on", "off"))
def _raw(chat: Chat, argument: str) -> Result:
    """Complete plain text, without the chat template: on or off."""
    engine = chat.session.engine
    engine.raw = switch(argument, engine.raw)
    kind = "raw off: messages go through the chat template"
    if engine.raw:
        kind = "raw on: the model goes on with your text as it is"
    return Text(kind, LABEL)


@command("vanilla")
def _vanilla(chat: Chat) -> Result:
    """Decode one token per step without the heads: the baseline."""
    return _with(chat, mode="vanilla")


def _with(chat: Chat, **settings: Any) -> Text:
    chat.session.sampling = replace(chat.session.sampling, **settings)
    return _decoding(chat)


def _decoding(chat: Chat) -> Text:
    """Say in one line how the next reply is decoded."""
    sampling = chat.session.sampling
    parts: list[str] = [sampling.mode]
    if not sampling.greedy:
        parts.append(f"temperature {sampling.temperature:g}")
    if sampling.mode == "typical":
        parts += [f"epsilon {sampling.epsilon:g}", f"delta {sampling.delta:g}"]
        if not sampling.temperature:
            parts.append("temperature 0 is greedy")
    return Text(" · ".join(parts), LABEL)


@command("set", "[NAME VALUE]", values=_setting_values)
def _set(chat: Chat, argument: str) -> Result:
    """Show the settings, or change one."""
    if not argument:
        return tables.settings_table(chat.session.sampling)
    name, _, value = argument.replace("\t", " ").partition(" ")
    name = name.replace("-", "_")
    kinds = get_type_hints(Sampling)
    if not value and name in kinds and name != "stop":  # /set stop removes the stop strings
        current = tables.shown(getattr(chat.session.sampling, name))
        values = "|".join(_choices(kinds[name])) or "NUMBER"
        return Text(f"{name} is {current}; change it with /set {name} {values}", LABEL)
    chat.session.sampling = chat.session.sampling.with_value(name, value.strip())
    changed = f"{name} {tables.shown(getattr(chat.session.sampling, name))}"
    return Text(" · ".join(filter(None, [changed, _once_unused(chat, name)])), LABEL)


def _once_unused(chat: Chat, name: str) -> str:
    """Say that the mode does not use a setting, unless that was said; maybe empty."""
    remark = chat.session.sampling.unused([name])
    if name in chat.explained:
        return ""
    chat.explained |= {name} if remark else set()
    return remark


@command("think", "[on|off]", values=one_of("on", "off"))
def _think(chat: Chat, argument: str) -> Result:
    """Let a model that can think do so before it answers, or not: on or off."""
    engine = chat.session.engine
    if argument:
        engine.think(switch(argument, current=True))
    states = {None: "as the model's template has it", True: "on", False: "off"}
    return Text(f"thinking: {states[engine.template.thinking]}", LABEL)


@command("tree", "[auto|retune|dynamic-N|NAME|FILE]", values=_tree_values, takes_path=True)
def _tree(chat: Chat, argument: str) -> Result:
    """Draw the last step's candidate tree, or choose another tree; retune times steps again."""
    engine = chat.session.engine
    if argument:
        engine.trees.use(argument)
        return Text(engine.trees.describe(), LABEL)
    candidates = engine.candidates()
    if candidates is None:
        return Text(f"{engine.trees.describe()}; no step has used it yet", LABEL)
    return Group(Text(engine.trees.describe(), LABEL), tree_view.draw(candidates))


@command("model", "[NAME]", values=_model_names, takes_path=True)
def _model(chat: Chat, argument: str) -> Result:
    """Show the model, or change it: a name, a folder or a hub id. The conversation goes along."""
    if argument:
        return Switch(argument)
    names = ", ".join(_model_names(chat.session, []))
    known = f"; /model NAME changes it: {names}" if names else ""
    return Text(f"model: {chat.session.engine.name}{known}", LABEL)


@command("copies", "[on|off]", values=one_of("on", "off"))
def _copies(chat: Chat, argument: str) -> Result:
    """Also guess by copying earlier text: on or off."""
    trees = chat.session.engine.trees
    trees.use_copies(switch(argument, trees.copies))
    return chat.legend() if trees.copies else Text("copies off", LABEL)
