"""Compile the native kernels into one shared library.

Files that name `MC_VARIANT` are compiled once for each family of processors, files that end in the
name of one (`_avx2.c`) for that family, all others once. Nothing here imports medusa_chat, so that
the build hook can load this file by its path.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE = Path(__file__).parent / "source"
LIBRARY_FOLDER = Path(__file__).parent / "lib"
FAILURE_FILE = "failure.txt"
DIGEST_FILE = "sources.txt"
COMMON_FLAGS = (
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-pthread",
)


class BuildError(Exception):
    """The library cannot be built; the message is one line."""


@dataclass(frozen=True)
class Variant:
    """A family of processors: flags for gcc and clang, and zig's name of the processor."""

    name: str
    define: str
    flags: tuple[str, ...]
    zig_processor: str
    suffix: str | None = None  # of files for this family alone


AVX2_FLAGS = ("-mavx2", "-mfma", "-mf16c")
AVX512_FLAGS = tuple(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni", "bf16"))
AMX_FLAGS = tuple(f"-mamx-{part}" for part in ("tile", "int8", "bf16"))
VARIANTS = {
    "x86_64": (
        Variant("portable", "MC_PORTABLE", (), "x86_64", "portable"),
        Variant("avx2", "MC_AVX2", AVX2_FLAGS, "x86_64_v3", "avx2"),
        Variant("avx2vnni", "MC_AVX2", (*AVX2_FLAGS, "-mavxvnni"), "x86_64_v3+avxvnni"),
        Variant(
            "avx512",
            "MC_AVX512",
            (*AVX2_FLAGS, *AVX512_FLAGS),
            "x86_64_v4+avx512vnni+avx512bf16",
            "avx512",
        ),
        Variant(
            "amx",
            "MC_AVX512",
            (*AVX2_FLAGS, *AVX512_FLAGS, *AMX_FLAGS),
            "x86_64_v4+avx512vnni+avx512bf16+amx_tile+amx_int8+amx_bf16",
        ),
    ),
    "aarch64": (
        Variant("portable", "MC_PORTABLE", (), "generic", "portable"),
        Variant("arm", "MC_ARM", ("-march=armv8.2-a+dotprod",), "generic+dotprod", "neon"),
    ),
}
OTHER_PROCESSORS = (Variant("portable", "MC_PORTABLE", (), "baseline", "portable"),)
SUFFIXES = ("portable", "avx2", "avx512", "neon")


@dataclass(frozen=True)
class Compiler:
    """A command that compiles C for a target, this machine unless another is named."""

    command: tuple[str, ...]
    processor: str = ""
    zig_target: str | None = None

    @property
    def is_zig(self) -> bool:
        """True for zig, which names processors in its own way."""
        return "ziglang" in self.command

    def flags(self, variant: Variant) -> list[str]:
        """Flags that let the compiler use what the variant's processors have."""
        if not self.is_zig:
            return list(variant.flags)
        target = ["-target", self.zig_target] if self.zig_target else []
        return [*target, f"-mcpu={variant.zig_processor}", "-fno-sanitize=undefined"]

    @property
    def variants(self) -> Sequence[Variant]:
        """Families of the target; the portable one is first."""
        return VARIANTS.get(self.processor or this_processor(), OTHER_PROCESSORS)


@dataclass(frozen=True)
class Task:
    """One file to compile for one family of processors."""

    source: Path
    variant: Variant
    defines: tuple[str, ...]

    @property
    def object_name(self) -> str:
        """Name of the object file; differs between variants."""
        return f"{self.source.stem}.{self.variant.name}.o"


@dataclass(frozen=True)
class Plan:
    """A library to build: its folder, further flags, and patterns of the files to take."""

    folder: Path
    extra: tuple[str, ...]
    parts: tuple[str, ...]


def this_processor() -> str:
    """Name this machine's processor as VARIANTS does."""
    machine = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def library_name() -> str:
    """Name of the library's file on this system."""
    suffix = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
    return f"libmedusa_chat.{suffix}"


def system_compiler() -> Compiler | None:
    """Find the system's C compiler: what CC names, else cc, gcc or clang."""
    names = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    for name in names:
        command = tuple(name.split())
        if command and shutil.which(command[0]):
            return Compiler(command)
    return None


def zig_compiler(processor: str = "", target: str | None = None) -> Compiler | None:
    """Find zig as the package ziglang installs it."""
    if importlib.util.find_spec("ziglang") is None:
        return None
    return Compiler((sys.executable, "-m", "ziglang", "cc"), processor, target)


def build(
    folder: Path,
    compiler: Compiler | None = None,
    extra: Sequence[str] = (),
    parts: Sequence[str] = ("*",),
) -> Path:
    """Build the library into a folder and return its path; do nothing if it is up to date.

    Args:
        folder: the folder of the library.
        compiler: by default the system's, then zig.
        extra: further flags for every file.
        parts: patterns of the names of files to take.

    Raises:
        BuildError: no compiler works; one line says why.
    """
    plan = Plan(folder, tuple(extra), tuple(parts))
    compilers = [compiler] if compiler else [system_compiler(), zig_compiler()]
    usable = [candidate for candidate in compilers if candidate]
    if not usable:
        raise BuildError("no C compiler (cc, gcc or clang) and no ziglang package was found")
    for candidate in usable[:-1]:
        try:
            return _build_with(candidate, plan)
        except BuildError:
            continue
    return _build_with(usable[-1], plan)


def _build_with(compiler: Compiler, plan: Plan) -> Path:
    folder = plan.folder
    library = folder / library_name()
    digest = _digest(compiler, plan)
    digest_file = folder / DIGEST_FILE
    if library.exists() and digest_file.exists() and digest_file.read_text() == digest:
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            made = _compile_and_link(compiler, plan, Path(place))
            os.replace(made, library)
        digest_file.write_text(digest)
        (folder / FAILURE_FILE).unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"cannot build in {folder}: {error}") from error
    return library


def _digest(compiler: Compiler, plan: Plan) -> str:
    digest = hashlib.sha256(repr((compiler, compiler.variants, plan.extra, plan.parts)).encode())
    for path in sorted([*SOURCE.glob("*.[ch]"), Path(__file__)]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def tasks(variants: Sequence[Variant], parts: Sequence[str] = ("*",)) -> list[Task]:
    """List what to compile for a processor's variants."""
    listed: list[Task] = []
    sources = {path for part in parts for path in SOURCE.glob(f"{part}.c")}
    for source in sorted(sources):
        suffix = source.stem.rpartition("_")[2]
        if suffix in SUFFIXES:
            listed += [Task(source, one, (one.define,)) for one in variants if one.suffix == suffix]
        elif "MC_VARIANT(" in source.read_text(encoding="utf-8"):
            listed += [
                Task(source, one, (one.define, f"MC_VARIANT_NAME={one.name}")) for one in variants
            ]
        else:
            listed.append(Task(source, variants[0], ()))
    return listed


def _compile_and_link(compiler: Compiler, plan: Plan, place: Path) -> Path:
    listed = tasks(compiler.variants, plan.parts)

    def compile_one(task: Task) -> None:
        defines = [f"-D{name}" for name in task.defines]
        target = ["-c", str(task.source), "-o", str(place / task.object_name)]
        _run(
            [
                *compiler.command,
                *COMMON_FLAGS,
                *compiler.flags(task.variant),
                *plan.extra,
                *defines,
                *target,
            ]
        )

    with ThreadPoolExecutor(max(os.cpu_count() or 1, 1)) as pool:
        list(pool.map(compile_one, listed))
    library = place / library_name()
    objects = [str(place / task.object_name) for task in listed]
    link = ["-shared", "-pthread", "-o", str(library), *objects, "-lm"]
    _run([*compiler.command, *compiler.flags(compiler.variants[0]), *plan.extra, *link])
    return library


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} does not start: {error}") from error
    if done.returncode:
        raise BuildError(f"{command[0]} failed: {_first_error(done.stderr)}")


def _first_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line]
    return (errors or lines or ["no message"])[0]


if __name__ == "__main__":
    try:
        print(build(LIBRARY_FOLDER))
    except BuildError as error:
        sys.exit(f"error: {error}")
