"""The models that `--model` knows: models.yaml, a file of the user's own, and whatever else may be named. No torch."""

from __future__ import annotations

import os
from dataclasses import MISSING, Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from platformdirs import user_config_path

from medusa_chat.config import BUNDLED, LAYOUTS, ModelSpec, Quant, UserError
from medusa_chat.shapes import SHAPES

if TYPE_CHECKING:
    from collections.abc import Mapping

_QUANTS = ("auto", *get_args(Quant))
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "quant": _QUANTS,
    "quant_heads": _QUANTS,
    "layout": LAYOUTS,
    "shape": tuple(SHAPES),
    "lm_heads": ("own", "shared"),
}


def packaged_file() -> Path:
    """The models.yaml that ships: inside the package in a wheel, beside it in an editable install."""
    package = Path(__file__).parent.parent
    inside = package / "models.yaml"
    return inside if inside.exists() else package.parent / "models.yaml"


def user_file() -> Path:
    """Where the user's own models.yaml lies if there is one: the platform's folder for settings."""
    return user_config_path("medusa-chat") / "models.yaml"


def read_registry(models: Path | None = None) -> dict[str, ModelSpec]:
    """All models by name: those that ship, then the user's own, which take the place of a shipped one's name.

    Args:
        models: the user's own list, in place of `user_file()`.

    Raises:
        UserError: a list cannot be read, or an entry has an unknown key or a bad value.
    """
    registry = read_models(packaged_file())
    if models is not None or user_file().is_file():
        registry |= read_models(models or user_file())
    return registry


def read_models(path: Path) -> dict[str, ModelSpec]:
    """The entries of one models.yaml by name; raises UserError that names file, entry and key."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read the model list {path}: {str(error).splitlines()[0]}"
        ) from None
    if not isinstance(document, dict) or not isinstance(document.get("models"), dict):
        raise UserError(f"{path} must hold a mapping 'models' of name to entry")
    return {str(name): _entry(path, name, entry) for name, entry in document["models"].items()}


def _entry(path: Path, name: str, entry: Any) -> ModelSpec:
    place = f"{path}: entry {str(name)!r}"
    if not isinstance(entry, dict):
        raise UserError(f"{place} must be a mapping")
    known = {field.name: field for field in fields(ModelSpec) if field.name != "name"}
    for key, value in entry.items():
        if key not in known:
            raise UserError(f"{place} has an unknown key {key!r}; known are {', '.join(known)}")
        if complaint := _complaint(known[key], value):
            raise UserError(f"{place}: {key} must be {complaint}, not {value!r}")
    missing = [key for key, field in known.items() if field.default is MISSING and key not in entry]
    if missing:
        raise UserError(f"{place} lacks {', '.join(missing)}")
    places = {key: _beside(path, entry[key]) for key in ("backbone", "heads") if key in entry}
    return ModelSpec(**{"name": str(name), **entry, **places})


def _complaint(field: Field[Any], value: Any) -> str:
    """What a key's value must be, if `value` is not that."""
    if choices := _CHOICES.get(field.name):
        return "" if value in choices else f"one of {', '.join(choices)}"
    if type(field.default) is int:
        return "" if type(value) is int and value >= 0 else "a whole number, 0 or more"
    return "" if isinstance(value, str) else "text"


def _beside(path: Path, value: str) -> str:
    """A place in an entry: `~` is the home folder, and what starts with a dot is meant from the list's own folder."""
    if value.startswith("."):
        return os.path.normpath(path.parent.absolute() / value)
    return os.path.expanduser(value)


def resolve_model(
    model: str | None,
    heads: str | None = None,
    quant: str = "auto",
    quant_heads: str = "auto",
    models: Path | None = None,
    template: str = "",
) -> ModelSpec:
    """The spec for what the user named: a registry name, a folder, or a hub id; None is the bundled model.

    A name or an id may end in @revision. What is given besides takes the place of what the registry says.

    Args:
        models: the user's own list of models; None is the one in the folder for settings, if it is there.
    """
    spec = _named(model or "bundled", read_registry(models))
    if heads:
        # What the registry says of its own heads does not hold for others.
        spec = replace(spec, heads=os.path.expanduser(heads), layout="", medusa_heads=0)
    for key, value in (("quant", quant), ("quant_heads", quant_heads)):
        if value not in _QUANTS:
            raise UserError(f"{key} is one of {', '.join(_QUANTS)}, not {value!r}")
        if value != "auto":
            spec = replace(spec, **{key: value})  # type: ignore[arg-type]
    if template:
        spec = replace(spec, template=template)
    for place in (spec.backbone, spec.heads):
        if place and not Path(place).exists() and is_hub_id(place):
            check_hub_id(place)
    return spec


def _named(name: str, registry: Mapping[str, ModelSpec]) -> ModelSpec:
    if name in registry:
        spec = registry[name]
        return replace(spec, backbone=str(BUNDLED)) if spec.backbone == "bundled" else spec
    if Path(name).expanduser().is_dir():
        return ModelSpec(
            name=Path(name).expanduser().resolve().name, backbone=str(Path(name).expanduser())
        )
    if is_hub_id(name):
        return ModelSpec(name=split_revision(name)[0].split("/")[1], backbone=name)
    base, revision = split_revision(name)
    if revision and base in registry and is_hub_id(registry[base].backbone):
        return replace(
            registry[base], backbone=f"{split_revision(registry[base].backbone)[0]}@{revision}"
        )
    raise UserError(
        f"unknown model {name!r}: not in `medusa-chat models`, not a folder, not a hub id (owner/name)"
    )


def split_revision(place: str) -> tuple[str, str | None]:
    """A hub id without its @revision, and the revision: a branch, a tag or a commit; None where none is named."""
    identity, _, revision = place.partition("@")
    return identity, revision or None


def is_hub_id(place: str) -> bool:
    """Whether a place that is no file or folder here is meant as owner/name, perhaps with a revision."""
    parts = split_revision(place)[0].split("/")
    return len(parts) == 2 and all(parts) and not place.startswith((".", "~"))


def check_hub_id(place: str) -> None:
    """Raise UserError for an id that the hub cannot have, before anything is asked of it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    identity, revision = split_revision(place)
    if "@" in place and (revision is None or any(c.isspace() or c == "@" for c in revision)):
        raise UserError(
            f"{place!r} names no revision behind the @: it is a branch, a tag or a commit"
        )
    try:
        validate_repo_id(identity)
    except HFValidationError:
        raise UserError(
            f"{identity!r} is no hub id: owner/name, of letters, digits and single - _ . inside"
        ) from None
