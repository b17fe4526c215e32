"""Heads in the layout that another program reads: written, read back, compared, and only then in place."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi
from torch import Tensor
from torch.nn import functional

from medusa_chat.config import ACCURACY_FILE, ModelSpec, UserError
from medusa_chat.decoding.trees.accuracy import read_accuracy
from medusa_chat.export.backbone_files import LICENCES, BackboneFiles, write_tensors
from medusa_chat.export.card import Card, card_of, licence_of
from medusa_chat.export.targets import TARGETS, Facts, Target
from medusa_chat.files import write_json
from medusa_chat.hub import fetch as hub
from medusa_chat.model.layouts import find_heads, read_heads
from medusa_chat.model.layouts.said import read_config
from medusa_chat.model.layouts.write import named_tensors
from medusa_chat.model.loading import DTYPES, heads_file
from medusa_chat.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator

    from medusa_chat.model.heads import MedusaHeads

RECORD_FILE = (
    "medusa_chat_export.json"  # by which a later export knows that it may replace a folder
)
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Export:
    """What is asked for.

    Attributes:
        dtype: key of DTYPES; None keeps that of the heads' file.
        push: hub id of the repository to upload to.
        overwrite: replace a folder that is no earlier export.
    """

    layout: str
    out: Path
    dtype: str | None = None
    push: str | None = None
    private: bool = False
    overwrite: bool = False


def export(spec: ModelSpec, job: Export) -> list[str]:
    """Write a model's heads in a layout; returns notices, a line each.

    Raises:
        UserError: the layout cannot hold these heads, a file cannot be read or written, the folder is taken, or what
            was written does not read back as what it was; then nothing is left of it.
    """
    if job.push and not _HUB_ID.fullmatch(job.push):
        raise UserError(f"--push takes OWNER/NAME, not {job.push!r}")
    target = TARGETS[job.layout]
    files = BackboneFiles.of(hub.local(spec.backbone))
    source = heads_file(spec)
    if source is None:
        raise UserError(f"{spec.name} has no Medusa heads to export")
    _check_out(job, {files.folder, source.parent})
    dtype = DTYPES[job.dtype] if job.dtype else None
    read = read_heads(source, files.hidden, files.vocabulary, dtype=dtype)
    lm_head = files.lm_head().to(read.heads.weight.dtype) if read.heads.lm_heads is None else None
    facts = _facts(spec, files, read.heads)
    if refusal := target.refusal(facts):
        raise UserError(f"these heads cannot be written in the layout {job.layout}: {refusal}")
    notices = list(read.notices)  # of files on this machine, so that they are not for the card
    if job.push and not facts.public:
        notices.append(
            f"the base model is named by its folder, {facts.base}: others need a hub id there"
        )
    with _new_folder(job.out) as folder:
        _write(folder, target, facts, read.heads, lm_head, files)
        _travel_along(folder, files, source.parent)
        logits = _logits(read.heads, lm_head)
        del read  # large heads are not held twice
        _read_back(folder, facts, lm_head, logits)
        _write_card(folder, job, spec, files, facts)
        write_json(
            folder / RECORD_FILE,
            {"layout": job.layout, "base": facts.base, "medusa_chat": __version__},
        )
    if job.push:
        _push(job)
    return [*notices, *target.notices(facts)]


def _facts(spec: ModelSpec, files: BackboneFiles, heads: MedusaHeads) -> Facts:
    named, _ = hub.split_revision(spec.backbone)
    if Path(spec.backbone).is_dir():
        told = str(files.config.get("_name_or_path") or "")
        named = (
            told
            if _HUB_ID.fullmatch(told) and not Path(told).exists()
            else str(files.folder.resolve())
        )
    return Facts(
        heads.heads,
        heads.layers,
        files.hidden,
        files.vocabulary,
        heads.lm_heads is not None,
        named,
        heads.weight.element_size(),
        str(files.config.get("model_type", "")),
    )


def _write(
    folder: Path,
    target: Target,
    facts: Facts,
    heads: MedusaHeads,
    lm_head: Tensor | None,
    files: BackboneFiles,
) -> None:
    tensors = dict(named_tensors(heads, target.naming, lm_head if target.copies(facts) else None))
    if target.file is None:
        files.copy_with(tensors, folder, target.config(facts))
        return
    if target.one_lm_head and lm_head is not None:
        tensors["lm_head.weight"] = lm_head
    write_tensors(tensors, folder / target.file)
    write_json(folder / "config.json", target.config(facts))


def _travel_along(folder: Path, files: BackboneFiles, heads: Path) -> None:
    """Licence and card of the base, which may ask for attribution, and what was measured of the heads."""
    for pattern in LICENCES:
        for file in files.folder.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if card := card_of(files.folder):
        shutil.copyfile(card, folder / "BASE_MODEL_CARD.md")
    if (heads / ACCURACY_FILE).is_file():
        shutil.copyfile(heads / ACCURACY_FILE, folder / ACCURACY_FILE)


def _logits(heads: MedusaHeads, lm_head: Tensor | None) -> Tensor:
    """Logits of a few random hidden states, by the same operations whoever owns the LM heads: [K, n, V]."""
    generator = torch.Generator().manual_seed(0)
    weight = heads.weight
    with torch.inference_mode():
        hidden = torch.randn(4, weight.shape[-1], generator=generator).to(weight.dtype)
        projections = [lm_head] * heads.heads if heads.lm_heads is None else heads.lm_heads
        pairs = zip(heads.features(hidden), projections, strict=True)
        return torch.stack([functional.linear(x, w) for x, w in pairs if w is not None])


def _read_back(folder: Path, facts: Facts, lm_head: Tensor | None, logits: Tensor) -> None:
    file = find_heads(folder)
    if file is None:
        raise UserError(f"what was written to {folder} cannot be found again, and is removed")
    heads = read_heads(file, facts.hidden, facts.vocabulary, lm_head=lm_head).heads
    if not torch.equal(_logits(heads, lm_head), logits):
        raise UserError(
            f"what was written as {file.name} gives other logits when it is read back, and is removed"
        )


def _write_card(
    folder: Path, job: Export, spec: ModelSpec, files: BackboneFiles, facts: Facts
) -> None:
    target, told = TARGETS[job.layout], licence_of(files.folder)
    name = job.push or job.out.resolve().name
    own = facts.own or target.copies(facts)
    rows = {
        "heads": f"{facts.heads}, of {facts.layers} residual block{'s' * (facts.layers > 1)} each",
        "LM heads": "one for each head" if own else "the base model's",
        "layout": f"{job.layout}: {target.description}",
    }
    whole = target.file is None
    here = (
        f"medusa-chat --model {name}"
        if whole
        else f"medusa-chat --model {facts.base} --heads {name}"
    )
    card = Card(
        f"{facts.base.rpartition('/')[2]} with Medusa heads"
        if whole
        else f"Medusa heads for {facts.base}",
        facts.base,
        facts.public,
        told or spec.licence,
        told,
        whole,
        rows,
        {"medusa-chat": here, **target.use(facts, name)},
        tuple(target.notices(facts)),
        read_accuracy(folder / ACCURACY_FILE),
    )
    (folder / "README.md").write_text(card.text(), encoding="utf-8")


def _check_out(job: Export, sources: set[Path]) -> None:
    """Refuse to replace what is not ours to replace."""
    out = job.out.resolve()
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {job.out} is a file; it has to be a folder")
    if any(place.resolve().is_relative_to(out) for place in (*sources, Path.cwd(), Path.home())):
        raise UserError(
            f"--out {job.out} holds the model, or the folder that you are in; choose another one"
        )
    if not out.is_dir() or job.overwrite or not any(out.iterdir()):
        return
    if "layout" not in read_config(out / RECORD_FILE):
        raise UserError(f"--out {job.out} holds other files; --overwrite replaces the folder")


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` at the end, or is removed if anything goes wrong."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()  # with the permissions that folders have here, which those of `work` are not
        yield new
        try:
            if out.exists():
                os.rename(out, old)
            os.rename(new, out)
        except BaseException:
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _push(job: Export) -> None:
    """Upload the folder; the token is huggingface_hub's affair."""
    assert job.push
    try:
        api = HfApi()
        api.create_repo(job.push, private=job.private, exist_ok=True)
        api.upload_folder(
            repo_id=job.push,
            folder_path=job.out,
            commit_message=f"Medusa heads in the layout {job.layout}",
        )
    except Exception as error:  # network, authorization, names: huggingface_hub raises many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = re.sub(r"\bhf_\w+", "hf_***", lines[0] if lines else type(error).__name__)
        raise UserError(
            f"cannot upload to {job.push}: {reason}; the files are in {job.out}"
        ) from None
