"""The models that `--model` knows: models.yaml, the user's list, folders, hub ids. No torch."""

from __future__ import annotations

import os
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from reprlib import repr as shorten
from typing import TYPE_CHECKING, Any, get_args

import yaml
from platformdirs import user_config_path

from medusa_chat.config import BUNDLED, LAYOUTS, SHIPPED_HEADS, ModelSpec, QuantChoice, UserError
from medusa_chat.files import expanded, read_text
from medusa_chat.hub.gguf.folder import is_gguf
from medusa_chat.hub.wheels import parse_source
from medusa_chat.shapes import SHAPES
from medusa_chat.text import reason_of

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST_ALIASES = 20
SHIPPED = "shipped:"
_QUANTS: tuple[str, ...] = get_args(QuantChoice)
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "quant": _QUANTS,
    "quant_heads": _QUANTS,
    "layout": LAYOUTS,
    "shape": tuple(SHAPES),
    "lm_heads": ("own", "shared"),
}


def packaged_file() -> Path:
    """Return the models.yaml that ships: in the package, or next to it in an editable install."""
    package = Path(__file__).parent.parent
    inside = package / "models.yaml"
    return inside if inside.exists() else package.parent / "models.yaml"


def user_file() -> Path:
    """Return the place of the user's own models.yaml, in the platform's settings folder."""
    return user_config_path("medusa-chat") / "models.yaml"


def known_models(models: Path | None = None) -> dict[str, ModelSpec]:
    """Return all models by name: those that ship, then the user's own, which may replace some.

    Args:
        models: a list that replaces `user_file()`.

    Raises:
        UserError: a list cannot be read, or an entry has an unknown key or a bad value.
    """
    found = read_models(packaged_file())
    if models is not None or user_file().is_file():
        found |= read_models(models or user_file())
    return found


def read_models(path: Path) -> dict[str, ModelSpec]:
    """Read one models.yaml; returns its entries by name.

    Raises:
        UserError: names the file, the entry and the key that are at fault.
    """
    try:
        document = yaml.load(read_text(path), _Loader)
    except Exception as error:  # scalars and nesting that PyYAML does not expect raise many kinds
        raise UserError(f"cannot read the model list {path}: {reason_of(error)}") from None
    if not isinstance(document, dict) or not isinstance(document.get("models"), dict):
        raise UserError(f"{path} must hold a mapping 'models' of name to entry")
    return {str(name): _entry(path, name, entry) for name, entry in document["models"].items()}


class _Loader(yaml.SafeLoader):
    """Reads no more aliases than a list needs: a few that merge one another can fill the memory."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node, and count those that are aliases."""
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MOST_ALIASES:
            raise yaml.YAMLError(f"it has more than {MOST_ALIASES} aliases")
        return super().compose_node(parent, index)


def _entry(path: Path, name: str, entry: Any) -> ModelSpec:
    where = f"{path}: entry {str(name)!r}"
    if not isinstance(entry, dict):
        raise UserError(f"{where} must be a mapping")
    known = {field.name: field for field in fields(ModelSpec) if field.name != "name"}
    for key, value in entry.items():
        if key not in known:
            raise UserError(
                f"{where} has an unknown key {shorten(key)}; known are {', '.join(known)}"
            )
        if wanted := _wanted(known[key], value):
            raise UserError(f"{where}: {key} must be {wanted}, not {shorten(value)}")
    missing = [key for key, field in known.items() if field.default is MISSING and key not in entry]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    places = {
        key: _resolve_place(path, entry[key]) for key in ("backbone", "heads") if key in entry
    }
    if mirror := entry.get("mirror"):
        try:
            parse_source(mirror)
        except UserError as error:
            raise UserError(f"{where}: mirror: {error}") from None
    return ModelSpec(**{"name": str(name), **entry, **places})


def _wanted(field: Field[Any], value: Any) -> str:
    """Describe the values that a key may have, or return "" if `value` is one of them."""
    if choices := _CHOICES.get(field.name):
        return "" if value in choices else f"one of {', '.join(choices)}"
    if type(field.default) is int:
        return "" if type(value) is int and value >= 0 else "a whole number, 0 or more"
    return "" if isinstance(value, str) else "text"


def _resolve_place(path: Path, value: str) -> str:
    """Return the place that an entry means; one that starts with a dot is in the list's folder."""
    if value.startswith("."):
        return os.path.normpath(path.parent.absolute() / value)
    return _placed(value)


def _placed(value: str) -> str:
    """Expand `~`, and `shipped:NAME`: heads that come with medusa-chat."""
    if value.startswith(SHIPPED):
        return str(SHIPPED_HEADS / value.removeprefix(SHIPPED))
    return os.path.expanduser(value)


def resolve_model(
    model: str | None,
    heads: str | None = None,
    quant: str = "auto",
    quant_heads: str = "auto",
    models: Path | None = None,
    template: str = "",
) -> ModelSpec:
    """Return the spec of a model: a listed name, a folder or a hub id; None is the bundled model.

    A name or an id may end in @revision. The other arguments replace what the list says.

    Args:
        model: names the model.
        heads: a file, folder or hub id of other heads, or shipped:NAME.
        quant: quantization of the backbone; auto keeps that of the list.
        quant_heads: quantization of the heads, likewise.
        models: a list that replaces the one in the settings folder.
        template: a conversation template of fastchat.

    Raises:
        UserError: there is no such model, or a list or a value is at fault.
    """
    for flag, place in (("--model", model), ("--heads", heads)):
        if place is not None and not place.strip():
            raise UserError(f"{flag} is empty: give a name, a folder or a hub id")
    spec = _named("bundled" if model is None else model, known_models(models))
    if heads:
        # Layout and number are those of the listed heads: other heads may have others.
        spec = replace(spec, heads=_placed(heads), layout="", medusa_heads=0)
    for key, value in (("quant", quant), ("quant_heads", quant_heads)):
        if value not in _QUANTS:
            raise UserError(f"{key} must be one of {', '.join(_QUANTS)}, not {value!r}")
    spec = replace(
        spec,
        quant=spec.quant if quant == "auto" else quant,
        quant_heads=spec.quant_heads if quant_heads == "auto" else quant_heads,
        template=template or spec.template,
    )
    for place in (spec.backbone, spec.heads):
        if place and not Path(place).exists() and is_hub_id(place):
            check_hub_id(place)
    return spec


def _named(name: str, listed: Mapping[str, ModelSpec]) -> ModelSpec:
    if name in listed:
        spec = listed[name]
        return replace(spec, backbone=str(BUNDLED)) if spec.backbone == "bundled" else spec
    place = expanded(name)
    if place.is_dir():
        return ModelSpec(name=place.resolve().name, backbone=str(place))
    if is_gguf(place):
        return ModelSpec(name=place.stem, backbone=str(place))
    base, revision = split_revision(name)
    if is_hub_id(name):
        return ModelSpec(name=base.split("/", 1)[1], backbone=name)
    if revision and base in listed and is_hub_id(listed[base].backbone):
        backbone, _ = split_revision(listed[base].backbone)
        return replace(listed[base], backbone=f"{backbone}@{revision}", mirror="")
    raise UserError(
        f"unknown model {name!r}: not in `medusa-chat models`, not a folder or a GGUF file,"
        " not a hub id (owner/name)"
    )


def split_revision(place: str) -> tuple[str, str | None]:
    """Split a hub id from its revision, which is a branch, a tag or a commit, or None."""
    identity, _, revision = place.partition("@")
    return identity, revision or None


def split_file(identity: str) -> tuple[str, str]:
    """Split a hub id without a revision from the GGUF file or quantization after a colon, or ""."""
    repository, _, file = identity.partition(":")
    return repository, file


def is_hub_id(place: str) -> bool:
    """Tell if a place that does not exist here has the form owner/name[:file][@revision]."""
    parts = split_file(split_revision(place)[0])[0].split("/")
    return len(parts) == 2 and all(parts) and not place.startswith((".", "~"))


def check_hub_id(place: str) -> None:
    """Raise UserError for an id that the hub cannot have, without asking the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    whole, revision = split_revision(place)
    identity, _ = split_file(whole)
    if whole.endswith(":"):
        raise UserError(f"{place!r} names no file after the colon: a GGUF file, or such as Q4_K_M")
    if "@" in place and (revision is None or any(c.isspace() or c == "@" for c in revision)):
        raise UserError(
            f"{place!r} names no revision after the @: that is a branch, a tag or a commit"
        )
    try:
        validate_repo_id(identity)
    except HFValidationError:
        raise UserError(
            f"{identity!r} is no hub id: owner/name, of letters, digits and single - _ . inside"
        ) from None
