"""The native library, built for the tests from the sources as they are."""

from __future__ import annotations

import pytest

from medusa_chat.native import build


def no_compiler() -> str | None:
    """Say that nothing here compiles C; None if something does."""
    if build.system_compiler() or build.zig_compiler():
        return None
    return "no C compiler and no ziglang, hence no native library"


def need_library() -> None:
    """Build the library if it is stale, or skip where there is no compiler.

    Raises:
        build.BuildError: the compiler refuses the sources, which is no reason to skip.
    """
    reason = no_compiler()
    if reason:
        pytest.skip(reason, allow_module_level=True)
    build.build(build.LIBRARY_FOLDER)
