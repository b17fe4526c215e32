"""Settings: frozen dataclasses whose defaults are written once. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints

Mode = Literal["greedy", "typical", "exact", "vanilla"]
MODES: tuple[Mode, ...] = get_args(Mode)
Quant = Literal["none", "nf4", "nf4-double", "int8"]
MAX_CONTEXT = 8192  # unless asked for more: the cache of a long-context model would fill the memory
MAX_NODES = 256  # of a candidate tree; the cache has rows for them behind the context
COLD = 1e-5  # a temperature below this is 0: logits divided by it could overflow


# Layouts of heads' files: the official ones by their versions, the others by the program that reads them.
LAYOUTS = ("v0.1", "v2", "v1.0", "tgi", "vllm", "tensorrt-llm", "modelopt")


class UserError(Exception):
    """Something the user can put right; its message is the one line that is shown, with exit status 2."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's own, torch's on a GPU, and torch's on the CPU."""
    signs = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "cannot allocate memory",
    )
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class Sampling:
    """How one reply is decoded. Each field is also a `--flag` and a name for `/set`."""

    mode: Mode = "greedy"
    temperature: float = 0.7  # used by typical, exact and, with sample, by vanilla
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    epsilon: float = 0.09  # typical acceptance: the hard threshold (paper, section 2.3.1)
    delta: float = 0.3  # typical acceptance: the entropy factor, sqrt(epsilon) in the released code
    sample: bool = False  # vanilla only: draw from the tempered distribution instead of the argmax
    seed: int = 0
    max_new_tokens: int = 512
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        checks = (
            (self.mode in MODES, f"mode must be one of {', '.join(MODES)}, not {self.mode!r}"),
            (self.temperature >= 0, f"temperature must be 0 or more, not {self.temperature:g}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p:g}"),
            (self.top_k >= 0, f"top_k must be 0 (off) or more, not {self.top_k}"),
            (0 <= self.min_p <= 1, f"min_p must be between 0 and 1, not {self.min_p:g}"),
            (0 < self.epsilon <= 1, f"epsilon must be above 0 and at most 1, not {self.epsilon:g}"),
            (self.delta > 0, f"delta must be above 0, not {self.delta:g}"),
            (
                self.max_new_tokens > 0,
                f"max_new_tokens must be at least 1, not {self.max_new_tokens}",
            ),
            (0 <= self.seed < 2**32, f"seed must be between 0 and {2**32 - 1}, not {self.seed}"),
            (all(self.stop), "a stop string may not be empty"),
        )
        for holds, complaint in checks:
            if not holds:
                raise UserError(complaint)

    @property
    def greedy(self) -> bool:
        """Whether the reply is the argmax path: greedy mode, plain vanilla, or a temperature of 0."""
        if self.mode == "vanilla" and not self.sample:
            return True
        return self.mode == "greedy" or self.temperature < COLD

    def with_value(self, name: str, text: str) -> Sampling:
        """A copy with field `name` read from `text`, as `/set` and the command line give it."""
        hints = get_type_hints(Sampling)
        if name not in hints:
            raise UserError(f"there is no setting {name!r}; the settings are {', '.join(hints)}")
        return replace(self, **{name: parse_value(name, hints[name], text)})


# What each setting is, for `--help`, `/set` and completion.
SAMPLING_HELP = {
    "mode": "greedy, typical, exact or vanilla",
    "temperature": "higher is more varied; 0 is greedy",
    "top_p": "draw from the likeliest tokens that add up to this probability; 1 is off",
    "top_k": "draw from this many likeliest tokens; 0 is off",
    "min_p": "leave out tokens below this share of the likeliest one's probability; 0 is off",
    "epsilon": "typical acceptance: the hard threshold",
    "delta": "typical acceptance: the entropy factor",
    "sample": "vanilla mode draws from the distribution instead of taking the likeliest token",
    "seed": "the same seed gives the same reply",
    "max_new_tokens": "longest reply",
    "stop": "a reply ends before this text; \\n is a newline",
    "ignore_eos": "go on after the model ends its reply",
}


def parse_value(name: str, kind: Any, text: str) -> Any:
    """Read `text` as a value of a settings field; a wrong one is a UserError that names the field."""
    if get_origin(kind) is Literal or kind is str:
        return text
    if kind is bool:
        if text.lower() not in ("on", "off", "true", "false", "yes", "no"):
            raise UserError(f"{name} is on or off, not {text!r}")
        return text.lower() in ("on", "true", "yes")
    if get_origin(kind) is tuple:
        return (text.replace("\\n", "\n").replace("\\t", "\t"),) if text else ()
    try:
        value = kind(text)
    except ValueError:
        raise UserError(
            f"{name} must be {'a whole number' if kind is int else 'a number'}, not {text!r}"
        ) from None
    if value != value or value in (float("inf"), float("-inf")):
        raise UserError(f"{name} must be a finite number, not {text!r}")
    return value


@dataclass(frozen=True)
class ModelSpec:
    """One entry of models.yaml: what to load and how."""

    name: str
    backbone: str  # a folder or a hub id, which may end in @revision
    heads: str | None = None  # likewise, or a file; None: in the backbone's own folder
    layout: str = ""  # of LAYOUTS, that the heads' files should have; their tensors decide
    template: str = ""  # a conversation template of fastchat; "": the tokenizer's own, else the one fastchat matches
    quant: str = "auto"  # auto, or a Quant: of the backbone
    quant_heads: str = "auto"  # auto, or a Quant: of the heads
    tree: str = "auto"
    system: str = ""
    shape: str = (
        ""  # of shapes.SHAPES: like the next two, for the plan of memory before any file is there
    )
    medusa_heads: int = 0
    lm_heads: Literal["own", "shared"] = "own"
    licence: str = "unknown"
    description: str = ""


Device = Literal["auto", "cpu", "cuda", "mps"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded. Each field is also a flag of the commands that load one.

    Attributes:
        device: where to run; auto takes the first of cuda, mps and cpu that is there.
        dtype: number format of weights and activations; auto takes what suits the device.
        quant: quantization of the backbone's weights; auto takes what the model list says.
        quant_heads: quantization of the heads' weights; auto likewise.
        template: conversation template of fastchat, in place of the model's own.
        tree: auto, retune (auto, with steps timed anew), dynamic-N, static-N, chain-N,
            the name of a released tree, or a JSON file of paths.
        copies: also guess by copying earlier text of the conversation.
        context: tokens that prompt and reply may hold together; None is the model's own limit.
        models: the user's model list, in place of the one in the settings folder.
        ignore_memory: load even where less memory is free than the model needs.
        eager: run each step operation by operation; None does so only where it must.
        fuse: join matrices that read the same rows.
        probing: take a vanilla step now and then, to measure the speedup.
        measured: use the accuracies that `medusa-chat calibrate` measured.
    """

    device: Device = "auto"
    dtype: Dtype = "auto"
    quant: Quant | Literal["auto"] = "auto"
    quant_heads: Quant | Literal["auto"] = "auto"
    template: str = ""
    tree: str = "auto"
    copies: bool = True
    context: int | None = None
    models: Path | None = None
    ignore_memory: bool = False
    eager: bool | None = None
    fuse: bool = True
    probing: bool = True
    measured: bool = True


OWN_SHARE = (
    0.12  # `auto` gives heads LM heads of their own up to this share of the backbone's parameters
)


@dataclass(frozen=True)
class Recipe:
    """How a model is given Medusa heads (paper, section 2.2). Each field is also a `--flag` of `train`.

    RECIPES holds the paper's three: medusa1 trains heads on a frozen backbone, medusa2 both, distilled both with the
    backbone held to what it said before.
    """

    name: str = "medusa1"
    heads: int = 4
    layers: int = 1
    lm_heads: Literal["auto", "own", "shared"] = "auto"
    decay: float = 0.8
    learning_rate: float = 2e-3
    warmup_steps: int = 40
    epochs: float = 2.0
    max_steps: int = -1
    batch_size: int = 8
    accumulation: int = 1
    length: int = 512
    seed: int = 0
    quant: Quant = "none"
    backbone_learning_rate: float = 5e-4
    lambda_0: float = 0.2
    ramp: Literal["constant", "sine"] = "constant"
    heads_first: float = 0.25
    lora_rank: int = 32
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    gradient_checkpointing: bool = False
    save_steps: int = 500
    logging_steps: int = 10

    def __post_init__(self) -> None:
        counts = (
            "heads",
            "layers",
            "epochs",
            "batch_size",
            "accumulation",
            "save_steps",
            "logging_steps",
            "decay",
            "learning_rate",
            "lora_alpha",
        )
        amounts = ("warmup_steps", "backbone_learning_rate", "lambda_0")
        checks = (
            (self.name in RECIPES, f"unknown recipe {self.name!r}; there are {', '.join(RECIPES)}"),
            *(
                (0 < getattr(self, n) < inf, f"{n} must be above 0, not {getattr(self, n)}")
                for n in counts
            ),
            *(
                (0 <= getattr(self, n) < inf, f"{n} must be 0 or more, not {getattr(self, n)}")
                for n in amounts
            ),
            (
                self.lm_heads in ("auto", "own", "shared"),
                f"lm_heads is auto, own or shared, not {self.lm_heads!r}",
            ),
            (self.ramp in ("constant", "sine"), f"ramp is constant or sine, not {self.ramp!r}"),
            (
                self.quant in get_args(Quant),
                f"quant is {', '.join(get_args(Quant))}, not {self.quant!r}",
            ),
            (
                self.length > self.heads + 1,
                f"rows of {self.length} tokens are too short for {self.heads} heads",
            ),
            (
                0 <= self.heads_first < 1,
                f"heads_first must be from 0 to below 1, not {self.heads_first:g}",
            ),
            (0 <= self.seed < 2**32, f"seed must be between 0 and {2**32 - 1}, not {self.seed}"),
            (
                0 <= self.lora_dropout < 1,
                f"lora_dropout must be from 0 to below 1, not {self.lora_dropout:g}",
            ),
            (
                self.lora_rank >= 0,
                f"lora_rank must be 0 (train the whole backbone) or more, not {self.lora_rank}",
            ),
            (
                not self.whole or self.name != "distilled",
                "distilled needs an adapter to switch off: lora_rank above 0",
            ),
            (
                not self.whole or self.quant == "none",
                f"a backbone in {self.quant} needs an adapter: lora_rank above 0",
            ),
        )
        for holds, complaint in checks:
            if not holds:
                raise UserError(complaint)

    @property
    def joint(self) -> bool:
        """Whether the backbone is trained with the heads."""
        return self.name != "medusa1"

    @property
    def whole(self) -> bool:
        """Whether all weights of the backbone are trained, and not those of an adapter."""
        return self.joint and not self.lora_rank

    def owns_lm_heads(self, lm_head: int, backbone: int) -> bool:
        """Whether new heads get LM heads of their own, for a backbone and its LM head of so many parameters."""
        return self.lm_heads == "own" or (
            self.lm_heads == "auto" and self.heads * lm_head <= OWN_SHARE * backbone
        )


# The released recipes' settings (ctlllll/axolotl, examples/medusa); rows and batches are for one small machine.
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


def make_recipe(name: str, **changes: Any) -> Recipe:
    """A recipe by name with some settings of one's own; raises UserError for what cannot be."""
    return Recipe(**{"name": name, **RECIPES.get(name, {}), **changes})


# What each setting is, for `train --help`.
RECIPE_HELP = {
    "name": "medusa1 (heads on a frozen backbone), medusa2 (both) or distilled (both, the backbone held to itself)",
    "heads": "Medusa heads",
    "layers": "residual blocks of each head",
    "lm_heads": "own, shared (the backbone's), or auto: own where they are small beside the backbone",
    "decay": "the loss of head k weighs decay ** k",
    "learning_rate": "of the heads",
    "warmup_steps": "steps over which a learning rate rises, before it falls in a half cosine",
    "epochs": "times that the data are seen",
    "max_steps": "steps, if above 0, whatever the epochs",
    "batch_size": "rows at once on each device",
    "accumulation": "batches that make a step",
    "length": "tokens in a row",
    "seed": "the same seed gives the same weights",
    "quant": "frozen backbone as none (16-bit), nf4 or int8",
    "backbone_learning_rate": "medusa2, distilled: of the backbone or its adapter",
    "lambda_0": "medusa2, distilled: weight of the heads' loss beside the backbone's",
    "ramp": "medusa2, distilled: lambda_0 constant, or rising as a quarter sine",
    "heads_first": "medusa2, distilled: share of the steps that train heads alone",
    "lora_rank": "medusa2, distilled: rank of the backbone's adapter; 0 trains the whole backbone",
    "lora_alpha": "scale of the adapter",
    "lora_dropout": "dropout in the adapter",
    "gradient_checkpointing": "less memory for more time",
    "save_steps": "steps between checkpoints",
    "logging_steps": "steps between lines of the log",
}


BUNDLED = Path(__file__).parent / "bundled"
ACCURACY_FILE = "head_accuracy.json"  # beside the heads: what `calibrate` measured
