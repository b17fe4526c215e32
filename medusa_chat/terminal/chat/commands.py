"""The slash-commands: dispatch, and the handlers, which return what to print."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from rich.console import Group
from rich.text import Text

from medusa_chat.config import MODES, Sampling, UserError
from medusa_chat.terminal import tree_view
from medusa_chat.terminal.chat.command import (
    ALIASES,
    REGISTRY,
    Chat,
    Command,
    Leave,
    Reply,
    Result,
    Values,
    WrongArguments,
    command,
)
from medusa_chat.terminal.chat.session import Session, read_conversation
from medusa_chat.terminal.reports import tables
from medusa_chat.terminal.theme import LABEL

if TYPE_CHECKING:
    from collections.abc import Iterable

GREEDY_REPEATS = "greedy decoding repeats itself: /typical or /exact draws another reply"
KEYS = (
    "Enter sends · Alt+Enter or Ctrl+J adds a line · Ctrl+R searches · Ctrl+X Ctrl+E opens an editor · "
    "Ctrl+C stops a reply"
)


def is_command(line: str) -> bool:
    """Whether a line of input is a command; a message may begin with a slash by doubling it."""
    return line.startswith("/") and not line.startswith("//")


def find(line: str) -> Command:
    """The command that a line names; an unknown one is a UserError with the closest match."""
    name = line[1:].split(None, 1)[0] if line[1:].strip() else ""
    found = REGISTRY.get(ALIASES.get(name, name))
    if found is None:
        close = difflib.get_close_matches(name, [*REGISTRY, *ALIASES], n=1)
        hint = (
            f"did you mean /{close[0]}?"
            if close
            else "/help lists all; // sends a message that begins with /"
        )
        raise UserError(f"unknown command /{name}: {hint}")
    return found


def dispatch(chat: Chat, line: str) -> Result:
    """Run the command in `line`. Raises UserError for a wrong one, Leave for the one that ends the chat."""
    found = find(line)
    _, _, argument = line.partition(" ")
    argument = argument.strip()
    if argument and not found.usage:
        raise UserError(f"{found.invocation} takes no argument")
    try:
        return found.handler(chat, argument)
    except WrongArguments:
        raise UserError(f"usage: {found.invocation}") from None


def _with(chat: Chat, **settings: Any) -> Text:
    chat.session.sampling = replace(chat.session.sampling, **settings)
    return _settled(chat)


def _settled(chat: Chat) -> Text:
    """One line on how the next reply is decoded."""
    sampling = chat.session.sampling
    parts = [sampling.mode] + ([] if sampling.greedy else [f"temperature {sampling.temperature:g}"])
    if sampling.mode == "typical":
        parts += [f"epsilon {sampling.epsilon:g}", f"delta {sampling.delta:g}"]
        parts += [] if sampling.temperature else ["temperature 0: this is greedy"]
    return Text(" · ".join(parts), LABEL)


def _setting_values(session: Session | None, words: list[str]) -> Iterable[str]:
    kinds = get_type_hints(Sampling)
    if not words:
        return kinds
    kind = kinds.get(words[0]) if len(words) == 1 else None
    if get_origin(kind) is Literal:
        return get_args(kind)
    return ("on", "off") if kind is bool else ()


def _one_of(*values: str) -> Values:
    return lambda session, words: () if words else values


def _tree_values(session: Session | None, words: list[str]) -> Iterable[str]:
    return session.engine.trees.names() if session and not words else ()


@command("help")
def _help(chat: Chat, argument: str) -> Result:
    """List the commands."""
    rows = [(entry.invocation, entry.help) for entry in REGISTRY.values()]
    return Group(tables.help_table(rows), Text(), Text(KEYS, LABEL), Text(), chat.legend())


@command("mode", "[MODE]", values=_one_of(*MODES))
def _mode(chat: Chat, argument: str) -> Result:
    """Show or choose the decoding mode: greedy, typical, exact or vanilla."""
    if not argument:
        return _settled(chat)
    return _with(chat, mode=argument)


@command("greedy")
def _greedy(chat: Chat, argument: str) -> Result:
    """Take the likeliest token, always: the text of plain greedy decoding, sooner."""
    return _with(chat, mode="greedy")


@command("typical", "[EPSILON DELTA]")
def _typical(chat: Chat, argument: str) -> Result:
    """Accept guesses that are typical enough: fastest sampling, not the exact distribution."""
    if not argument:
        return _with(chat, mode="typical")
    words = argument.split()
    if len(words) != 2:
        raise WrongArguments
    thresholds = chat.session.sampling.with_value("epsilon", words[0]).with_value("delta", words[1])
    return _with(chat, mode="typical", epsilon=thresholds.epsilon, delta=thresholds.delta)


@command("exact")
def _exact(chat: Chat, argument: str) -> Result:
    """Sample from the model's exact distribution, sooner."""
    return _with(chat, mode="exact")


@command("vanilla")
def _vanilla(chat: Chat, argument: str) -> Result:
    """Decode without the heads, one token a step: the baseline."""
    return _with(chat, mode="vanilla")


@command("set", "[NAME VALUE]", values=_setting_values)
def _set(chat: Chat, argument: str) -> Result:
    """Show the settings, or change one."""
    if not argument:
        return tables.settings_table(chat.session.sampling)
    name, _, value = argument.partition(" ")
    if not value and name in get_type_hints(Sampling) and name != "stop":
        raise WrongArguments
    chat.session.sampling = chat.session.sampling.with_value(name, value.strip())
    return Text(f"{name} {tables.shown(getattr(chat.session.sampling, name))}", LABEL)


@command("system", "[TEXT]")
def _system(chat: Chat, argument: str) -> Result:
    """Show the system prompt, or set it; "" is none."""
    if argument:
        chat.session.system = "" if argument in ('""', "''") else argument
    shown = chat.session.system or "none"
    return Text.assemble(("system prompt: ", LABEL), tree_view.printable(shown))


@command("reset")
def _reset(chat: Chat, argument: str) -> Result:
    """Start a new conversation; settings and system prompt stay."""
    chat.session.reset()
    return Text("a new conversation", LABEL)


@command("undo")
def _undo(chat: Chat, argument: str) -> Result:
    """Take back the last message and its reply."""
    first, *more = chat.session.undo().strip().splitlines() or [""]
    return Text.assemble(("took back: ", LABEL), tree_view.printable(first), " …" if more else "")


@command("regen")
def _regen(chat: Chat, argument: str) -> Result:
    """Answer the last message again, with the next seed."""
    steps = chat.session.regen()
    return Reply(
        steps,
        note=GREEDY_REPEATS
        if chat.session.sampling.greedy
        else f"seed {chat.session.sampling.seed}",
    )


@command("stats")
def _stats(chat: Chat, argument: str) -> Result:
    """Show what was measured: this reply and the conversation."""
    session = chat.session
    return tables.stats_table(session.last, session.conversation, session.engine)


@command("tree", "[auto|retune|dynamic-N|NAME|FILE]", values=_tree_values, takes_path=True)
def _tree(chat: Chat, argument: str) -> Result:
    """Draw the candidate tree of the last step, or choose another tree; retune times steps anew."""
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
    """Copy guesses from the conversation too, or leave it."""
    if argument not in ("", "on", "off"):
        raise WrongArguments
    trees = chat.session.engine.trees
    trees.use_copies(argument == "on" if argument else not trees.copies)
    return chat.legend() if trees.copies else Text("copies off", LABEL)


@command("heads")
def _heads(chat: Chat, argument: str) -> Result:
    """Show how many guesses of each head were accepted in this conversation."""
    stats = chat.session.conversation
    if not stats.reached:
        return Group(chat.legend(), Text("no guess has been put to the test yet", LABEL))
    return tables.heads_table(stats)


@command("marks", "[on|off]", values=_one_of("on", "off"))
def _marks(chat: Chat, argument: str) -> Result:
    """Put a small digit behind each token of a head, for screens without colour."""
    if argument not in ("", "on", "off"):
        raise WrongArguments
    chat.marks = argument == "on" if argument else not chat.marks
    return chat.legend() if chat.marks else Text("marks off", LABEL)


@command("save", "FILE", takes_path=True)
def _save(chat: Chat, argument: str) -> Result:
    """Write the conversation to a file."""
    path = _path(argument)
    chat.session.save(path)
    return Text(f"saved {len(chat.session.messages)} messages to {path}", LABEL)


@command("load", "FILE", takes_path=True)
def _load(chat: Chat, argument: str) -> Result:
    """Go on with a saved conversation."""
    conversation = read_conversation(_path(argument))
    chat.session.load(conversation)
    name = chat.session.engine.name
    other = (
        ""
        if conversation.model == name
        else f"; it was held with {conversation.model}, this is {name}"
    )
    return Text(f"loaded {len(conversation.messages)} messages{other}", LABEL)


def _path(argument: str) -> Path:
    if not argument:
        raise WrongArguments
    return Path(argument).expanduser()


@command("exit")
def _exit(chat: Chat, argument: str) -> Result:
    """Leave (also /quit and Ctrl+D)."""
    raise Leave
