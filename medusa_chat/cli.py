"""The `medusa-chat` command. The one module that knows both the engine and the terminal; heavy imports are inside."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from contextlib import closing, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from medusa_chat.commands.flags import COMMANDS, parser, recipe_of, sampling_of
from medusa_chat.config import Message, Sampling, UserError, out_of_memory
from medusa_chat.files import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from medusa_chat.decoding.engine import Engine

NEEDS_LESS = "a smaller model, --quant nf4, --quant-heads nf4 or a shorter --max-context needs less"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; a user's mistake is one line on standard error and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0] not in COMMANDS and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "chat")
    try:
        options = parser().parse_args(words)
        options.words = shlex.join(["medusa-chat", *words])
        status = _RUN[options.command](options)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # The reader has what it wanted. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError, OSError) as error:
        if out_of_memory(error):
            return _fail(f"out of memory; {NEEDS_LESS}")
        if not isinstance(error, OSError):
            raise
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")


def _fail(message: str) -> int:
    print(f"medusa-chat: error: {message}", file=sys.stderr)
    return 2


def _load(
    options: argparse.Namespace,
    probing: bool = True,
    measured: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Engine:
    """The engine that the flags ask for. A download is told to `progress`, else shown on standard error."""
    import medusa_chat
    from medusa_chat.terminal.downloads import downloads

    with nullcontext(progress) if progress else downloads() as shown:
        return medusa_chat.load(
            options.model,
            options.heads,
            device=options.device,
            quant=options.quant,
            quant_heads=options.quant_heads,
            dtype=options.dtype,
            tree=options.tree,
            template=options.template,
            context=options.max_context,
            models=options.models,
            ignore_memory=options.ignore_memory,
            probing=probing,
            measured=measured,
            copies=options.copies,
            progress=shown,
            eager=options.eager or None,
        )


def _chat(options: argparse.Namespace) -> int:
    sampling = sampling_of(options)
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is not None:
        return _answer_once(options, sampling, prompt)
    if options.json:
        raise UserError("--json needs --prompt TEXT, or text piped to standard input")
    from platformdirs import user_state_path

    from medusa_chat.hub.model_list import resolve_model
    from medusa_chat.terminal.chat.repl import chat

    name = resolve_model(options.model, options.heads, models=options.models).name
    history = user_state_path("medusa-chat") / "history"
    return chat(
        lambda progress: _load(options, progress=progress),
        model=name,
        sampling=sampling,
        system=options.system,
        marks=options.marks,
        history=history,
        transcript=options.transcript,
    )


def _answer_once(options: argparse.Namespace, sampling: Sampling, prompt: str) -> int:
    """Answer one prompt on standard output: its text, or with --json a line per step and a summary."""
    from medusa_chat.stats import Stats
    from medusa_chat.terminal.wrapping import sanitize

    if not prompt:
        raise UserError("the prompt is empty")
    engine = _load(options)
    system = engine.system if options.system is None else options.system
    messages: list[Message] = (
        [{"role": "system", "content": system}] if system or engine.system else []
    )
    messages.append({"role": "user", "content": prompt})
    stats, ids, text = Stats(), [], ""
    with closing(engine.generate(messages, sampling)) as steps:
        for step in steps:
            stats.add(step)
            ids += [token.id for token in step.tokens]
            text += step.text
            line = json.dumps(step.as_json()) + "\n" if options.json else sanitize(step.text)
            print(line, end="", flush=True)
    if options.json:
        print(
            json.dumps(
                {
                    "type": "summary",
                    "text": text,
                    "ids": ids,
                    "mode": sampling.mode,
                    **stats.as_json(),
                }
            )
        )
    else:
        print()
    for notice in engine.notices:
        print(f"medusa-chat: {notice}", file=sys.stderr)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from medusa_chat.bench.command import measure
    from medusa_chat.terminal.reports import bench as bench_report
    from medusa_chat.terminal.reports import bench_charts
    from medusa_chat.terminal.reports.bench_view import timed_view
    from medusa_chat.terminal.reports.progress import progress_bar

    sampling = sampling_of(options)
    bench_report.check_file(options.json)
    bench_charts.check_folder(options.plot)
    view = timed_view(sampling) if options.view else None

    def load(**changed: object) -> Engine:
        return _load(argparse.Namespace(**{**vars(options), **changed}), probing=False)

    try:
        result = measure(options, sampling, load, progress_bar, view)
    except KeyboardInterrupt:
        print(
            "medusa-chat: bench was interrupted: nothing is told of a part of the measurements",
            file=sys.stderr,
        )
        return 130
    bench_report.show_bench(result)
    if options.plot:
        for file in bench_charts.plot_bench(result, options.plot):
            print(f"wrote {file}")
    if options.json:
        write_text(options.json, json.dumps(result) + "\n")
        print(f"wrote {options.json}")
    print(json.dumps(result))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from medusa_chat.bench.verification import verify
    from medusa_chat.prompts import read_prompts
    from medusa_chat.terminal.reports.checks import show_checks
    from medusa_chat.terminal.reports.progress import progress_bar

    sampling = sampling_of(options)
    prompts = read_prompts(options.prompts, options.limit)
    engine = _load(options, probing=False)
    with progress_bar("verifying") as progress:
        checks = verify(engine, prompts, sampling, turns=options.turns, progress=progress)
    show_checks([vars(check) for check in checks])
    return 1 if any(check.faults for check in checks) else 0


def _train(options: argparse.Namespace) -> int:
    from medusa_chat.hub.model_list import resolve_model
    from medusa_chat.terminal.reports.training import training

    recipe = recipe_of(options)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # it tells on import what it could have besides
    try:
        from medusa_chat.training.trainer import Run, train
    except ModuleNotFoundError as error:
        raise UserError(f"training needs {error.name}: pip install 'medusa-chat[train]'") from None
    run = Run(
        options.model,
        tuple(options.data),
        options.out,
        recipe,
        options.heads_from,
        tuple(options.held_out),
        options.resume,
        options.models,
        options.ignore_memory,
        options.template,
    )
    with training() as (progress, say):
        wrote = train(run, progress, say)
    if not wrote:
        return 0
    made = (
        f"--model {options.out}"
        if recipe.joint
        else f"--model {options.model} --heads {options.out}"
    )
    if template := resolve_model(
        options.model, models=options.models, template=options.template
    ).template:
        made += f" --template {template}"
    print(
        f"wrote {options.out}; next: medusa-chat calibrate {made} --data FILE, then medusa-chat {made}"
    )
    return 0


def _distill(options: argparse.Namespace) -> int:
    from medusa_chat.terminal.reports.progress import progress_bar
    from medusa_chat.training.distillation import distill
    from medusa_chat.training.questions import DistillJob

    job = DistillJob(
        turns=options.turns,
        batch=options.batch,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        system=options.system,
        template=options.template,
    )
    with progress_bar("answering") as progress:
        kept, total = distill(
            options.model,
            options.prompts,
            options.out,
            job,
            limit=options.limit,
            server=options.server,
            server_model=options.server_model,
            device=options.device,
            models=options.models,
            ignore_memory=options.ignore_memory,
            progress=progress,
        )
    unanswered = (
        f"; {total - kept} of {total} prompts got no answer that fits the context"
        if kept < total
        else ""
    )
    print(f"wrote {options.out}: {kept} conversations{unanswered}")
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from medusa_chat.decoding.trees.accuracy import write_accuracy
    from medusa_chat.decoding.trees.growth import grow
    from medusa_chat.hub.fetch import accuracy_file
    from medusa_chat.hub.model_list import resolve_model
    from medusa_chat.prompts import read_prompts
    from medusa_chat.terminal.reports import charts
    from medusa_chat.terminal.reports.accuracy import show_accuracy
    from medusa_chat.terminal.reports.progress import progress_bar
    from medusa_chat.training.calibration import SIZES, calibrate, check_forecast, held_aside

    if options.plot:
        charts.check_plot(options.plot)
    prompts = read_prompts(options.prompts, options.limit)
    spec = resolve_model(options.model, options.heads, models=options.models)
    options.tree = (
        "chain-1" if options.tree in ("auto", "retune") else options.tree
    )  # nothing is timed here
    engine = _load(
        options, probing=False, measured=False
    )  # an old file of figures may be damaged: it goes
    counted, aside = (prompts, []) if options.no_check else held_aside(prompts)
    with progress_bar("calibrating") as progress:
        accuracy = calibrate(engine, counted, options.max_new_tokens, progress)
    source = f"{len(counted)} conversations of {', '.join(path.name for path in options.prompts)}"
    file = accuracy_file(spec)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_accuracy(accuracy, file, source)
    with progress_bar("checking") as progress:
        found = check_forecast(engine, accuracy, aside, options.max_new_tokens, progress)
    checks = [vars(check) for check in found]
    show_accuracy(accuracy.top, checks)
    print(f"wrote {file}")
    if not checks and not options.no_check:
        print(
            "the forecast was not checked: that takes 5 prompts or more, and heads that fill a tree of 8 nodes"
        )
    if options.plot:
        charts.plot(
            options.plot,
            accuracy.top,
            grow(accuracy, max(SIZES))[1],
            checks,
            f"{engine.name}, {source}",
        )
        print(f"wrote {options.plot}")
    return 0


def _export(options: argparse.Namespace) -> int:
    from medusa_chat.export.writing import Export, export
    from medusa_chat.hub.model_list import resolve_model

    if options.private and not options.push:
        raise UserError("--private is for --push")
    job = Export(
        options.layout, options.out, options.dtype, options.push, options.private, options.overwrite
    )
    for notice in export(resolve_model(options.model, options.heads, models=options.models), job):
        print(f"medusa-chat: {notice}", file=sys.stderr)
    print(f"wrote {options.out}" + (f" and uploaded it to {options.push}" if options.push else ""))
    return 0


def _models(options: argparse.Namespace) -> int:
    from medusa_chat.commands.models import catalogue
    from medusa_chat.terminal.reports.models import show_models

    listed = [asdict(each) for each in catalogue(options.models)]
    if options.json:
        print(json.dumps(listed, indent=2))
    else:
        show_models(listed)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from medusa_chat.commands.doctor import examine
    from medusa_chat.terminal.reports.findings import show_findings

    findings = [asdict(finding) for finding in examine()]
    if options.json:
        print(json.dumps(findings, indent=2))
    else:
        show_findings(findings)
    return 1 if any(finding["fault"] for finding in findings) else 0


_RUN: dict[str, Callable[[argparse.Namespace], int]] = {
    "chat": _chat,
    "bench": _bench,
    "verify": _verify,
    "train": _train,
    "distill": _distill,
    "calibrate": _calibrate,
    "export": _export,
    "models": _models,
    "doctor": _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
