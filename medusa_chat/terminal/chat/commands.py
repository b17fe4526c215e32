"""The slash-commands. Each handler returns what to print; its docstring is the help."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Group
from rich.text import Text

from medusa_chat.config import MODES, Sampling
from medusa_chat.files import expanded
from medusa_chat.terminal import tree_view
from medusa_chat.terminal.chat.command import (
    REGISTRY,
    Chat,
    Result,
    Stream,
    Values,
    command,
    find,
)
from medusa_chat.terminal.chat.conversation import read_conversation
from medusa_chat.terminal.chat.errors import UsageError
from medusa_chat.terminal.reports import tables
from medusa_chat.terminal.theme import LABEL
from medusa_chat.terminal.wrapping import escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from medusa_chat.terminal.chat.session import Session

GREEDY_REPEATS = "greedy decoding repeats itself: /typical or /exact draws another reply"
KEYS = (
    "Enter sends · Alt+Enter or Ctrl+J adds a line · Ctrl+R searches · "
    "Ctrl+X Ctrl+E opens an editor · Ctrl+C stops a reply"
)


def dispatch(chat: Chat, line: str) -> Result:
    """Run the command in a line. Raises UserError for a wrong one, EOFError for `/exit`."""
    argument = line.partition(" ")[2].strip()
    return find(line).run(chat, argument)


def _one_of(*values: str) -> Values:
    return lambda _session, words: () if words else values


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


@command("help")
def _help(chat: Chat) -> Result:
    """List the commands."""
    rows = [(entry.invocation, entry.help) for entry in REGISTRY.values()]
    return Group(tables.help_table(rows), Text(), Text(KEYS, LABEL), Text(), chat.legend())


@command("mode", "[MODE]", values=_one_of(*MODES))
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
    name, _, value = argument.partition(" ")
    kinds = get_type_hints(Sampling)
    if not value and name in kinds and name != "stop":  # /set stop removes the stop strings
        current = tables.shown(getattr(chat.session.sampling, name))
        values = "|".join(_choices(kinds[name])) or "NUMBER"
        return Text(f"{name} is {current}; change it with /set {name} {values}", LABEL)
    chat.session.sampling = chat.session.sampling.with_value(name, value.strip())
    return Text(f"{name} {tables.shown(getattr(chat.session.sampling, name))}", LABEL)


@command("system", "[TEXT]")
def _system(chat: Chat, argument: str) -> Result:
    """Show or set the system prompt; "" removes it."""
    if argument:
        chat.session.system = "" if argument in ('""', "''") else argument
    shown = chat.session.system or "none"
    return Text.assemble(("system prompt: ", LABEL), escape_controls(shown))


@command("reset")
def _reset(chat: Chat) -> Result:
    """Start a new conversation; keep settings and system prompt."""
    chat.session.reset()
    return Text("new conversation", LABEL)


@command("undo")
def _undo(chat: Chat) -> Result:
    """Take back the last message and its reply."""
    first, *more = chat.session.undo().strip().splitlines() or [""]
    return Text.assemble(("took back: ", LABEL), escape_controls(first), " …" if more else "")


@command("regen")
def _regen(chat: Chat) -> Result:
    """Answer the last message again, with the next seed."""
    steps = chat.session.regen()
    sampling = chat.session.sampling
    return Stream(steps, GREEDY_REPEATS if sampling.greedy else f"seed {sampling.seed}")


@command("stats")
def _stats(chat: Chat) -> Result:
    """Show the figures of the last reply and of the conversation."""
    session = chat.session
    return tables.stats_table(session.last, session.conversation, session.engine)


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


@command("copies", "[on|off]", values=_one_of("on", "off"))
def _copies(chat: Chat, argument: str) -> Result:
    """Also guess by copying earlier text: on or off."""
    trees = chat.session.engine.trees
    trees.use_copies(_switch(argument, trees.copies))
    return chat.legend() if trees.copies else Text("copies off", LABEL)


@command("heads")
def _heads(chat: Chat) -> Result:
    """Show how many guesses of each head were accepted in this conversation."""
    stats = chat.session.conversation
    if not stats.reached:
        return Group(chat.legend(), Text("no guess was tested yet", LABEL))
    return tables.heads_table(stats)


@command("marks", "[on|off]", values=_one_of("on", "off"))
def _marks(chat: Chat, argument: str) -> Result:
    """Mark each guessed token with its head's number, for screens without colour: on or off."""
    chat.marks = _switch(argument, chat.marks)
    return chat.legend() if chat.marks else Text("marks off", LABEL)


def _switch(argument: str, current: bool) -> bool:
    """Read on or off; without an argument flip the switch."""
    if argument not in ("", "on", "off"):
        raise UsageError
    return argument == "on" if argument else not current


@command("save", "FILE", takes_path=True)
def _save(chat: Chat, argument: str) -> Result:
    """Save the conversation to a file."""
    path = _path(argument)
    chat.session.save(path)
    return Text(f"saved {len(chat.session.messages)} messages to {path}", LABEL)


@command("load", "FILE", takes_path=True)
def _load(chat: Chat, argument: str) -> Result:
    """Continue a saved conversation."""
    conversation = read_conversation(_path(argument))
    chat.session.load(conversation)
    text = f"loaded {len(conversation.messages)} messages"
    name = chat.session.engine.name
    if conversation.model != name:
        text += f"; they were saved with {conversation.model}, you now chat with {name}"
    return Text(text, LABEL)


def _path(argument: str) -> Path:
    if not argument:
        raise UsageError
    return expanded(argument)


@command("exit")
def _exit(_chat: Chat) -> Result:
    """Leave (also /quit and Ctrl+D)."""
    raise EOFError  # as Ctrl+D does
