"""Progress of a download on the screen of a real terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.config import ModelSpec
from medusa_chat.terminal.downloads import Download
from tests.helpers.hub_checkpoints import serve
from tests.helpers.hub_server import hub_server
from tests.helpers.pseudo_terminal import CTRL_D, Terminal

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SPEC = ModelSpec(
    "v", "lmsys/vicuna-7b-v1.3", heads="FasterDecoding/medusa-vicuna-7b-v1.3@refs/pr/1"
)
BARS = """
import sys, time
from medusa_chat.terminal.downloads import downloads
with downloads() as show:
    for name in ("owner/first", "owner/second"):
        for there in (0, 500_000_000, 1_500_000_000):
            show(name, there, 1_500_000_000)
            time.sleep(0.4)
    show("owner/third", 5, 10)
    time.sleep(0.4)
print("after")
input()
"""


def test_the_chat_opens_at_once_and_shows_the_progress_of_the_download(tmp_path: Path) -> None:
    with hub_server() as server:
        serve(server, SPEC, tmp_path / "served")
        server.fault("/cdn/", pace=60_000, method="GET")
        model = ("--model", SPEC.backbone, "--heads", SPEC.heads or "")
        settings = "--device cpu --dtype float32 --tree chain-2 --max-new-tokens 8 --ignore-eos"
        environment = server.environment(tmp_path / "home", XDG_STATE_HOME=str(tmp_path))
        command = ("-m", "medusa_chat.cli", *model, *settings.split())
        chat = Terminal(*command, environment=environment)
        try:
            chat.see("downloading vicuna-7b-v1.3 · ")
            chat.say("Hi")
            chat.see("downloading medusa-vicuna-7b-v1.3 · ")
            text = chat.see(" s left")
            assert "kB/s · " in text
            chat.replies(1)
            assert "downloading" not in chat.text
            chat.send(CTRL_D)
            assert chat.status() == 0
        finally:
            chat.child.close(force=True)


def test_bars_follow_each_other_and_leave_nothing_behind() -> None:
    terminal = Terminal("-c", BARS)
    try:
        seen = terminal.see(lambda text: "first ━" in text and "0.5/1.5 GB" in text)
        assert "second" not in seen
        assert "first" not in terminal.see("second ━")
        assert "third ━" in terminal.see("5/10 bytes")
        assert "━" not in terminal.see("after")
    finally:
        terminal.child.close(force=True)


def test_the_speed_counts_only_bytes_of_this_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    download = Download("owner/name")
    download.update(5_000_000_000, 10_000_000_000)  # received by an earlier run
    assert (str(download), download.done) == ("name · 50% of 10.0 GB", False)
    now = 110.0
    download.update(5_100_000_000, 10_000_000_000)
    assert str(download) == "name · 51% of 10.0 GB · 10.0 MB/s · 8:10 left"
    now = 1000.0
    assert str(download).endswith("· 111.1 kB/s · 12:15:00 left")
    download.update(10_000_000_000, 10_000_000_000)
    assert download.done
