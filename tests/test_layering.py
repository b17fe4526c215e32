"""Imports point one way (docs/architecture.md), and what needs no torch does not import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "medusa_chat"
BASE = {"config", "sampling", "settings", "version", "text", "files", "events", "shapes"}
ENGINE = BASE | {"stats", "records", "prompts", "hub", "machine", "model", "native", "decoding"}
# What each part may import besides itself. `cli`, `commands` and the package's own front door
# join the parts and may import everything.
ALLOWED = {
    "config": {"settings", "sampling", "recipes"},
    "recipes": {"settings", "sampling"},
    "sampling": {"settings"},
    "settings": set[str](),
    "version": set[str](),
    "text": set[str](),
    "files": set[str](),
    "shapes": set[str](),
    "locks": {"config", "files"},
    "events": {"config", "text"},
    "settings_file": BASE,
    "stats": BASE,
    "records": BASE,
    "prompts": BASE | {"records"},
    "hub": BASE,
    "machine": BASE | {"hub"},
    "native": BASE | {"machine"},
    "model": BASE | {"hub", "machine", "native"},
    "decoding": BASE | {"stats", "hub", "machine", "model", "native"},
    "training": ENGINE | {"locks"},
    "bench": ENGINE,
    "export": ENGINE,
    "terminal": BASE | {"settings_file", "stats", "prompts", "records", "locks"},
}
JOINING = {"cli", "commands", "__init__"}
NO_TORCH = (
    "config",
    "recipes",
    "sampling",
    "settings",
    "settings_file",
    "version",
    "text",
    "files",
    "locks",
    "shapes",
    "events",
    "stats",
    "records",
    "prompts",
    "hub",
    "machine/contents",
    "machine/memory",
    "machine/openmp",
    "terminal",
    "decoding/reply",
    "decoding/trees/tree",
    "decoding/trees/accuracy",
    "decoding/trees/growth",
    "decoding/trees/choice",
    "decoding/trees/policy",
    "decoding/trees/fading",
    "decoding/trees/tracker",
    "decoding/trees/pause",
    "decoding/trees/copy_gain",
    "decoding/draft/copies",
    "training/server",
    "training/questions",
    "training/conversations",
    "training/invention",
    "training/schedules",
    "training/memory",
)


def imports(file: Path, *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports: everywhere, or only when it is imported itself."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            found |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if everywhere or not (inside or type_checking):
            pending += ast.iter_child_nodes(node)
    return found


def file_of(module: str) -> Path | None:
    """The file of one of our modules, or None for a name that is no module."""
    place = PACKAGE.parent.joinpath(*module.split("."))
    if place.is_dir():
        return place / "__init__.py"
    file = place.with_suffix(".py")
    return file if file.exists() else None


def ours(file: Path, *, everywhere: bool = True) -> set[Path]:
    """Files of the package that a file imports."""
    names = (
        name for name in imports(file, everywhere=everywhere) if name.startswith("medusa_chat")
    )
    found = {file_of(name) for name in names}
    return {each for each in found if each is not None} - {file, PACKAGE / "__init__.py"}


def part_of(file: Path) -> str:
    """The part of the package that a file belongs to."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "__main__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    part = part_of(file)
    if part in JOINING:
        return
    assert part in ALLOWED, f"say in this test what {part} may import"
    assert {part_of(other) for other in ours(file)} <= ALLOWED[part] | {part}


def test_no_imports_go_round_in_a_circle() -> None:
    graph = {file: ours(file) for file in FILES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = " -> ".join(str(file.relative_to(PACKAGE)) for file in error.args[1])
        pytest.fail(f"imports go round in a circle: {circle}")


@pytest.mark.parametrize("name", NO_TORCH)
def test_parts_that_never_import_torch(name: str) -> None:
    folder = PACKAGE / name
    files = folder.rglob("*.py") if folder.is_dir() else [PACKAGE / f"{name}.py"]
    for file in files:
        heavy = {module.split(".")[0] for module in imports(file)}
        assert not heavy & {"torch", "transformers", "accelerate"}, f"{file} imports {heavy}"


def test_the_command_line_imports_nothing_heavy_at_its_top() -> None:
    joining = [PACKAGE / "__init__.py", PACKAGE / "cli.py", *(PACKAGE / "commands").glob("*.py")]
    for file in joining:
        modules = imports(file, everywhere=False)
        assert not {name.split(".")[0] for name in modules} & {"torch", "transformers"}


ALL_OF = (
    "import importlib, pkgutil, medusa_chat.{0} as parent\n"
    "for each in pkgutil.walk_packages(parent.__path__, parent.__name__ + '.'):\n"
    "    importlib.import_module(each.name)"
)


@pytest.mark.parametrize(
    "code",
    [
        "import medusa_chat, medusa_chat.config, medusa_chat.stats, medusa_chat.prompts",
        "import medusa_chat.machine.memory, medusa_chat.decoding.reply",
        ALL_OF.format("hub"),
        ALL_OF.format("terminal"),
        ALL_OF.format("commands"),
        "import contextlib, medusa_chat.cli\n"
        "with contextlib.suppress(SystemExit): medusa_chat.cli.main(['--help'])",
    ],
    ids=["settings", "memory and reply", "hub", "terminal", "commands", "help"],
)
def test_what_a_fresh_interpreter_loads(code: str) -> None:
    script = f"import sys\n{code}\n"
    script += "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy'"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
