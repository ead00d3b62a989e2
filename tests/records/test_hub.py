"""A store at hf://datasets/org/name, against a small Hub on this machine."""

import base64
import hashlib
import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfFileSystem, constants, file_download
from test_outcomes import RUN

from iimm_callbacks import append_outcome, read_outcomes
from iimm_callbacks.records import objects, store
from iimm_callbacks.records.store import sync

PLACE, TOKEN = "hf://datasets/org/runs", "hf_very_secret"


class Hub(ThreadingHTTPServer):
    """One data set; `fails` answers the next requests of a kind: a status, or "drop" half-way."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.files, self.fails, self.asked = {}, {}, []


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, data=b"", **headers):
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", len(data))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if self.drops else data)
        self.close_connection = self.close_connection or self.drops

    def answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub = self.path.partition("?")[0], self.server
        kind = next((k for k in ("preupload", "commit", "tree", "resolve") if k in path), "info")
        hub.asked.append((kind, self.headers.get("Authorization")))
        failure = hub.fails[kind].pop(0) if hub.fails.get(kind) else None
        self.drops = failure == "drop"
        if isinstance(failure, int):
            return self.reply(failure, {"error": f"status {failure}"})
        return getattr(self, kind)(path, body)

    do_GET = do_POST = do_HEAD = answer

    def info(self, path, body):
        if "/org/runs" not in path:
            return self.reply(404, {"error": "none"}, X_Error_Code="RepoNotFound")
        return self.reply(200, {"id": "org/runs", "sha": "0" * 40, "private": False})

    def tree(self, path, body):
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
            for name, data in self.server.files.items()
        ]
        return self.reply(200, rows)

    def resolve(self, path, body):
        data = self.server.files.get(path.rpartition("/")[2])
        if data is None:
            return self.reply(404, {"error": "none"}, X_Error_Code="EntryNotFound")
        return self.reply(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"')

    def preupload(self, path, body):
        files = [f["path"] for f in json.loads(body)["files"]]
        told = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]
        return self.reply(200, {"files": told})

    def commit(self, path, body):
        rows = map(json.loads, body.splitlines())
        for value in (row["value"] for row in rows if row["key"] == "file"):
            self.server.files[value["path"]] = base64.b64decode(value["content"])
        url = f"https://huggingface.co/datasets/org/runs/commit/{'1' * 40}"
        return self.reply(200, {"commitUrl": url, "commitOid": "1" * 40, "success": True})


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # the latter before huggingface_hub 1
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(store, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(objects, "_PAUSES", (0.0, 0.0))
    HfFileSystem.clear_instance_cache()
    yield server
    HfFileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_outcomes_are_committed_listed_and_read(hub):
    append_outcome(PLACE, RUN)
    append_outcome(PLACE, RUN)
    assert len(hub.files) == 1
    assert read_outcomes(PLACE) == [RUN]
    asked = {kind: told for kind, told in hub.asked}
    assert asked["commit"] == asked["tree"] == asked["resolve"] == f"Bearer {TOKEN}"


def waiting(tmp_path):
    return list((tmp_path / "cache").rglob("waiting/*.jsonl"))


@pytest.mark.parametrize("failure", [503, "drop"])
def test_what_fails_half_way_is_tried_again(hub, failure, caplog):
    hub.fails = {"commit": [failure]}
    append_outcome(PLACE, RUN)
    assert len(hub.files) == 1
    hub.fails = {"tree": [failure], "resolve": [failure]}
    assert read_outcomes(PLACE) == [RUN]
    assert not [r for r in caplog.records if r.name.startswith("iimm") and r.levelno >= 30]


@pytest.mark.parametrize("failure", [503, 401, 403, 500, "drop"])
def test_what_cannot_be_committed_waits_and_is_carried_over(hub, failure, caplog, tmp_path):
    hub.fails = {"commit": [failure] * 99}
    append_outcome(PLACE, RUN)
    assert not hub.files or failure == "drop"
    tries = [kind for kind, _ in hub.asked].count("commit")
    assert tries == 1 if failure in (401, 403) else tries >= 3
    (told,) = [r for r in caplog.records if r.name.startswith("iimm") and r.levelno >= 30]
    assert f"cannot write an outcome to {PLACE}" in told.getMessage()
    assert len(waiting(tmp_path)) == 1
    assert read_outcomes(PLACE) == [RUN]
    hub.fails = {}
    other = replace(RUN, task="another")
    append_outcome(tmp_path / "mine.jsonl", other)
    assert sync(tmp_path / "mine.jsonl", PLACE) == (1, 1)
    assert len(hub.files) == 2
    assert not waiting(tmp_path)
    left = caplog.text + "".join(
        path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()
    )
    assert TOKEN not in left


@pytest.mark.parametrize("status", [401, 403, 503])
def test_what_cannot_be_read_is_an_error_with_the_reason(hub, status):
    append_outcome(PLACE, RUN)
    HfFileSystem.clear_instance_cache()
    hub.fails = {kind: [status] * 99 for kind in ("tree", "info")}
    with pytest.raises(OSError, match=f"cannot list the outcomes in {PLACE}: .*{status}"):
        read_outcomes(PLACE)


def test_a_data_set_that_is_not_there_is_empty_and_what_is_saved_waits(hub, tmp_path, caplog):
    place = "hf://datasets/org/none"
    assert read_outcomes(place) == []
    append_outcome(place, RUN)
    assert "org/none" in caplog.text
    assert len(waiting(tmp_path)) == 1
    assert read_outcomes(place) == [RUN]
