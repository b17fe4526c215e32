"""Set-up of all tests: one thread, no network, a temporary cache of step costs."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from typing import TYPE_CHECKING

import pytest

from medusa_chat.native import build
from tests.helpers.native_library import no_compiler

if TYPE_CHECKING:
    from medusa_chat.model.backbone import Backbone

os.environ.setdefault("OMP_NUM_THREADS", "1")  # other work may share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="medusa-chat-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["XDG_DATA_HOME"] = os.environ["XDG_CACHE_HOME"]  # kept conversations
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"  # ignores the models.yaml of the user
# A shell starts a job with `&` so that it ignores Ctrl-C, and its children would too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def native_library() -> None:
    """Build the native library if its sources changed: no test runs on a missing or stale one."""
    if no_compiler() is None:
        build.build(build.LIBRARY_FOLDER)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """A tiny Llama with random weights."""
    from tests.helpers.tiny import random_backbone

    return random_backbone()


@pytest.fixture(scope="module")
def greedy_text(backbone: Backbone) -> list[int]:
    """The tests' prompt and its vanilla greedy continuation."""
    from tests.helpers.tiny import NEW, PROMPT, make_engine, reply

    return PROMPT + reply(
        make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=NEW
    )
