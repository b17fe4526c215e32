"""Heads written in the layout of another program, read back, compared, and then put in place."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import HfApi
from torch import Tensor
from torch.nn import functional

from medusa_chat.config import ACCURACY_FILE, ModelSpec, UserError
from medusa_chat.decoding.trees.accuracy import read_accuracy
from medusa_chat.export.backbone_files import BackboneFiles
from medusa_chat.export.card import Card, card_of, licence_of
from medusa_chat.export.fitting import without_vocabulary
from medusa_chat.export.folder import RECORD_FILE, check_folder, replaced_folder
from medusa_chat.export.targets import TARGETS, Facts, Target
from medusa_chat.files import resolved, write_json, write_text
from medusa_chat.hub import fetch as hub
from medusa_chat.hub.file_names import model_folder
from medusa_chat.hub.model_list import split_revision
from medusa_chat.machine.devices import choose_dtype
from medusa_chat.model.layouts import find_heads, read_heads
from medusa_chat.model.layouts.names import TOKEN_MAP
from medusa_chat.model.layouts.write import named_tensors, write_tensors
from medusa_chat.model.loading import heads_file
from medusa_chat.text import reason_of
from medusa_chat.version import __version__

if TYPE_CHECKING:
    from medusa_chat.model.heads import MedusaHeads

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
TOKEN = re.compile(r"\bhf_\w+")
COMPARED_ROWS = 4  # random hidden states whose logits have to be the same


@dataclass(frozen=True)
class Export:
    """Settings of an export.

    Attributes:
        layout: key of TARGETS.
        dtype: number format; None keeps that of the heads' file.
        push: hub id of the repository to upload to.
        overwrite: also replace a folder that is no earlier export.
    """

    layout: str
    out: Path
    dtype: str | None = None
    push: str | None = None
    private: bool = False
    overwrite: bool = False

    @property
    def name(self) -> str:
        """Name of the export for other programs."""
        return self.push or resolved(self.out).name

    @property
    def target(self) -> Target:
        """The layout."""
        return TARGETS[self.layout]


@dataclass(frozen=True)
class Source:
    """A model to export, but for its heads.

    Attributes:
        folder: of its heads.
        lm_head: [V, hidden], the backbone's; None if the heads have LM heads of their own.
        facts: of the heads as their own file has them.
    """

    spec: ModelSpec
    files: BackboneFiles
    folder: Path
    facts: Facts
    lm_head: Tensor | None
    notices: tuple[str, ...]


def export(spec: ModelSpec, job: Export) -> list[str]:
    """Write a model's heads in a layout, and upload them if asked to.

    Returns:
        Lines for the user.

    Raises:
        UserError: the layout cannot hold these heads, a file cannot be read or written, the folder
            is taken, the heads do not read back as they were, or the upload fails. Nothing is left
            of a failed export.
    """
    if job.push and not HUB_ID.fullmatch(job.push):
        raise UserError(f"--push takes OWNER/NAME, not {job.push!r}")
    source, heads = _read(spec, job)
    facts = source.facts
    if refusal := job.target.refusal(facts):
        raise UserError(f"these heads cannot be written in the layout {job.layout}: {refusal}")
    if not job.target.token_map:
        heads = without_vocabulary(heads)
    with replaced_folder(job.out) as folder:
        _write(folder, job.target, source, heads)
        copy_documents(folder, source)
        expected = _logits(heads, source.lm_head)
        del heads  # large heads are not held twice
        check_written(folder, source, expected)
        write_card(folder, job, source)
        record = {"layout": job.layout, "base": facts.base, "medusa_chat": __version__}
        write_json(folder / RECORD_FILE, record, indent=2)
    if job.push:
        _push(job.push, job)
    notices = [*source.notices, *job.target.notices(facts)]
    if job.push and not facts.public:
        notices.append(
            f"the base model is named by its folder, {facts.base}: others need a hub id there"
        )
    return notices


def _read(spec: ModelSpec, job: Export) -> tuple[Source, MedusaHeads]:
    """Read the model and its heads, once the folder is known to be free."""
    files = BackboneFiles.of(hub.backbone_of(spec))
    file = heads_file(spec)
    if file is None:
        raise UserError(f"{spec.name} has no Medusa heads to export")
    check_folder(job.out, {files.folder, model_folder(file)}, job.overwrite)
    dtype = choose_dtype(torch.device("cpu"), job.dtype) if job.dtype else None
    read = read_heads(file, files.hidden, files.vocabulary, dtype=dtype)
    heads = read.heads
    lm_head = files.lm_head().to(heads.weight.dtype) if heads.lm_heads is None else None
    facts = Facts(
        heads=heads.heads,
        layers=heads.layers,
        hidden=files.hidden,
        vocabulary=files.vocabulary,
        ranked=files.vocabulary if heads.vocabulary is None else len(heads.vocabulary),
        parent_bias=0 if heads.parent_bias is None else heads.parent_bias.rank,
        own=heads.lm_heads is not None,
        base=_base(spec, files),
        width=heads.weight.element_size(),
        model_type=str(files.config.get("model_type", "")),
    )
    return Source(spec, files, model_folder(file), facts, lm_head, read.notices), heads


def _base(spec: ModelSpec, files: BackboneFiles) -> str:
    """Return the backbone's hub id, or its folder if it has none."""
    if not Path(spec.backbone).is_dir():
        return split_revision(spec.backbone)[0]
    named = str(files.config.get("_name_or_path") or "")
    if HUB_ID.fullmatch(named) and not Path(named).exists():
        return named
    return str(files.folder.resolve())


def _write(folder: Path, target: Target, source: Source, heads: MedusaHeads) -> None:
    copied = source.lm_head if target.copies(source.facts) else None
    tensors = dict(named_tensors(heads, target.naming, copied))
    config = target.config(source.facts)
    if target.file is None:
        source.files.copy_with(tensors, folder, config)
        return
    shared = _ranked(heads, source.lm_head)
    if target.shared == "once" and shared is not None:
        tensors["lm_head.weight"] = shared
    if heads.vocabulary is not None:
        tensors[TOKEN_MAP] = heads.vocabulary.tokens
    write_tensors(tensors, folder / target.file)
    write_json(folder / "config.json", config, indent=2)


def copy_documents(folder: Path, source: Source) -> None:
    """Copy the base's licence and card, which may ask for attribution, and the accuracies.

    Accuracies of heads whose parent bias is lost would not be those of the copy.
    """
    base = source.files.folder
    for pattern in LICENCES:
        for file in base.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    if card := card_of(base):
        shutil.copyfile(card, folder / "BASE_MODEL_CARD.md")
    accuracy = source.folder / ACCURACY_FILE
    if accuracy.is_file() and not source.facts.parent_bias:
        shutil.copyfile(accuracy, folder / ACCURACY_FILE)


def check_written(folder: Path, source: Source, expected: Tensor) -> None:
    """Read the written heads; raises UserError unless they give the expected logits."""
    file = find_heads(folder)
    if file is None:
        raise UserError(f"the heads written to {folder} cannot be found again, and are removed")
    files = source.files
    read = read_heads(file, files.hidden, files.vocabulary, lm_head=source.lm_head)
    if not torch.equal(_logits(read.heads, source.lm_head), expected):
        raise UserError(
            f"the heads written as {file.name} give other logits when they are read back, and are"
            " removed"
        )


def _logits(heads: MedusaHeads, lm_head: Tensor | None) -> Tensor:
    """Guess for random hidden states, alike whoever owns the LM heads: [K, n, V].

    A token that the heads do not rank has -inf.
    """
    generator = torch.Generator().manual_seed(0)
    weight = heads.weight
    own = heads.lm_heads
    with torch.inference_mode():
        hidden = torch.randn(COMPARED_ROWS, weight.shape[-1], generator=generator).to(weight.dtype)
        projections = [_ranked(heads, lm_head)] * heads.heads if own is None else own
        pairs = zip(heads.features(hidden), projections, strict=True)
        logits = torch.stack([functional.linear(x, w) for x, w in pairs if w is not None])
        if heads.vocabulary is None:
            return logits
        every = logits.new_full((*logits.shape[:2], heads.vocabulary.size), -torch.inf)
        every[..., heads.vocabulary.tokens] = logits
        return every


def _ranked(heads: MedusaHeads, lm_head: Tensor | None) -> Tensor | None:
    """Return the rows of the backbone's LM head, if given, that the heads rank."""
    if lm_head is None or heads.vocabulary is None:
        return lm_head
    return lm_head[heads.vocabulary.tokens]


def write_card(folder: Path, job: Export, source: Source) -> None:
    """Write the model card."""
    target, facts = job.target, source.facts
    base = facts.base
    licence_id = licence_of(source.files.folder)
    own = facts.own or target.copies(facts)
    plural = "s" if facts.layers > 1 else ""
    rows = {
        "heads": f"{facts.heads}, of {facts.layers} residual block{plural} each",
        "LM heads": "one for each head" if own else "the base model's",
        "layout": f"{job.layout}: {target.description}",
    }
    if facts.cut and target.token_map:
        rows["tokens that the heads rank"] = f"{facts.ranked} of {facts.vocabulary}"
    whole = target.file is None
    title, command = f"Medusa heads for {base}", f"medusa-chat --model {base} --heads {job.name}"
    if whole:
        title = f"{base.rpartition('/')[2]} with Medusa heads"
        command = f"medusa-chat --model {job.name}"
    card = Card(
        title=title,
        base=base,
        public=facts.public,
        licence=licence_id or source.spec.licence,
        licence_id=licence_id,
        whole=whole,
        facts=rows,
        use={"medusa-chat": command, **target.use(facts, job.name)},
        notices=tuple(target.notices(facts)),
        accuracy=read_accuracy(folder / ACCURACY_FILE),
    )
    write_text(folder / "README.md", card.text())


def _push(repository: str, job: Export) -> None:
    """Upload the folder; huggingface_hub finds the token."""
    try:
        api = HfApi()
        api.create_repo(repository, private=job.private, exist_ok=True)
        message = f"Medusa heads in the layout {job.layout}"
        api.upload_folder(repo_id=repository, folder_path=job.out, commit_message=message)
    except Exception as error:  # network, authorization, names: huggingface_hub raises many kinds
        reason = TOKEN.sub("hf_***", reason_of(error))
        raise UserError(
            f"cannot upload to {repository}: {reason}; the files are in {job.out}"
        ) from None
