"""`medusa-chat distill`: a model answers prompts, so that its heads learn from its own words."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from medusa_chat.config import UserError
from medusa_chat.hub.model_list import resolve_model
from medusa_chat.locks import only_writer
from medusa_chat.prompts import read_prompts
from medusa_chat.training.conversations import Conversation, resume
from medusa_chat.training.invention import Inventor, wanted_of
from medusa_chat.training.questions import Answerer, DistillJob, Question
from medusa_chat.training.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def distill(
    model: str | None,
    prompts: list[Path],
    out: Path,
    job: DistillJob,
    *,
    limit: int | None = None,
    server: str | None = None,
    server_model: str | None = None,
    device: str = "auto",
    models: Path | None = None,
    ignore_memory: bool = False,
    progress: Callable[[int, int], None],
) -> tuple[int, int]:
    """Write conversations with the prompts' user turns and a model's answers, one on each line.

    A run that was cut off goes on after the last whole batch in `out`, with the same result. A
    last answer with `"cut": true` was stopped by `max_new_tokens`. With `server`, the address of
    an OpenAI-compatible server, no model is loaded; `server_model` is its name there. With
    `self:N` as prompts the model invents the user turns of N conversations itself.

    Returns:
        The number of conversations in `out`, and of prompts. A prompt whose first turn got no
        answer has no conversation.

    Raises:
        UserError: something cannot be read or loaded, `out` is of another run, or the server
            fails.
    """
    if server_model and not server:
        raise UserError("--server-model NAME needs --server URL")
    conversations = _begin(prompts, limit, job.system)
    invented = conversations[0].invented
    settings = _settings(job, remote=server is not None)
    if invented:
        settings["prompts"] = "self"
    if server is not None:
        if invented:
            raise UserError("--prompts self:N needs the model here: leave --server out")
        with closing(Server(server, server_model, job)) as remote:
            return _run(remote, conversations, out, job, settings, progress)
    from medusa_chat.training.local_model import LocalModel  # imports torch

    spec = resolve_model(model, models=models, template=job.template)
    local = LocalModel(spec, job, device, ignore_memory)
    inventor = Inventor(local) if invented else None
    return _run(local, conversations, out, job, settings, progress, inventor)


def _begin(prompts: list[Path], limit: int | None, system: str) -> list[Conversation]:
    """Make the conversations, with the turns of files or without any."""
    if wanted := wanted_of(prompts):
        return [Conversation.empty(i, system) for i in range(min(wanted, limit or wanted))]
    read = enumerate(read_prompts(prompts, limit))
    return [Conversation.begin(i, prompt, system) for i, prompt in read]


def _settings(job: DistillJob, *, remote: bool) -> dict[str, Any]:
    """List the settings that an answer depends on besides its messages."""
    settings = asdict(job)
    del settings["system"]
    if remote:
        del settings["template"]  # the server has its own
        del settings["batch"]  # each answer has its own seed
    elif not job.template:
        del settings["template"]
    return settings


def _run(
    answerer: Answerer,
    conversations: list[Conversation],
    out: Path,
    job: DistillJob,
    settings: dict[str, Any],
    progress: Callable[[int, int], None],
    inventor: Inventor | None = None,
) -> tuple[int, int]:
    settings = {"model": answerer.name, **settings}
    with only_writer(out, "another run"):
        return _go_on(answerer, conversations, out, job, settings, progress, inventor)


def _go_on(
    answerer: Answerer,
    conversations: list[Conversation],
    out: Path,
    job: DistillJob,
    settings: dict[str, Any],
    progress: Callable[[int, int], None],
    inventor: Inventor | None,
) -> tuple[int, int]:
    total = len(conversations)
    done, kept = resume(out, conversations, job.batch, settings)
    if inventor:
        inventor.remember(conversations[:done])
    progress(done, total)
    with out.open("ab") as file:
        for start in range(done, total, job.batch):
            group = conversations[start : start + job.batch]
            _converse(answerer, group, job.turns, inventor)
            lines = [line for each in group if (line := each.line(settings))]
            file.write(b"".join(lines))
            file.flush()
            kept += len(lines)
            progress(start + len(group), total)
    if not kept and inventor:
        raise UserError(
            f"the model invented nothing that a user would write in {total} conversations: it may"
            " not be trained to chat; name files of prompts"
        )
    if not kept:
        raise UserError(
            f"none of the {total} prompts got an answer: no reply fits the context, or all replies"
            " are empty or withheld; try a smaller --max-new-tokens"
        )
    return kept, total


def _converse(
    answerer: Answerer,
    conversations: list[Conversation],
    turns: int,
    inventor: Inventor | None,
) -> None:
    """Answer the first `turns` user turns of each conversation, all conversations at once."""
    for turn in range(turns):
        if inventor:
            inventor.add_turns(conversations, turn)
        asked = [each for each in conversations if not each.ended and turn < len(each.turns)]
        if not asked:
            return
        for each in asked:
            each.messages.append({"role": "user", "content": each.turns[turn]})
        questions = [Question(each.index, turn, each.messages) for each in asked]
        for each, answer in zip(asked, answerer.answer(questions), strict=True):
            each.add(answer)
