"""Imports point one way (DESIGN 1), and what needs no torch does not import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "medusa_chat"
# What each part may import besides itself. `cli` and the package's own front door may import everything.
ENGINE = {"config", "shapes", "registry", "events", "stats", "files", "model", "decoding"}
ALLOWED = {
    "config": set(),
    "shapes": set(),
    "registry": {"config", "shapes"},
    "events": set(),
    "stats": {"events"},
    "files": set(),
    "prompts": {"config"},
    "arguments": {"config", "shapes", "prompts", "__init__"},
    "model": {"config", "shapes", "registry", "events"},
    "decoding": {"config", "shapes", "events", "files", "model", "__init__"},
    "training": ENGINE | {"prompts"},
    "bench": ENGINE | {"prompts", "peers"},
    "peers": ENGINE,
    "export": ENGINE | {"__init__"},
    "verify": ENGINE | {"prompts", "peers"},
    "catalogue": ENGINE,
    "doctor": ENGINE | {"__init__"},
    "terminal": {"config", "shapes", "events", "stats", "__init__"},
}
NO_TORCH = ("config", "shapes", "registry", "events", "stats", "files", "prompts", "arguments", "terminal",
            "decoding/tree", "decoding/reply", "decoding/accuracy", "decoding/online", "decoding/gate",
            "decoding/copying", "decoding/copy_gain", "training/server", "training/schedules", "training/memory",
            "catalogue", "model/hub", "model/hub_errors", "model/download", "model/contents",
            "model/memory")  # fmt: skip


def imports(file: Path, *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports: everywhere, or only when it is imported itself (not inside a function)."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "medusa_chat" else set()
            found |= names or {str(node.module)}
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        type_checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if everywhere or not (inside or type_checking):
            pending += ast.iter_child_nodes(node)
    return found


def part_of(module: str) -> str:
    """The part of the package that a module belongs to; names of the front door itself are '__init__'."""
    name = module.split(".")[1] if "." in module else "__init__"
    return name if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists() else "__init__"


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "__main__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ("cli", "__init__"):
        return
    assert part in ALLOWED, f"say in this test what {part} may import"
    ours = {part_of(name) for name in imports(file) if name.split(".")[0] == "medusa_chat"}
    assert ours <= ALLOWED[part] | {part}


@pytest.mark.parametrize("name", NO_TORCH)
def test_parts_that_never_import_torch(name):
    files = PACKAGE.joinpath(name).rglob("*.py") if (PACKAGE / name).is_dir() else [PACKAGE / f"{name}.py"]
    for file in files:
        heavy = {module.split(".")[0] for module in imports(file)} & {"torch", "transformers", "accelerate"}
        assert not heavy, f"{file} imports {heavy}"


def test_the_command_line_imports_nothing_heavy_at_its_top():
    for file in (PACKAGE / "__init__.py", PACKAGE / "cli.py"):
        for module in imports(file, everywhere=False):
            assert module.split(".")[0] not in ("torch", "transformers")
            assert part_of(module) not in ("model", "decoding", "training") or module.split(".")[0] != "medusa_chat"


@pytest.mark.parametrize(
    "code",
    [
        "import medusa_chat, medusa_chat.config, medusa_chat.stats, medusa_chat.prompts",
        "import medusa_chat.catalogue, medusa_chat.model.memory, medusa_chat.registry",
        "import medusa_chat.model.hub, medusa_chat.model.templates",
        "import medusa_chat.decoding.accuracy, medusa_chat.decoding.tree, medusa_chat.decoding.reply",
        "import importlib, pkgutil, medusa_chat.terminal as parent\n"
        "for each in pkgutil.iter_modules(parent.__path__): importlib.import_module(f'{parent.__name__}.{each.name}')",
        "import contextlib, medusa_chat.cli\nwith contextlib.suppress(SystemExit): medusa_chat.cli.main(['--help'])",
    ],
    ids=["settings", "memory", "downloads", "tree, accuracy and reply", "terminal", "help"],
)
def test_what_a_fresh_interpreter_loads(code):
    script = f"import sys\n{code}\nassert not {{'torch', 'transformers'}} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
