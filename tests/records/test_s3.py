"""A store at s3://, against moto's server on this machine; where s3fs and moto are installed."""

from dataclasses import replace
from urllib.request import Request, urlopen

import pytest
from test_outcomes import RUN

from iimm_callbacks import append_outcome, read_outcomes
from iimm_callbacks.records import objects, store, table
from iimm_callbacks.records.store import check_store, open_store, retire, sync

pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

SECRET = "very secret"


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    import s3fs

    monkeypatch.setattr(store, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(table, "_folder", lambda: tmp_path / "tables")
    monkeypatch.setattr(objects, "_PAUSES", (0.0, 0.0))
    running = server.ThreadedMotoServer("127.0.0.1", 0)
    running.start()
    host, port = running.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "team")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"))
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket/team"
    s3fs.S3FileSystem.clear_instance_cache()
    running.stop()


def runs(n):
    return [replace(RUN, task=f"task {i}", run=f"{i}") for i in range(n)]


def test_outcomes_are_put_listed_and_read(bucket):
    for outcome in runs(3):
        append_outcome(bucket, outcome)
        append_outcome(bucket, outcome)
    assert sorted(read_outcomes(bucket), key=lambda o: o.run) == runs(3)
    assert check_store(bucket) == []
    retire(bucket, "1", "a test")
    assert {o.run for o in read_outcomes(bucket)} == {"0", "2"}


def test_its_table_is_brought_up_to_date(bucket, monkeypatch):
    monkeypatch.setattr(store, "_MANY", 1)
    for n in (2, 4):
        for outcome in runs(n):
            append_outcome(bucket, outcome)
        found = open_store(bucket)
        assert isinstance(found, table.Tabled)
        assert {o.run for o in found.relevant("1f")} == {str(i) for i in range(n)}


def test_without_a_bucket_outcomes_wait_and_sync_carries_them_over(bucket, tmp_path, caplog):
    import s3fs

    nowhere = "s3://another/team"
    append_outcome(nowhere, RUN)
    assert f"cannot write an outcome to {nowhere}" in caplog.text
    assert read_outcomes(nowhere) == [RUN]
    s3fs.S3FileSystem().mkdir("another")
    assert sync(nowhere, f"{tmp_path}/mine.jsonl") == (0, 1)
    assert not list((tmp_path / "cache").rglob("waiting/*.jsonl"))
    left = [path.read_text() for path in tmp_path.rglob("*.jsonl")]
    assert SECRET not in caplog.text + "".join(left)
