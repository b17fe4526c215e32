"""The flags of every sub-command; their defaults and help are read from the settings' own fields."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from medusa_chat.config import (
    LAYOUTS,
    RECIPE_HELP,
    RECIPES,
    SAMPLING_HELP,
    Quant,
    Recipe,
    Sampling,
    UserError,
    make_recipe,
    parse_value,
)
from medusa_chat.shapes import SHAPES
from medusa_chat.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable


class _Template(argparse.Action):
    """Takes the name of a conversation template; `list` prints the names, as --help prints the flags."""

    def __call__(
        self, parser: argparse.ArgumentParser, options: Any, value: Any, flag: str | None = None
    ) -> None:
        if value == "list":
            from fastchat.conversation import conv_templates

            print("\n".join(sorted(conv_templates)))
            parser.exit()
        setattr(options, self.dest, value)


class _Parser(argparse.ArgumentParser):
    """argparse's complaints as the one line that every mistake gets."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


def parser() -> argparse.ArgumentParser:
    """The parser of `medusa-chat`; `options.command` names the sub-command."""
    whole = _Parser(
        prog="medusa-chat",
        description="Chat with a local model that decodes several tokens per step.",
    )
    whole.add_argument("--version", action="version", version=f"medusa-chat {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (text, flags) in COMMANDS.items():
        flags(commands.add_parser(name, help=text, description=text))
    return whole


def _chat(command: argparse.ArgumentParser) -> None:
    _model_flags(command)
    _sampling_flags(command)
    command.add_argument(
        "--prompt", help="answer this once and exit; text piped to standard input does the same"
    )
    command.add_argument(
        "--json", action="store_true", help="with --prompt: one JSON object a line, a step each"
    )
    command.add_argument("--system", help="system prompt")
    command.add_argument(
        "--transcript", type=Path, help="keep the conversation in this file; go on where it ended"
    )
    command.add_argument(
        "--marks", action="store_true", help="mark the heads' tokens without colour too"
    )


def _bench(command: argparse.ArgumentParser) -> None:
    _model_flags(command)
    _sampling_flags(command, max_new_tokens=128)
    _prompt_flags(command, 50, required=False)
    command.add_argument(
        "--modes", default="greedy,typical", help="modes to measure, with commas between"
    )
    command.add_argument(
        "--rounds", type=_count, default=3, help="times that all is measured; medians are told"
    )
    command.add_argument(
        "--turns", type=_count, default=1, help="user turns to answer of each conversation"
    )
    command.add_argument(
        "--peer", choices=["transformers"], help="measure transformers' generate() too"
    )
    command.add_argument("--view", action="store_true", help="measure what the live view costs too")
    text = "random models of known shapes, NAME or NAME:QUANT with commas between: costs of steps without weights"
    command.add_argument("--shape", metavar="NAME", help=f"{text}; {', '.join(SHAPES)}")
    command.add_argument(
        "--shape-heads", type=_count, default=5, metavar="N", help="Medusa heads of such a model"
    )
    text = "give them LM heads of their own, or share the backbone's (default)"
    kinds = command.add_mutually_exclusive_group()
    kinds.add_argument("--own-lm-heads", action="store_true", help=text)
    kinds.add_argument(
        "--shared-lm-heads", dest="own_lm_heads", action="store_false", help=argparse.SUPPRESS
    )
    text = "cached positions behind which steps are timed (default: 256, of a --shape 512,2048)"
    command.add_argument("--context", type=_counts, metavar="N,...", help=text)
    text = "time the first token of a second turn behind conversations of so many tokens, such as 256,1024,4096"
    command.add_argument("--history", type=_counts, metavar="N,...", default=(), help=text)
    command.add_argument(
        "--plot",
        type=Path,
        metavar="FOLDER",
        help="draw the figures as PNG files; needs matplotlib",
    )
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="write the line of JSON into a file too"
    )


def _verify(command: argparse.ArgumentParser) -> None:
    _model_flags(command)
    _sampling_flags(command, max_new_tokens=64)
    _prompt_flags(command, 20)
    command.add_argument(
        "--turns", type=_count, default=1, help="replies to check in each conversation"
    )


def _train(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", required=True, help="name, folder or hub id of the backbone")
    _models_flag(command)
    command.add_argument(
        "--heads-from", metavar="HEADS", help="heads to start from: file, folder or hub id"
    )
    command.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        nargs="+",
        required=True,
        help="messages or ShareGPT JSON, or plain text",
    )
    text = "text for the backbone's perplexity; default: a fiftieth of the data"
    command.add_argument("--held-out", type=Path, metavar="FILE", nargs="+", default=(), help=text)
    text = "folder for heads, model, log and checkpoints"
    command.add_argument("--out", type=Path, metavar="FOLDER", required=True, help=text)
    _template_flag(command)
    _memory_flag(command)
    command.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --out"
    )
    for field in fields(Recipe):
        flag = "--recipe" if field.name == "name" else _flag(field.name)
        command.add_argument(
            flag, dest=f"recipe_{field.name}", help=_recipe_help(field.name), **_form(field.name)
        )


def _form(name: str) -> dict[str, Any]:
    """What argparse needs to read a field. Recipe checks the choices: they are told here for --help alone."""
    kind = get_type_hints(Recipe)[name]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    choices = (
        tuple(RECIPES) if name == "name" else get_args(kind) if get_origin(kind) is Literal else ()
    )
    return {
        "type": str if choices else kind,
        "metavar": "|".join(choices) or ("N" if kind is int else "X"),
    }


def _recipe_help(name: str) -> str:
    """What a field is, its default, and where the recipes differ in it."""
    standard = Recipe.__dataclass_fields__[name].default
    own = [f"{recipe} {changes[name]}" for recipe, changes in RECIPES.items() if name in changes]
    return f"{RECIPE_HELP[name]} (default: {', '.join([str(standard), *own])})"


def _distill(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", help="name, folder or hub id of the backbone; not loaded with --server"
    )
    _models_flag(command)
    _prompt_flags(command, None)
    command.add_argument(
        "--out", type=Path, required=True, help="JSONL file; a run that was cut off goes on in it"
    )
    command.add_argument(
        "--server",
        metavar="URL",
        help="let an OpenAI-compatible server answer; key: OPENAI_API_KEY",
    )
    command.add_argument(
        "--server-model", metavar="NAME", help="the server's name for the model; default: its first"
    )
    command.add_argument(
        "--system", default="", help="system prompt of conversations that have none"
    )
    command.add_argument(
        "--turns", type=_count, default=3, help="user turns to answer of each conversation"
    )
    command.add_argument("--batch", type=_count, default=64, help="conversations answered at once")
    command.add_argument(
        "--max-new-tokens", type=_count, default=160, help="longest reply; a longer one is cut"
    )
    command.add_argument("--temperature", type=float, default=0.3)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    _template_flag(command)
    _memory_flag(command)


def _calibrate(command: argparse.ArgumentParser) -> None:
    _model_flags(command)
    _prompt_flags(command, 200, "--data", "--prompts")
    command.add_argument(
        "--max-new-tokens", type=_count, default=128, help="longest reply that is counted"
    )
    text = "count all prompts; otherwise a fifth of them is held aside, decoded, and compared with the forecast"
    command.add_argument("--no-check", action="store_true", help=text)
    command.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the figures too; needs matplotlib"
    )


def _export(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", help="name, folder or hub id; default: the bundled model")
    _models_flag(command)
    command.add_argument(
        "--heads", help="Medusa heads: file, folder or hub id; default: beside the backbone"
    )
    command.add_argument(
        "--layout", choices=LAYOUTS, required=True, help="the program or version that will read it"
    )
    command.add_argument(
        "--out", type=Path, metavar="FOLDER", required=True, help="new, or an earlier export"
    )
    text = "of the heads; default: as their file has it"
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help=text)
    command.add_argument("--overwrite", action="store_true", help="replace --out whatever it holds")
    command.add_argument(
        "--push", metavar="OWNER/NAME", help="upload it to this repository of the Hugging Face hub"
    )
    command.add_argument(
        "--private", action="store_true", help="with --push: a new repository is private"
    )


def _models(command: argparse.ArgumentParser) -> None:
    _models_flag(command)
    command.add_argument("--json", action="store_true", help="a list of objects")


def _doctor(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="a list of objects, a finding each")


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "chat": ("chat in the terminal, or answer --prompt or piped text once (default)", _chat),
    "bench": ("measure acceptance length and speedup on this machine", _bench),
    "verify": ("check that greedy equals vanilla and exact equals sampling", _verify),
    "train": ("train Medusa heads for a model", _train),
    "distill": ("let the model answer prompts, as training data for its heads", _distill),
    "calibrate": ("measure each head's accuracy, for the tree tuner", _calibrate),
    "export": (
        "write the heads as other programs read them: TGI, vLLM, TensorRT-LLM, ...",
        _export,
    ),
    "models": (
        "list the models that --model knows by name, and which of them fit this machine",
        _models,
    ),
    "doctor": (
        "tell versions, devices, memory and kernels, and what will be used here and why",
        _doctor,
    ),
}


def _model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="name (see `medusa-chat models`), folder or hub id; default: the bundled model",
    )
    _models_flag(parser)
    parser.add_argument(
        "--heads", help="Medusa heads: file, folder or hub id; default: beside the backbone"
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto"
    )
    quants = ["auto", *get_args(Quant)]
    parser.add_argument(
        "--quant", choices=quants, default="auto", help="of the backbone's weights (bitsandbytes)"
    )
    parser.add_argument(
        "--quant-heads", choices=quants, default="auto", help="of the heads' weights"
    )
    _template_flag(parser)
    text = "auto, dynamic-N (N nodes chosen at each step), static-N, chain-N, a released tree, or a JSON file of paths"
    parser.add_argument("--tree", default="auto", help=text)
    text = "--tree auto, with steps timed anew; what an earlier run measured is not used"
    parser.add_argument("--retune", dest="tree", action="store_const", const="retune", help=text)
    parser.add_argument(
        "--eager",
        action="store_true",
        help="on a GPU: run steps one operation at a time, not as graphs",
    )
    text = "copy guesses from the conversation too (default: on)"
    parser.add_argument("--copies", action=argparse.BooleanOptionalAction, default=True, help=text)
    parser.add_argument(
        "--max-context", type=_count, help="tokens that prompt and reply may hold together"
    )
    _memory_flag(parser)


def _template_flag(parser: argparse.ArgumentParser) -> None:
    text = "a conversation template of fastchat, in place of the model's own; `list` prints their names"
    parser.add_argument("--template", metavar="NAME", action=_Template, default="", help=text)


def _memory_flag(parser: argparse.ArgumentParser) -> None:
    text = "load even where less memory is free than the model should need"
    parser.add_argument("--ignore-memory", action="store_true", help=text)


def _models_flag(parser: argparse.ArgumentParser) -> None:
    text = "a models.yaml of your own, in place of the one in the folder for settings"
    parser.add_argument("--models", type=Path, metavar="FILE", help=text)


def _sampling_flags(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    hints = get_type_hints(Sampling)
    for field in fields(Sampling):
        default = defaults.get(field.name, field.default)
        if hints[field.name] is bool:
            parser.add_argument(
                _flag(field.name), action="store_true", help=SAMPLING_HELP[field.name]
            )
        else:
            shown = "" if default == () else f" (default: {default})"
            parser.add_argument(
                _flag(field.name), default=default, help=SAMPLING_HELP[field.name] + shown
            )


def _prompt_flags(
    parser: argparse.ArgumentParser, limit: int | None, *flags: str, required: bool = True
) -> None:
    help = "MT-Bench, messages or text" + (
        "" if required else " (default: a few that come with medusa-chat)"
    )
    parser.add_argument(
        *(flags or ("--prompts",)),
        dest="prompts",
        metavar="FILE",
        type=Path,
        nargs="+",
        required=required,
        help=help,
    )
    parser.add_argument(
        "--limit", type=_count, default=limit, help="prompts to take, in turn from each file"
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted({_count(part) for part in text.split(",")}))


def sampling_of(options: argparse.Namespace) -> Sampling:
    """The Sampling that the command line asks for; raises UserError for a value that cannot be."""
    hints = get_type_hints(Sampling)
    given = {name: getattr(options, name) for name in hints}
    read = {
        name: parse_value(name, hints[name], v) if isinstance(v, str) else v
        for name, v in given.items()
    }
    return Sampling(**read)


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The Recipe that the command line asks for: the named one, with what was given changed."""
    given = {field.name: getattr(options, f"recipe_{field.name}") for field in fields(Recipe)}
    return make_recipe(
        given.pop("name") or Recipe.name, **{k: v for k, v in given.items() if v is not None}
    )
