"""Downloads from a local server that speaks the hub's protocol, each in a fresh process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from medusa_chat.config import ModelSpec, UserError
from medusa_chat.hub import fetch as hub
from tests.helpers.full_disk import full_disk
from tests.helpers.gguf_files import write_gguf
from tests.helpers.hub_server import HubServer, hub_server
from tests.helpers.local_server import local_server
from tests.helpers.tiny import random_model

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent
OWN = "lmsys/vicuna-7b-v1.3"
WEIGHTS = os.urandom(200_000)
HEADS = os.urandom(50_000)
TEXTS = {
    "config.json": b"{}",
    "tokenizer.json": b'{"a": 1}',
    "generation_config.json": b"{}",
    "README.md": b"card",
    "LICENSE": b"terms",
    "additional_chat_templates/rag.jinja": b"x",
}
FETCH = """
import json, sys
from medusa_chat.config import ModelSpec, UserError
from medusa_chat.hub import fetch as hub
seen = []
try:
    files = hub.fetch(ModelSpec("m", *json.loads(sys.argv[1])), lambda *state: seen.append(state))
    heads = files.heads and str(files.heads)
    document = {"backbone": str(files.backbone), "heads": heads, "notices": files.notices}
except UserError as error:
    document = {"error": str(error)}
print(json.dumps(document | {"progress": seen[-1:], "states": len(seen)}))
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with hub_server() as made:
        made.add(
            OWN,
            TEXTS
            | {
                "model.safetensors": WEIGHTS,
                "pytorch_model.bin": b"no",
                "model.onnx": b"no",
                "onnx/model.json": b"no",
                "model.gguf": b"no",
                "training_args.bin": b"no",
            },
        )
        made.add(
            "owner/heads",
            {"config.json": b"{}", "medusa_lm_head.safetensors": HEADS, "medusa_lm_head.pt": b"no"},
        )
        yield made


class Client:
    """Runs `hub.fetch` in its own process, with the environment that a user would set."""

    def __init__(self, server: HubServer, home: Path) -> None:
        self.server, self.home = server, home

    def start(
        self, backbone: str = OWN, heads: str | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        settings = self.server.environment(self.home, **environment)
        command = [sys.executable, "-c", FETCH, json.dumps([backbone, heads])]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | settings,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.PIPE,
        )

    def fetch(
        self, backbone: str = OWN, heads: str | None = None, **environment: str
    ) -> dict[str, Any]:
        printed, errors = self.start(backbone, heads, **environment).communicate(timeout=60)
        assert not errors
        found: dict[str, Any] = json.loads(printed)
        assert "\n" not in found.get("error", "")
        return found


@pytest.fixture
def client(server: HubServer, tmp_path: Path) -> Client:
    return Client(server, tmp_path / "home")


def names(folder: str) -> set[str]:
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def test_only_what_is_needed_is_downloaded_once(client: Client) -> None:
    found = client.fetch(heads="owner/heads")
    assert names(found["backbone"]) == {*TEXTS, "model.safetensors"}
    assert (Path(found["backbone"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert names(found["heads"]) == {"config.json", "medusa_lm_head.safetensors"}
    assert found["progress"] == [["owner/heads", len(HEADS) + 2, len(HEADS) + 2]]
    client.server.requests.clear()
    again = client.fetch(heads="owner/heads")
    assert (again["backbone"], again["heads"], again["states"]) == (
        found["backbone"],
        found["heads"],
        0,
    )
    assert [path for _, path, _ in client.server.requests if "/resolve/" in path] == []


def test_an_index_names_the_shards_to_download(client: Client) -> None:
    shards = {f"pytorch_model-0000{i}-of-00002.bin": os.urandom(1000) for i in (1, 2)}
    index = json.dumps(
        {"weight_map": {f"w{i}": name for i, name in enumerate([*shards, *shards])}}
    ).encode()
    stray = {"pytorch_model-00003-of-00003.bin": b"no"}
    client.server.add(
        "owner/shards", TEXTS | shards | stray | {"pytorch_model.bin.index.json": index}
    )
    found = client.fetch("owner/shards")
    assert names(found["backbone"]) == {*TEXTS, *shards, "pytorch_model.bin.index.json"}
    assert client.fetch("owner/shards", HF_HUB_OFFLINE="1")["backbone"] == found["backbone"]
    (Path(found["backbone"]) / "pytorch_model-00002-of-00002.bin").unlink()
    assert "HF_HUB_OFFLINE" in client.fetch("owner/shards", HF_HUB_OFFLINE="1")["error"]
    client.server.repositories["owner/shards"]["main"].pop("pytorch_model-00002-of-00002.bin")
    assert "lacks pytorch_model-00002-of-00002.bin" in client.fetch("owner/shards")["error"]


@pytest.mark.parametrize(
    ("there", "kind", "taken"),
    [
        ("model.safetensors pytorch_model.bin", "backbone", "model.safetensors"),
        (
            "model.safetensors.index.json pytorch_model.bin",
            "backbone",
            "model.safetensors.index.json",
        ),
        ("pytorch_model.bin flax_model.msgpack tf_model.h5", "backbone", "pytorch_model.bin"),
        ("consolidated.safetensors model.gguf", "backbone", ""),
        ("model.safetensors medusa_lm_head.pt", "backbone", "model.safetensors medusa_lm_head.pt"),
        ("medusa_lm_head.pt", "backbone", ""),
        ("medusa_lm_head.pt medusa_lm_head.safetensors", "heads", "medusa_lm_head.safetensors"),
        ("medusa_lm_head.pt model.safetensors", "heads", "medusa_lm_head.pt"),
        ("model.safetensors rank0.safetensors", "heads", "model.safetensors"),
        (
            "rank0.safetensors rank1.safetensors onnx/a.safetensors",
            "heads",
            "rank0.safetensors rank1.safetensors",
        ),
    ],
)
def test_each_tensor_is_downloaded_in_one_form(there: str, kind: hub.Kind, taken: str) -> None:
    assert hub.weight_files(there.split(), kind) == taken.split()


def test_revisions(client: Client) -> None:
    client.server.add(
        "owner/heads", {"medusa_lm_head.safetensors": b"proposed"}, revision="refs/pr/1"
    )
    found = client.fetch(heads="owner/heads@refs/pr/1")
    assert (Path(found["heads"]) / "medusa_lm_head.safetensors").read_bytes() == b"proposed"
    commit = Path(found["backbone"]).name
    assert client.fetch(f"{OWN}@{commit}")["backbone"] == found["backbone"]
    client.server.add(OWN, TEXTS | {"model.safetensors": b"new"})
    moved = client.fetch()["backbone"]
    assert moved != found["backbone"]
    assert (
        client.server.fetched().count("config.json") == 0
    )  # unchanged files are linked, not fetched
    assert "has no revision 'v9'" in client.fetch(f"{OWN}@v9")["error"]


def test_offline(client: Client) -> None:
    assert f"lacks {OWN} or a part of it" in client.fetch(HF_HUB_OFFLINE="1")["error"]
    online = client.fetch(heads="owner/heads")
    offline = client.fetch(heads="owner/heads", HF_HUB_OFFLINE="1")
    assert offline == online | {"progress": [], "states": 0}


def test_a_hub_that_cannot_be_reached(client: Client) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    complaint = client.fetch(**nowhere)["error"]
    assert complaint.startswith(f"cannot reach http://127.0.0.1:9 for {OWN} (")
    assert "name a local folder" in complaint
    folder = client.fetch()["backbone"]
    found = client.fetch(**nowhere)
    assert found["backbone"] == folder
    assert [
        line.startswith("started from the cache: cannot reach") for line in found["notices"]
    ] == [True]


@pytest.mark.parametrize(
    "environment",
    [
        {"HTTP_PROXY": "gopher://127.0.0.1:9", "HTTPS_PROXY": "gopher://127.0.0.1:9"},
        {"HF_TOKEN": "hf_caf\xe9"},
        {"SSL_CERT_FILE": "/nonesuch/file.pem"},
    ],
)
def test_settings_with_which_no_hub_can_be_asked(
    client: Client, environment: dict[str, str]
) -> None:
    asked = environment | {"NO_PROXY": "", "no_proxy": ""}
    found = client.fetch(**asked)
    assert "cannot ask" in found["error"]
    assert "HTTPS_PROXY" in found["error"]
    assert "HF_HOME" not in found["error"]
    client.fetch()
    assert "error" not in client.fetch(**asked)  # from the cache


def test_a_dropped_connection_resumes_where_it_broke(client: Client) -> None:
    client.server.fault("/cdn/.*safetensors", drop=70_000, times=2)
    assert (Path(client.fetch()["backbone"]) / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [
        asked
        for method, path, asked in client.server.requests
        if method == "GET" and "/cdn/" in path
    ]
    assert ranges == ["", "bytes=70000-", "bytes=140000-"]


def test_a_broken_connection_is_one_line_and_the_next_run_resumes(
    client: Client,
) -> None:
    client.server.fault("/cdn/.*safetensors", drop=0, times=-1)
    client.server.faults.insert(
        0, type(client.server.faults[0])("/cdn/.*safetensors", drop=90_000, times=1)
    )
    complaint = client.fetch()["error"]
    assert f"broke at 90000 of 200000 bytes of {OWN}/model.safetensors" in complaint
    assert "goes on from" in complaint
    client.server.faults.clear()
    client.server.requests.clear()
    found = client.fetch()
    assert (Path(found["backbone"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert (
        next(asked for _, path, asked in client.server.requests if "/cdn/" in path)
        == "bytes=90000-"
    )


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_was_killed_resumes(client: Client, end: signal.Signals) -> None:
    client.server.fault("/cdn/.*safetensors", pace=20_000, method="GET", times=1)
    running = client.start()
    partial = client.home / "hub" / f"models--{OWN.replace('/', '--')}" / "blobs"
    until = time.monotonic() + 30
    while time.monotonic() < until and not any(
        file.stat().st_size > 20_000 for file in partial.glob("*.incomplete")
    ):
        time.sleep(0.05)
    running.send_signal(end)
    running.communicate(timeout=30)
    client.server.requests.clear()
    assert (Path(client.fetch()["backbone"]) / "model.safetensors").read_bytes() == WEIGHTS
    asked = next(asked for _, path, asked in client.server.requests if "/cdn/" in path)
    assert asked.startswith("bytes=")
    assert int(asked[6:-1]) > 20_000


def test_a_server_without_ranges_sends_everything_again(client: Client) -> None:
    client.server.fault("/cdn/.*safetensors", drop=70_000, times=1)
    client.server.fault("/cdn/.*safetensors", ignore_ranges=True)
    found = client.fetch()
    assert (Path(found["backbone"]) / "model.safetensors").read_bytes() == WEIGHTS
    assert found["progress"][0][1] == found["progress"][0][2]


@pytest.mark.parametrize(
    ("pattern", "fault", "words"),
    [
        (
            "/cdn/.*safetensors",
            {"corrupt": True},
            "model.safetensors of lmsys/vicuna-7b-v1.3 has another hash than the hub states",
        ),
        (
            "/cdn/.*safetensors",
            {"shorten": True},
            "has 100000 bytes, not the 200000 that the hub states",
        ),
        (
            "/resolve/.*tokenizer.json",
            {"corrupt": True},
            "tokenizer.json of lmsys/vicuna-7b-v1.3 has another hash than the hub states",
        ),
        ("/api/", {"status": 401, "error": "GatedRepo"}, "is gated: accept its licence at"),
        (
            "/cdn/.*safetensors",
            {"status": 403, "error": "GatedRepo"},
            "log in with `hf auth login`",
        ),
        (
            "/cdn/.*safetensors",
            {"status": 401},
            "refuses lmsys/vicuna-7b-v1.3 (401): accept its licence",
        ),
        (
            "/api/",
            {"status": 404, "error": "RepoNotFound"},
            "has no repository lmsys/vicuna-7b-v1.3, or it is private",
        ),
        ("/api/", {"status": 500}, "answered 500 for lmsys/vicuna-7b-v1.3: try again later"),
        ("/cdn/", {"status": 503}, "answered 503"),
        ("/cdn/", {"status": 429}, "limits the requests for lmsys/vicuna-7b-v1.3 (429)"),
    ],
)
def test_every_failure_is_one_line(
    client: Client, pattern: str, fault: dict[str, Any], words: str
) -> None:
    client.server.fault(pattern, **fault)
    assert words in client.fetch()["error"]
    client.server.faults.clear()
    assert "backbone" in client.fetch()  # and leaves nothing behind that would spoil the next run


def test_a_short_failure_of_the_hub_is_retried(client: Client) -> None:
    client.server.fault("/api/", status=502, times=1)
    client.server.fault("/cdn/", status=429, times=1)
    assert "backbone" in client.fetch()


def test_repositories_that_do_not_exist_or_hold_no_model(client: Client) -> None:
    assert "has no repository nobody/nothing" in client.fetch("nobody/nothing")["error"]
    client.server.add("owner/gguf", {"config.json": b"{}", "model.gguf": b"x"})
    assert "owner/gguf has no weights that can be read" in client.fetch("owner/gguf")["error"]
    assert "it has config.json, model.gguf" in client.fetch("owner/gguf")["error"]
    assert (
        "owner/gguf has no medusa_lm_head.safetensors" in client.fetch(heads="owner/gguf")["error"]
    )


def test_a_gguf_file_of_a_repository_by_its_quantization(client: Client, tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "m-F32.gguf", random_model(vocabulary=260))
    first = write_gguf(tmp_path / "m-Q8_0.gguf", random_model(vocabulary=260), "x", "Q8_0", 2)
    parts = [first, first.with_name(first.name.replace("00001-of", "00002-of"))]
    files = {file.name: file.read_bytes() for file in (whole, *parts)}
    client.server.add("owner/quants", files | {"config.json": b"{}"})
    settings = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    found = client.fetch("owner/quants:q8_0", **settings)
    assert client.server.fetched() == [part.name for part in parts]
    pointer = json.loads((Path(found["backbone"]) / "gguf.json").read_text())
    assert Path(pointer["file"]).name == first.name
    offline = settings | {"HF_HUB_OFFLINE": "1"}
    assert client.fetch("owner/quants:Q8_0", **offline)["backbone"] == found["backbone"]
    assert "HF_HUB_OFFLINE" in client.fetch("owner/quants:F32", **offline)["error"]
    assert "has no GGUF file Q5_0; it has F32, Q8_0" in client.fetch("owner/quants:Q5_0")["error"]


def test_a_cache_that_cannot_be_written(client: Client, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    complaint = client.fetch(HF_HOME=str(tmp_path / "file"))["error"]
    assert complaint.startswith(f"cannot download {OWN} into {tmp_path / 'file'}")
    assert "set HF_HOME" in complaint


def test_a_full_disk(client: Client) -> None:
    with full_disk() as limit:
        limit(100_000)  # inherited by the process
        complaint = client.fetch()["error"]
    assert complaint.startswith(f"cannot download {OWN}")
    assert "the disk is full; make room, or set HF_HOME" in complaint
    assert "backbone" in client.fetch()


def test_a_small_disk_is_reported_before_the_download(client: Client) -> None:
    described = client.server.repositories[OWN]["main"]
    described["model.safetensors"] = type("Huge", (bytes,), {"__len__": lambda _: 10**18})(b"x")
    assert "needs 1000000000.0 GB more" in client.fetch()["error"]
    assert client.server.fetched() == []


def test_local_paths_need_no_hub(tmp_path: Path) -> None:
    (tmp_path / "heads.pt").touch()
    files = hub.fetch(ModelSpec("m", str(tmp_path), heads=str(tmp_path / "heads.pt")))
    assert (files.backbone, files.heads, files.notices) == (tmp_path, tmp_path / "heads.pt", ())
    for spec, words in (
        (ModelSpec("m", "absent"), "there is no model at absent: no such file or folder"),
        (ModelSpec("m", str(tmp_path), heads="./a/b"), "there are no Medusa heads at ./a/b"),
        (ModelSpec("m", str(tmp_path), heads="absent/"), "there are no Medusa heads at absent/"),
        (ModelSpec("m", str(tmp_path), heads="a b/c"), "'a b/c' is no hub id"),
    ):
        with pytest.raises(UserError, match=words):
            hub.fetch(spec)


def test_places_of_measured_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "heads.safetensors").touch()
    kept = [
        hub.accuracy_file(spec)
        for spec in (
            ModelSpec("m", "o/n@v1"),
            ModelSpec("m", "o/n", heads="o/heads"),
            ModelSpec("m", str(tmp_path)),
            ModelSpec("m", "o/n", heads=str(tmp_path / "heads.safetensors")),
        )
    ]
    ours = tmp_path / "data" / "medusa-chat" / "accuracy"
    assert [file.parent for file in kept] == [
        ours / "o--n@v1",
        ours / "o--heads",
        tmp_path,
        tmp_path,
    ]


def test_heads_in_a_folder_of_their_own(client: Client) -> None:
    """As medusa-chat writes them; from the cache too."""
    own = "medusa_heads/medusa_lm_head.safetensors"
    files = {"config.json": b"{}", own: HEADS, "model.safetensors": WEIGHTS}
    client.server.add("owner/both", files)
    for offline in ("0", "1"):
        found = client.fetch("owner/both", "owner/both", HF_HUB_OFFLINE=offline)
        assert names(found["heads"]) == names(found["backbone"]) == set(files)


def test_a_hub_that_answers_with_a_page(client: Client) -> None:
    class Page(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please log in to this network</html>")

        do_HEAD = do_GET  # noqa: N815

    with local_server(Page) as url:
        line = client.fetch(HF_ENDPOINT=url)["error"]
    assert line.startswith("cannot ask http://127.0.0.1")
    assert "check HF_ENDPOINT" in line
