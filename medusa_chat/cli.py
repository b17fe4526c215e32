"""The `medusa-chat` command. The one module that knows both the engine and the terminal; heavy imports are inside."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from medusa_chat import __version__
from medusa_chat.config import SAMPLING_HELP, Message, Recipe, Sampling, UserError, parse_value, read_registry

if TYPE_CHECKING:
    from medusa_chat.decoding.engine import Engine

COMMANDS = ("chat", "bench", "verify", "train", "distill", "calibrate", "models")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a sub-command; a user's mistake is one line on standard error and exit status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0] not in COMMANDS and words[0] not in ("-h", "--help", "--version")):
        words.insert(0, "chat")
    try:
        options = _parser().parse_args(words)
        status: int = options.run(options)
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
    except MemoryError:
        return _fail("out of memory; a smaller model or a shorter --max-context needs less")
    except OSError as error:
        return _fail(f"{error.filename or 'input/output'}: {error.strerror or error}")


def _fail(message: str) -> int:
    print(f"medusa-chat: error: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """argparse's complaints as the one line that every mistake gets."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="medusa-chat", description="Chat with a local model that decodes several tokens per step.")
    parser.add_argument("--version", action="version", version=f"medusa-chat {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    chat = _command(commands, "chat", _chat, "chat in the terminal, or answer --prompt or piped text once (default)")
    _model_flags(chat)
    _sampling_flags(chat)
    chat.add_argument("--prompt", help="answer this once and exit; text piped to standard input does the same")
    chat.add_argument("--json", action="store_true", help="with --prompt: one JSON object a line, a step each")
    chat.add_argument("--system", help="system prompt")
    chat.add_argument("--transcript", type=Path, help="keep the conversation in this file and go on where it ended")
    chat.add_argument("--marks", action="store_true", help="mark the heads' tokens without colour too")

    bench = _command(commands, "bench", _bench, "measure acceptance length and speedup on this machine")
    _model_flags(bench)
    _sampling_flags(bench, max_new_tokens=128)
    _prompt_flags(bench, 50)
    bench.add_argument("--modes", default="greedy,typical", help="modes to measure, with commas between")
    bench.add_argument("--rounds", type=_count, default=3, help="times that everything is measured; medians are told")
    bench.add_argument("--peer", choices=["transformers"], help="measure transformers' generate() too")
    bench.add_argument("--view", action="store_true", help="measure what the live view costs too")

    verify = _command(commands, "verify", _verify, "check that greedy equals vanilla and exact equals sampling")
    _model_flags(verify)
    _sampling_flags(verify, max_new_tokens=64)
    _prompt_flags(verify, 20)
    verify.add_argument("--turns", type=_count, default=1, help="replies to check in each conversation")

    train = _command(commands, "train", _train, "train Medusa heads for a model")
    train.add_argument("--model", required=True, help="name, folder or hub id of the backbone")
    train.add_argument("--data", type=Path, nargs="+", required=True, help="JSONL of messages, or ShareGPT")
    train.add_argument("--out", type=Path, required=True, help="folder for the heads and the checkpoints")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    for name, kind in get_type_hints(Recipe).items():
        default = getattr(Recipe(), name)
        flag = "--recipe" if name == "name" else _flag(name)
        train.add_argument(flag, dest=f"recipe_{name}", type=kind, default=default, help=f"(default: {default})")

    distill = _command(commands, "distill", _distill, "let the model answer prompts, as training data for its heads")
    distill.add_argument("--model", help="name, folder or hub id of the backbone")
    _prompt_flags(distill, None)
    distill.add_argument("--out", type=Path, required=True, help="JSONL file; a run that was cut off goes on in it")
    distill.add_argument("--turns", type=_count, default=3, help="user turns to answer of each conversation")
    distill.add_argument("--batch", type=_count, default=64, help="conversations answered at once")
    distill.add_argument("--max-new-tokens", type=_count, default=160)
    distill.add_argument("--temperature", type=float, default=0.3)
    distill.add_argument("--seed", type=int, default=0)

    calibrate = _command(commands, "calibrate", _calibrate, "measure each head's accuracy, for the tree tuner")
    _model_flags(calibrate)
    _prompt_flags(calibrate, 200)
    calibrate.add_argument("--max-new-tokens", type=_count, default=128)

    _command(commands, "models", _models, "list the models that --model knows by name")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="name (see `medusa-chat models`), folder or hub id; default: the bundled model")
    parser.add_argument("--heads", help="Medusa heads: file, folder or hub id; default: beside the backbone")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    parser.add_argument("--tree", default="auto", help="auto, chain-N, a released tree, or a JSON file of paths")
    parser.add_argument("--max-context", type=_count, help="tokens that prompt and reply may hold together")


def _sampling_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    hints = get_type_hints(Sampling)
    for field in fields(Sampling):
        default = defaults.get(field.name, field.default)
        if hints[field.name] is bool:
            parser.add_argument(_flag(field.name), action="store_true", help=SAMPLING_HELP[field.name])
        else:
            shown = "" if default == () else f" (default: {default})"
            parser.add_argument(_flag(field.name), default=default, help=SAMPLING_HELP[field.name] + shown)


def _prompt_flags(parser: argparse.ArgumentParser, limit: int | None) -> None:
    parser.add_argument("--prompts", type=Path, nargs="+", required=True, help="MT-Bench, messages or text")
    parser.add_argument("--limit", type=_count, default=limit, help="prompts to take, in turn from each file")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _sampling(options: argparse.Namespace) -> Sampling:
    hints = get_type_hints(Sampling)
    given = {name: getattr(options, name) for name in hints}
    read = {name: parse_value(name, hints[name], v) if isinstance(v, str) else v for name, v in given.items()}
    return Sampling(**read)


def _load(options: argparse.Namespace, probing: bool = True) -> Engine:
    import medusa_chat

    return medusa_chat.load(
        options.model, options.heads, device=options.device, dtype=options.dtype, tree=options.tree,
        context=options.max_context, probing=probing,
    )  # fmt: skip


def _chat(options: argparse.Namespace) -> int:
    sampling = _sampling(options)
    prompt = options.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is not None:
        return _answer_once(options, sampling, prompt)
    if options.json:
        raise UserError("--json needs --prompt TEXT, or text piped to standard input")
    from platformdirs import user_state_path

    from medusa_chat.config import resolve_model
    from medusa_chat.terminal.repl import chat

    name = resolve_model(options.model, options.heads).name
    history = user_state_path("medusa-chat") / "history"
    return chat(
        lambda: _load(options), model=name, sampling=sampling, system=options.system, marks=options.marks,
        history=history, transcript=options.transcript,
    )  # fmt: skip


def _answer_once(options: argparse.Namespace, sampling: Sampling, prompt: str) -> int:
    """Answer one prompt on standard output: its text, or with --json a line per step and a summary."""
    from medusa_chat.events import Stats
    from medusa_chat.terminal.wrapping import sanitize

    if not prompt:
        raise UserError("the prompt is empty")
    engine = _load(options)
    system = engine.system if options.system is None else options.system
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    stats, ids, text = Stats(), [], ""
    with closing(engine.generate(messages, sampling)) as steps:  # type: ignore[type-var]
        for step in steps:
            stats.add(step)
            ids += [token.id for token in step.tokens]
            text += step.text
            line = json.dumps(step.as_json()) + "\n" if options.json else sanitize(step.text)
            print(line, end="", flush=True)
    if options.json:
        print(json.dumps({"type": "summary", "text": text, "ids": ids, "mode": sampling.mode, **stats.as_json()}))
    else:
        print()
    for notice in engine.notices:
        print(f"medusa-chat: {notice}", file=sys.stderr)
    return 0


def _bench(options: argparse.Namespace) -> int:
    from medusa_chat import bench
    from medusa_chat.prompts import read_prompts
    from medusa_chat.terminal import report

    sampling = _sampling(options)
    modes = [sampling.with_value("mode", name).mode for name in options.modes.split(",")]
    prompts = read_prompts(options.prompts, options.limit)
    engine = _load(options, probing=False)
    view = report.timed_view(sampling) if options.view else None
    plan = bench.Plan(prompts, modes, sampling, options.rounds, options.peer is not None, view)
    with report.progress("measuring") as progress:
        result = bench.bench(engine, plan, progress)
    report.show_bench(result)
    print(json.dumps(result))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from medusa_chat.prompts import read_prompts
    from medusa_chat.terminal import report
    from medusa_chat.verify import verify

    sampling = _sampling(options)
    prompts = read_prompts(options.prompts, options.limit)
    engine = _load(options, probing=False)
    with report.progress("verifying") as progress:
        checks = verify(engine, prompts, sampling, turns=options.turns, progress=progress)
    report.show_checks([vars(check) for check in checks])
    return 1 if any(check.faults for check in checks) else 0


def _train(options: argparse.Namespace) -> int:
    from medusa_chat.terminal import report
    from medusa_chat.training.trainer import train

    recipe = Recipe(**{field.name: getattr(options, f"recipe_{field.name}") for field in fields(Recipe)})
    with report.training() as progress:
        file = train(options.model, options.data, options.out, recipe, progress, options.resume)
    print(f"wrote {file}")
    return 0


def _distill(options: argparse.Namespace) -> int:
    from medusa_chat.terminal import report
    from medusa_chat.training.distill import distill

    with report.progress("answering") as progress:
        distill(
            options.model, options.prompts, options.out, limit=options.limit, turns=options.turns, batch=options.batch,
            max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed,
            progress=progress,
        )  # fmt: skip
    print(f"wrote {options.out}")
    return 0


def _calibrate(options: argparse.Namespace) -> int:
    from medusa_chat.config import resolve_model
    from medusa_chat.model.layouts import ACCURACY_FILE
    from medusa_chat.model.loading import heads_file
    from medusa_chat.prompts import read_prompts
    from medusa_chat.terminal import report
    from medusa_chat.training.calibrate import calibrate, write_accuracy

    prompts = read_prompts(options.prompts, options.limit)
    heads = heads_file(resolve_model(options.model, options.heads))
    if heads is None:
        raise UserError("the model has no Medusa heads to measure")
    options.tree = "chain-1" if options.tree == "auto" else options.tree  # nothing is timed here
    engine = _load(options, probing=False)
    with report.progress("calibrating") as progress:
        accuracy = calibrate(engine, prompts, options.max_new_tokens, progress)
    source = f"{len(prompts)} conversations of {', '.join(path.name for path in options.prompts)}"
    file = heads.parent / ACCURACY_FILE
    write_accuracy(accuracy, file, source)
    report.show_accuracy(accuracy)
    print(f"wrote {file}")
    return 0


def _models(options: argparse.Namespace) -> int:
    from medusa_chat.terminal import report

    report.show_models(list(read_registry().values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
