"""The last hidden states of a frozen backbone, computed once and kept on the disk for a run.

With them go the likeliest next tokens of the backbone, if the loss compares with those. The files
are mapped into memory, so that a batch reads only its own rows.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from medusa_chat.files import read_json, write_json
from medusa_chat.text import duration_text
from medusa_chat.training import reference
from medusa_chat.training.data import IGNORED, PackedRows
from medusa_chat.training.lm_heads import output_layer
from medusa_chat.training.losses import head_targets
from medusa_chat.training.memory import check_disk, kept_bytes
from medusa_chat.training.packed_states import hidden_states
from medusa_chat.training.reference import likeliest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import TrainingArguments

    from medusa_chat.config import Recipe

FOLDER = "kept"  # in the folder of checkpoints
KEY_FILE = "key.json"  # written last: files without it are not whole
PAUSE = 10.0  # seconds at least between two lines of progress
SHARE = 0.05  # of the rows at least between two of them

# Ids and positions, [rows, length] each -> last hidden states, [rows, length, hidden].
Reader = Callable[[Tensor, Tensor], Tensor]


class KeptRows(Dataset[dict[str, Tensor]]):
    """Packed rows with what the backbone made of them.

    Args:
        rows: the packed rows, R of `length` tokens.
        kept: tensors by name, [R, length, ...] each; an item gains its part of each.
    """

    def __init__(self, rows: PackedRows, kept: Mapping[str, Tensor]) -> None:
        self.rows = rows
        self.kept = kept

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        """The item of the packed rows, and the kept tensors' rows."""
        return self.rows[row] | {name: tensor[row] for name, tensor in self.kept.items()}

    def place(self, row: int) -> str:
        """The files and lines of a row's documents."""
        return self.rows.place(row)


def kept_rows(
    backbone: Any,
    rows: PackedRows,
    recipe: Recipe,
    arguments: TrainingArguments,
    dtype: torch.dtype,
    say: Callable[[str], None],
    native: Callable[[], Reader] | None = None,
) -> KeptRows:
    """Keep the hidden states of a run; the first of several processes computes them.

    See `keep_states`.
    """
    run = Path(str(arguments.output_dir))
    with arguments.main_process_first(local=False):
        if arguments.process_index:
            return open_states(rows, run)
        backbone = backbone.to(arguments.device).eval()
        return keep_states(backbone, rows, recipe, run, dtype, say, native)


def keep_states(
    backbone: Any,
    rows: PackedRows,
    recipe: Recipe,
    run: Path,
    dtype: torch.dtype,
    say: Callable[[str], None],
    native: Callable[[], Reader] | None = None,
) -> KeptRows:
    """Compute the hidden states of all rows in `dtype`, or take those that an earlier run kept.

    They are in the folder `run`/kept. Files of other rows, of another backbone, or cut off, are
    made anew. `native` loads what computes them in place of the backbone.

    Raises:
        UserError: the disk has too little space.
        OSError: a file cannot be written; nothing of it is left.
    """
    folder = run / FOLDER
    key = _key(backbone, rows, recipe, dtype)
    if _is_whole(folder, key):
        say(f"the hidden states in {folder} are those of this run: they are used again")
        return open_states(rows, run)
    drop_states(run)
    width = dtype.itemsize
    hidden = int(backbone.get_output_embeddings().in_features)
    likely = reference.LIKELIEST if recipe.compares else 0
    run.mkdir(parents=True, exist_ok=True)
    check_disk(run, kept_bytes(len(rows) * rows.length, hidden, width, likely))
    folder.mkdir()
    try:
        read = native() if native else partial(hidden_states, backbone)
        _make(backbone, read, rows, recipe, folder, dtype, key, say)
    except BaseException:
        drop_states(run)
        raise
    return open_states(rows, run)


def open_states(rows: PackedRows, run: Path) -> KeptRows:
    """Map the whole files of a run into memory."""
    shapes: dict[str, Any] = read_json(run / FOLDER / KEY_FILE)["tensors"]
    kept = {
        name: torch.from_file(
            str(run / FOLDER / name),
            size=torch.Size(tensor["shape"]).numel(),
            dtype=getattr(torch, tensor["dtype"]),
        ).view(tensor["shape"])
        for name, tensor in shapes.items()
    }
    return KeptRows(rows, kept)


def drop_states(run: Path) -> None:
    """Delete the files, if there are any."""
    if (run / FOLDER).exists():
        shutil.rmtree(run / FOLDER)


def _is_whole(folder: Path, key: str) -> bool:
    """Tell if a folder holds whole files with this key."""
    try:
        found = read_json(folder / KEY_FILE)
        return bool(found["key"] == key) and all(
            (folder / name).stat().st_size == tensor["bytes"]
            for name, tensor in found["tensors"].items()
        )
    except (OSError, ValueError, TypeError, KeyError):
        return False


@torch.no_grad()
def _key(backbone: Any, rows: PackedRows, recipe: Recipe, dtype: torch.dtype) -> str:
    """Hash all that the hidden states depend on: rows, weights and settings of the backbone."""
    digest = hashlib.sha256()
    kept = reference.LIKELIEST if recipe.compares else 0
    engine = recipe.hidden_engine
    settings = (dtype, recipe.quant, engine, kept, backbone.config.to_json_string())
    digest.update(repr(settings).encode())
    for name, tensor in (
        ("ids", rows.ids),
        ("positions", rows.positions),
        ("trained", rows.trained),
        *backbone.named_parameters(),
    ):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _make(
    backbone: Any,
    read: Reader,
    rows: PackedRows,
    recipe: Recipe,
    folder: Path,
    dtype: torch.dtype,
    key: str,
    say: Callable[[str], None],
) -> None:
    """Write a file for each kept tensor, batch by batch, and the key at the end."""
    tensors: dict[str, dict[str, Any]] = {}
    told = _Progress(len(rows), say)
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for start in range(0, len(rows), recipe.batch_size):
            batch = range(start, min(start + recipe.batch_size, len(rows)))
            for name, tensor in _states(backbone, read, rows, recipe, batch, dtype).items():
                if name not in files:
                    files[name] = stack.enter_context((folder / name).open("wb"))
                    tensors[name] = _described(tensor, len(rows))
                files[name].write(tensor.contiguous().flatten().view(torch.uint8).numpy())
            told(batch.stop)
    write_json(folder / KEY_FILE, {"key": key, "tensors": tensors})


def _described(batch: Tensor, rows: int) -> dict[str, Any]:
    """The shape, number format and size of a kept tensor, from a batch of it."""
    shape = [rows, *batch.shape[1:]]
    return {
        "shape": shape,
        "dtype": str(batch.dtype).removeprefix("torch."),
        "bytes": torch.Size(shape).numel() * batch.element_size(),
    }


@torch.no_grad()
def _states(
    backbone: Any,
    read: Reader,
    rows: PackedRows,
    recipe: Recipe,
    batch: range,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """What is kept of a batch of rows, [rows, length, ...] each, on the host."""
    items = [rows[row] for row in batch]
    ids, positions, labels = (
        torch.stack([item[name] for item in items]).to(backbone.device)
        for name in ("input_ids", "position_ids", "labels")
    )
    half = dtype != torch.float32
    with torch.autocast(backbone.device.type, dtype if half else None, enabled=half):
        hidden = read(ids, positions).to(backbone.device)
        kept = {"hidden": hidden}
        if recipe.compares:
            wanted = head_targets(labels, positions, 0) != IGNORED
            found = likeliest(hidden, output_layer(backbone), wanted)
            kept |= {"likely_tokens": found.tokens, "likely_log_p": found.log_p}
    return {name: tensor.cpu() for name, tensor in kept.items()}


class _Progress:
    """Lines on the way, not too many: the share of the rows, and the time left."""

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total = total
        self._say = say
        self._started = self._last = time.monotonic()
        self._done = 0

    def __call__(self, done: int) -> None:
        """Tell that so many rows are done."""
        now = time.monotonic()
        often = now - self._last < PAUSE or done - self._done < SHARE * self._total
        if often or done == self._total:
            return
        left = (now - self._started) * (self._total - done) / done
        self._say(
            f"hidden states of {done:,} of {self._total:,} rows are kept,"
            f" {duration_text(left)} left"
        )
        self._last = now
        self._done = done
