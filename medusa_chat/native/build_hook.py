"""Build the native library when pip installs medusa-chat.

A failure never stops the installation.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

if TYPE_CHECKING:
    from types import ModuleType

ZIG = "ziglang>=0.13"


def _builder(root: str) -> ModuleType:
    """Load build.py by its path: the package itself imports torch, which a build does not have."""
    path = Path(root) / "medusa_chat" / "native" / "build.py"
    spec = importlib.util.spec_from_file_location("medusa_chat_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    """Name this platform as a wheel does, without a promise about other Linux systems."""
    platforms = (tag.platform for tag in sys_tags())
    return next(name for name in platforms if "manylinux" not in name and "musllinux" not in name)


class NativeLibraryHook(BuildHookInterface[Any]):
    """Compiles the library into medusa_chat/native/lib, or writes failure.txt there."""

    def dependencies(self) -> list[str]:
        """Ask for zig only where the system has no C compiler."""
        if self.target_name != "wheel" or _builder(self.root).system_compiler():
            return []
        return [ZIG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Build, and mark the wheel as one for this platform."""
        if self.target_name != "wheel":
            return
        builder = _builder(self.root)
        folder = Path(builder.LIBRARY_FOLDER)
        try:
            builder.build(folder)
        except builder.BuildError as error:
            self._leave_reason(folder, builder, str(error))
        else:
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{_platform()}"
        build_data["artifacts"].append("medusa_chat/native/lib/*")

    def _leave_reason(self, folder: Path, builder: ModuleType, reason: str) -> None:
        self.app.display_warning(f"medusa-chat is installed without its native step: {reason}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / builder.library_name()).unlink(missing_ok=True)
            (folder / builder.FAILURE_FILE).write_text(reason + "\n", encoding="utf-8")
        except OSError as error:
            self.app.display_warning(f"the reason cannot be written down: {error}")
