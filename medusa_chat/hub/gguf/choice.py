"""Which files of a repository `OWNER/REPO:FILE-or-quant` means."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from medusa_chat.config import UserError
from medusa_chat.hub.gguf.header import SHARD

if TYPE_CHECKING:
    from collections.abc import Collection

_FORMAT = re.compile(
    r"(?<![A-Za-z0-9])(?:UD-)?(?:I?Q\d\w*|BF16|F16|F32|MXFP4)(?![A-Za-z0-9])", re.I
)
_NO_MODEL = ("mmproj", "imatrix")  # of pictures, and of the quantization


def chosen_files(repository: str, wanted: str, names: Collection[str]) -> list[str]:
    """Return the GGUF file that is meant, or all its shards in order.

    Args:
        repository: its id, for messages.
        wanted: a file of the repository, or a quantization such as Q4_K_M.
        names: the repository's files.

    Raises:
        UserError: none or several fit.
    """
    series = _series(names)
    if not series:
        raise UserError(f"{repository} has no GGUF files")
    if wanted in names and wanted.lower().endswith(".gguf"):
        return series[SHARD.sub("", wanted)]
    fitting = [name for name in series if _quant(name).lower() == wanted.lower()]
    if len(fitting) == 1:
        return series[fitting[0]]
    if fitting:
        files = ", ".join(series[name][0] for name in fitting)
        raise UserError(f"{repository} has several files in {wanted}: {files}; name one of them")
    quants = ", ".join(sorted({_quant(name) or name for name in series}))
    raise UserError(f"{repository} has no GGUF file {wanted}; it has {quants}")


def _series(names: Collection[str]) -> dict[str, list[str]]:
    """Group the shards of a file under its name without their numbers."""
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        plain = name.lower().endswith(".gguf")
        if plain and not any(part in name.lower() for part in _NO_MODEL):
            found.setdefault(SHARD.sub("", name), []).append(name)
    return found


def _quant(name: str) -> str:
    """Return the last part of a file's name that is a quantization; "" if there is none."""
    found: list[str] = _FORMAT.findall(PurePosixPath(name).name)
    return found[-1] if found else ""
