"""Shared set-up: one thread (other work shares the cores), no network, a cache of step costs of our own."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="medusa-chat-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ["XDG_CONFIG_HOME"] = "/nonexistent"  # no models.yaml of whoever runs the tests
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a job behind `&`: what it starts would be deaf too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def backbone() -> Any:
    """A tiny Llama with random weights."""
    from tests.helpers.tiny import random_backbone

    return random_backbone()


@pytest.fixture(scope="module")
def greedy_text(backbone: Any) -> list[int]:
    """The tests' prompt and its vanilla greedy continuation."""
    from tests.helpers.tiny import NEW, PROMPT, make_engine, reply

    return PROMPT + reply(make_engine(backbone), PROMPT, mode="vanilla", max_new_tokens=NEW)
