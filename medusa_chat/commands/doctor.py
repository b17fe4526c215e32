"""Show versions, devices, memory and kernels, and what will be used here and why.

The checks import torch themselves, so that a torch that cannot be imported is a finding too.
"""

from __future__ import annotations

import logging
import platform
import shutil
import warnings
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from medusa_chat.commands.device_findings import describe_device, gpu_facts, nf4_product
from medusa_chat.hub.fetch import source_of
from medusa_chat.hub.model_list import (
    known_models,
    packaged_file,
    read_models,
    resolve_model,
    user_file,
)
from medusa_chat.machine.devices import (
    choose_device,
    choose_dtype,
    free_memory,
    total_memory,
    usable_cores,
)
from medusa_chat.settings_file import read_settings, settings_file
from medusa_chat.terminal.chat.archive import Archive, archive_file
from medusa_chat.terminal.output import print_json
from medusa_chat.text import reason_of, size_text
from medusa_chat.version import __version__

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    import torch

REQUIRED = (
    "torch",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "gguf",
    "huggingface-hub",
    "safetensors",
    "tokenizers",
)
OPTIONAL = {
    "peft": "for train --recipe medusa2 and distilled",
    "matplotlib": "for calibrate --plot",
    "fschat": "for templates of models whose tokenizer has none",
    "triton": "for faster attention on an NVIDIA GPU; comes with PyTorch on Linux",
}
TOLERANCE = 0.02  # error of a 4-bit product, relative to the same weights in 16 bits


@dataclass(frozen=True)
class Finding:
    """One line of the report. `fault` marks what keeps medusa-chat from working as it should."""

    topic: str
    name: str
    text: str
    fault: bool = False


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `doctor`."""
    parser.add_argument(
        "--json", action="store_true", help="print a list of objects, one a finding"
    )


def run(options: argparse.Namespace) -> int:
    """Print the findings; the status is 1 if one is a fault."""
    from medusa_chat.terminal.reports.findings import show_findings

    findings = examine()
    listed = [asdict(finding) for finding in findings]
    if options.json:
        print_json(listed, indent=2)
    else:
        show_findings(listed)
    return int(any(finding.fault for finding in findings))


def examine() -> list[Finding]:
    """Return the findings of all checks, topic by topic."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while it is imported
    checks = {
        "versions": check_versions,
        "devices": check_devices,
        "GPU": check_gpus,
        "native step": check_native,
        "4 bit": check_4bit,
        "hub": check_hub,
        "models": check_models,
        "settings": check_settings,
        "default": check_defaults,
    }
    return [finding for topic, check in checks.items() for finding in run_check(topic, check)]


def run_check(topic: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield the findings of a check; an exception ends it with a finding of its own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield from check()
    except Exception as error:  # a broken installation may raise anything
        yield Finding(topic, "failed", _reason(error), fault=True)


def _reason(error: BaseException) -> str:
    kind = type(error).__name__
    line = reason_of(error)
    return kind if line == kind else f"{kind}: {line}"


def check_versions() -> Iterator[Finding]:
    """Report the versions of medusa-chat, Python and the libraries."""
    yield Finding("versions", "medusa-chat", __version__)
    yield Finding("versions", "Python", f"{platform.python_version()} on {platform.platform()}")
    for package in REQUIRED:
        found = package_version(package)
        text = found or f"not installed: pip install {package}"
        yield Finding("versions", package, text, fault=found is None)
    for package, purpose in OPTIONAL.items():
        text = package_version(package) or f"not installed ({purpose})"
        yield Finding("versions", package, text)


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_names() -> list[str]:
    """Return the names of the devices that torch can compute on here."""
    import torch

    names = ["cpu"]
    if torch.backends.mps.is_available():
        names.insert(0, "mps")
    if torch.cuda.is_available():
        names[:0] = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return names


def check_devices() -> Iterator[Finding]:
    """Report each device with its memory, and a GPU that torch does not see."""
    import torch

    for name in device_names():
        memory = f"{size_text(free_memory(name))} of {size_text(total_memory(name))} free"
        yield Finding("devices", name, f"{describe_device(name)}; {memory}")
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
        found = f"torch {torch.__version__}, built {built}, sees no GPU"
        text = f"an NVIDIA driver is installed, but {found}"
        yield Finding("devices", "cuda", text, fault=True)


def check_gpus() -> Iterator[Finding]:
    """Report how steps run on each CUDA GPU."""
    import torch

    for name in device_names():
        if name.startswith("cuda"):
            dtype = choose_dtype(torch.device(name))
            for subject, text, fault in gpu_facts(name, dtype):
                yield Finding("GPU", f"{name} {subject}", text, fault=fault)


def check_native() -> Iterator[Finding]:
    """Report the library of the native step: its kernels and threads, or why it is missing."""
    from medusa_chat.native.library import available
    from medusa_chat.native.packed import variant

    reason = available()
    if reason:
        yield Finding("native step", "cpu", f"{reason}; torch's step serves, which is slower")
        return
    cores = f"{usable_cores()} threads, one for each core that this process may use (--threads)"
    yield Finding("native step", "cpu", f"{variant()} kernels; {cores}")
    yield Finding("native step", "packed", _kept_models())


def _kept_models() -> str:
    """Describe the packed models in the cache folder."""
    from medusa_chat.native import kept

    sizes = [status.st_size for _, status in kept.files()]
    if not sizes:
        return f"no packed models are kept in {kept.folder()}"
    count = "1 packed model" if len(sizes) == 1 else f"{len(sizes)} packed models"
    return f"{count} in {kept.folder()}, {size_text(sum(sizes))}; they may be deleted"


def check_4bit() -> Iterator[Finding]:
    """Compare a tiny nf4 product on each device with that of the same weights in 16 bits."""
    import torch

    for name in device_names():
        dtype = choose_dtype(torch.device(name))
        try:
            error, packed = nf4_product(name, dtype)
        except Exception as reason:  # bitsandbytes may raise anything
            text = f"an nf4 product fails: {_reason(reason)}; --quant none works"
            yield Finding("4 bit", name, text, fault=True)
            continue
        kernel = _kernel(name, packed)
        text = f"an nf4 product in {_dtype_name(dtype)} runs, {kernel}; off by {error:.1%}"
        yield Finding("4 bit", name, text, fault=error > TOLERANCE)


def _kernel(device: str, packed: bool) -> str:
    if device != "cpu":
        return "with bitsandbytes' own kernels"
    return "on weights packed for AVX-512" if packed else "by unpacking the weights, which is slow"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_hub() -> Iterator[Finding]:
    """Report the hub's address, and the folder and disk that downloads go to."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    absent = "" if existing == cache else " (not there yet)"
    free = size_text(shutil.disk_usage(existing).free)
    yield Finding("hub", "cache", f"{cache}{absent}; {free} free")
    mode = "online"
    if constants.HF_HUB_OFFLINE:
        mode = "offline: HF_HUB_OFFLINE is set, nothing is downloaded"
    yield Finding("hub", "mode", f"{mode}; {constants.ENDPOINT}")


def check_models() -> Iterator[Finding]:
    """Report the two lists of models."""
    shipped = packaged_file()
    yield Finding("models", "shipped", f"{len(read_models(shipped))} in {shipped}")
    own = user_file()
    text = f"{len(read_models(own))} in {own}" if own.is_file() else f"none: there is no {own}"
    yield Finding("models", "your own", text)
    for spec in known_models().values():
        if spec.mirror:
            yield Finding("models", spec.name, source_of(spec))


def check_settings() -> Iterator[Finding]:
    """Report the settings file and the kept conversations."""
    path = settings_file()
    stored = read_settings(path)
    text = f"{len(stored)} in {path}" if path.is_file() else f"none: there is no {path}"
    yield Finding("settings", "file", text)
    archive = archive_file()
    count = len(Archive(archive).summaries()) if archive.is_file() else 0
    yield Finding("settings", "kept chats", f"{count} in {archive}")


def check_defaults() -> Iterator[Finding]:
    """Report what a command without flags uses."""
    device = choose_device("auto")
    dtype = choose_dtype(device)
    first = "the first of cuda, mps and cpu that is present"
    yield Finding("default", "device", f"{device}: {first} (--device)")
    ability = "computes" if _dtype_name(dtype) == "bfloat16" else "does not compute"
    why = f"this {device.type} {ability} in bfloat16"
    yield Finding("default", "numbers", f"{_dtype_name(dtype)}: {why} (--dtype)")
    spec = resolve_model(None)
    quant = "16 bit" if spec.quant == "auto" else spec.quant
    text = f"{spec.name}, {quant}; large ones of `medusa-chat models` nf4 (--quant)"
    yield Finding("default", "model", text)
