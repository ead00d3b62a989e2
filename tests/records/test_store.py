"""Outcomes in files: what goes in comes out, whoever writes at once, dies or damages a line."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from filelock import FileLock
from hypothesis import given, settings
from pyarrow import parquet
from test_outcomes import PUBLISHED, RUN, outcomes

from iimm_callbacks import append_outcome, read_outcomes, sample
from iimm_callbacks.records import store
from iimm_callbacks.records.as_dataset import from_dataset, to_dataset
from iimm_callbacks.records.by_hand import read_csv
from iimm_callbacks.records.store import as_outcomes, check_store, default_store

STOPPED = replace(RUN, complete=False, ended="stopped", standard_error=0.01)


def line_with(**changes):
    return json.dumps(asdict(RUN) | changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "outcomes.jsonl"


# --- JSON lines ---


def test_outcomes_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new folder" / "outcomes.jsonl"
    append_outcome(path, RUN)
    append_outcome(str(path), STOPPED)
    append_outcome(path, PUBLISHED)
    assert read_outcomes(path) == [RUN, STOPPED, PUBLISHED]
    assert check_store(path) == []
    assert as_outcomes(path) == as_outcomes(str(path)) == [RUN, STOPPED, PUBLISHED]
    assert as_outcomes(iter([RUN, STOPPED])) == [RUN, STOPPED]
    assert as_outcomes(None) == []


def test_the_shipped_record_is_sound(caplog):
    assert len(sample.load_outcomes()) >= 20
    assert caplog.messages == []


DAMAGED = [
    (line_with()[:40], "line 1 column 41"),  # cut short by a crash
    ("not JSON", "Expecting value"),
    ("[1, 2]", "expected a JSON object, got list"),
    ("[" * 100_000, "nested too deep"),
    ('{"schema_version": 1, "model": "only"}', "`model_fingerprint` is missing"),
    ('{"loss": 0.1}', "not an outcome record: no `schema_version`"),
    (line_with(schema_version=3), "newer version of iimm_callbacks (schema 3; this one reads 2)"),
    (line_with(inter=float("nan")), "`inter` must be a number in [-1, 1], got nan"),
    (line_with(off_target_after={}), "different tasks"),
]


@pytest.mark.parametrize(("line", "says"), DAMAGED)
def test_a_line_that_is_no_outcome_is_skipped_and_named(path, caplog, line, says):
    path.write_text("\n".join([line_with(), "", line, line_with()]) + "\n")
    with caplog.at_level(logging.WARNING):
        assert read_outcomes(path) == [RUN, RUN]
    (message,) = caplog.messages
    assert message.startswith(f"{path} line 3 is not an outcome and is skipped: ")
    assert says in message


def test_checking_returns_what_reading_would_report_and_logs_nothing(path, caplog):
    path.write_text("\n".join([line for line, _ in DAMAGED] + [line_with()]) + "\n")
    problems = check_store(path)
    assert caplog.messages == []
    assert len(problems) == len(DAMAGED)
    for number, (problem, (_, says)) in enumerate(zip(problems, DAMAGED, strict=True), start=1):
        assert problem.startswith(f"line {number}: ")
        assert says in problem


def test_bytes_that_are_no_text_are_damage_wherever_they_stand(path):
    broken = line_with(task="d?").encode().replace(b"d?", b"d\xff")
    path.write_bytes(b"\x00\xff\xfe\x80\n" + broken + b"\n" + line_with().encode() + b"\n")
    assert read_outcomes(path) == [RUN]
    first, second = check_store(path)
    assert first.startswith("line 1: ")
    assert second == r"line 2: `task` must be a string in UTF-8, got 'd\udcff'"


def test_a_torn_last_line_does_not_take_the_next_outcome_with_it(path):
    path.write_text(line_with() + "\n" + line_with()[:40])
    append_outcome(path, RUN)
    assert read_outcomes(path) == [RUN, RUN]
    (problem,) = check_store(path)
    assert problem.startswith("line 2: ")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"iimm": float("nan")}, "cannot be saved: Out of range float values"),
        ({"recipe": {"dtype": object()}}, "cannot be saved: Object of type object"),
        ({"final_accuracy": 90.0}, r"cannot be saved: `final_accuracy` must .* got 90\.0"),
    ],
)
def test_what_could_not_be_read_back_is_never_written(path, changes, says):
    with pytest.raises(ValueError, match=says):
        append_outcome(path, replace(RUN, **changes))
    with pytest.raises(ValueError, match=says):
        to_dataset([replace(RUN, **changes)])
    assert not path.exists()


def test_what_is_no_outcome_is_refused_by_type():
    with pytest.raises(TypeError, match="must hold Outcome records, got dict"):
        as_outcomes([asdict(RUN)])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        read_outcomes("nowhere.jsonl")


# --- many writers, dying writers, read-only disks ---


@pytest.fixture(scope="module")
def processes():
    """Real processes that start soon: forked from one that has imported the slow libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["iimm_callbacks", "datasets", "hypothesis", "pytest"])
    return context


def append_several(path, worker, start):
    start.wait(timeout=60)
    for i in range(6):
        append_outcome(path, replace(RUN, task=f"{worker}-{i}"))


def append_forever(path, first, done):
    for i in range(first, first + 100_000):
        append_outcome(path, replace(RUN, task=str(i)))
        done.send(i)


class _Dying:
    """An open file whose process is killed once `cut` bytes of a line are written."""

    def __init__(self, file, cut):
        self.file, self.cut = file, cut

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: self.cut])
        self.file.flush()
        os.kill(os.getpid(), signal.SIGKILL)


def append_one_and_die_in_the_next(path, cut):
    append_outcome(path, RUN)
    plain = Path.open
    Path.open = lambda self, mode: _Dying(plain(self, mode), cut)
    append_outcome(path, STOPPED)


def test_eight_processes_at_once_lose_no_outcome(path, processes):
    start = processes.Barrier(8)
    workers = [processes.Process(target=append_several, args=(path, w, start)) for w in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert check_store(path) == []
    tasks = [outcome.task for outcome in read_outcomes(path)]
    assert sorted(tasks) == sorted(f"{w}-{i}" for w in range(8) for i in range(6))
    for w in range(8):  # each in its own order
        assert [t for t in tasks if t.startswith(f"{w}-")] == [f"{w}-{i}" for i in range(6)]


def test_who_appends_waits_for_whoever_is_at_it(path):
    writers = [threading.Thread(target=append_outcome, args=(path, RUN)) for _ in range(8)]
    with FileLock(f"{path}.lock"):
        for writer in writers:
            writer.start()
        time.sleep(0.3)
        assert not path.exists()
    for writer in writers:
        writer.join(timeout=60)
    assert read_outcomes(path) == [RUN] * 8


def test_a_lock_that_is_never_released_is_told_with_its_file(path, monkeypatch):
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.1)
    with (
        FileLock(f"{path}.lock"),
        pytest.raises(TimeoutError, match=rf"append to {path}: others have held {path}\.lock for"),
    ):
        append_outcome(path, RUN)


def test_a_writer_killed_within_a_line_costs_this_line_only(path, processes):
    whole = len(line_with(complete=False, ended="stopped", standard_error=0.01).encode())
    torn = 0
    for round_, cut in enumerate([1, 7, whole // 2, whole - 1, 0, whole, whole + 1], start=1):
        writer = processes.Process(target=append_one_and_die_in_the_next, args=(path, cut))
        writer.start()
        writer.join(timeout=60)
        assert writer.exitcode == -signal.SIGKILL
        torn += 0 < cut < whole  # the line break alone may be lost
        read = read_outcomes(path)
        assert len(check_store(path)) == torn
        assert read.count(RUN) == round_
        assert read.count(STOPPED) == len(read) - round_ == (cut >= whole) + (cut > whole)
    append_outcome(path, RUN)
    assert read_outcomes(path)[-1] == RUN


def test_whatever_was_appended_before_a_kill_is_saved(path, processes):
    finished = []
    for round_ in range(6):
        receiver, sender = processes.Pipe(duplex=False)
        first = round_ * 100_000
        writer = processes.Process(target=append_forever, args=(path, first, sender))
        writer.start()
        sender.close()
        finished.append(receiver.recv())
        time.sleep(0.01 * round_)
        writer.kill()
        writer.join(timeout=60)
        with suppress(EOFError):
            while True:
                finished.append(receiver.recv())
        receiver.close()
    tasks = [int(outcome.task) for outcome in read_outcomes(path)]
    assert tasks == sorted(set(tasks))
    assert set(finished) <= set(tasks)
    assert len(tasks) - len(finished) + len(check_store(path)) <= 6  # one unconfirmed for each kill


@pytest.fixture
def read_only(monkeypatch):
    """A disk on which nothing can be made, even by root."""

    def refuse(name, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(name))

    monkeypatch.setattr(os, "open", refuse)  # how the lock file is made
    monkeypatch.setattr(os, "mkdir", refuse)


def test_a_read_only_store_is_read_but_not_appended_to(path, request):
    path.write_text(line_with() + "\n")
    request.getfixturevalue("read_only")
    assert read_outcomes(path) == [RUN]
    assert check_store(path) == []
    with pytest.raises(OSError, match=rf"Read-only file system\): '{path}'") as caught:
        append_outcome(path, RUN)
    assert caught.value.errno == errno.EROFS
    assert caught.value.filename == str(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["outcomes.jsonl"]


def test_a_store_below_a_file_is_told_with_its_path(path):
    path.write_text("")
    with pytest.raises(OSError, match=rf"cannot append an outcome .*{path}/below\.jsonl"):
        append_outcome(path / "below.jsonl", RUN)


# --- where ---


def test_the_default_store_is_where_the_variable_says(monkeypatch):
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", "runs/mine.jsonl")
    assert default_store() == Path("runs/mine.jsonl")
    monkeypatch.setenv("IIMM_CALLBACKS_STORE", "~/mine.jsonl")
    assert default_store() == Path.home() / "mine.jsonl"


@pytest.mark.parametrize("value", [None, ""])
def test_the_default_store_is_else_in_the_users_cache_and_is_not_made(monkeypatch, tmp_path, value):
    if value is None:
        monkeypatch.delenv("IIMM_CALLBACKS_STORE", raising=False)
    else:
        monkeypatch.setenv("IIMM_CALLBACKS_STORE", value)
    monkeypatch.setattr(store, "user_cache_path", lambda name: tmp_path / "cache" / name)
    assert default_store() == tmp_path / "cache" / "iimm_callbacks" / "outcomes.jsonl"
    assert list(tmp_path.iterdir()) == []


# --- datasets ---


@pytest.mark.parametrize("runs", [[], [RUN], [RUN, STOPPED, PUBLISHED]])
def test_a_saved_dataset_gives_the_same_outcomes(tmp_path, runs):
    dataset = to_dataset(iter(runs))
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "saved.parquet")
    assert from_dataset(dataset) == as_outcomes(dataset) == runs
    assert as_outcomes(tmp_path / "saved") == read_outcomes(str(tmp_path / "saved")) == runs
    assert check_store(tmp_path / "saved") == []
    again = Dataset(parquet.read_table(tmp_path / "saved.parquet"))
    assert again.features == dataset.features
    assert from_dataset(again) == runs


@settings(max_examples=30, deadline=None)
@given(outcomes())
def test_any_outcome_survives_a_dataset(outcome):
    assert from_dataset(to_dataset([outcome, RUN])) == [outcome, RUN]


def test_numbers_can_be_filtered_and_dicts_are_json(caplog):
    dataset = to_dataset([RUN, PUBLISHED])
    assert dataset.column_names == list(asdict(RUN))
    kinds = {name: feature.dtype for name, feature in dataset.features.items()}
    assert {kinds[n] for n in ("iimm", "standard_error", "final_accuracy")} == {"float64"}
    assert {kinds[n] for n in ("n_images", "n_classes", "schema_version")} == {"int64"}
    assert (kinds["complete"], kinds["task"], kinds["recipe"]) == ("bool", "string", "string")
    assert dataset["iimm"][:] == [0.4, None]
    assert json.loads(dataset[0]["off_target_after"]) == RUN.off_target_after


def test_a_dataset_from_before_the_linear_probe_still_loads():
    newer = [n for n in asdict(RUN) if n.startswith("linear_probe_")] + ["n_train", "images"]
    table = to_dataset([RUN, PUBLISHED]).remove_columns(newer)
    before = {name: getattr(PUBLISHED, name) for name in newer}
    assert from_dataset(table) == [replace(RUN, **before), PUBLISHED]


def test_a_damaged_row_is_skipped_and_named(tmp_path, caplog):
    rows = to_dataset([RUN] * 4).to_list()
    rows[1]["recipe"] = "{'single': 'quotes'}"
    rows[2] |= {"final_accuracy": 90.0, "trajectory": None}
    rows[3]["final_accuracy"] = 63.0
    dataset = Dataset.from_list(rows)
    with caplog.at_level(logging.WARNING):
        assert from_dataset(dataset.with_format("numpy")) == [RUN]
    first, second, third = caplog.messages
    assert "row 1 (from 0) is not an outcome and is skipped: `recipe` must be a JSON" in first
    assert "row 2 (from 0) is not an outcome and is skipped: `trajectory` must be a JS" in second
    assert "row 3 (from 0)" in third
    dataset.save_to_disk(tmp_path / "saved")
    assert [problem[:14] for problem in check_store(tmp_path / "saved")] == [
        f"row {n} (from 0)" for n in (1, 2, 3)
    ]
    lacking = to_dataset([RUN]).remove_columns("method")
    caplog.clear()
    assert from_dataset(lacking) == []
    assert "`method` is missing" in caplog.text


def test_several_splits_are_refused(tmp_path):
    splits = DatasetDict({"train": to_dataset([RUN])})
    with pytest.raises(TypeError, match=r"got DatasetDict; of several splits pass one"):
        from_dataset(splits)
    splits.save_to_disk(tmp_path / "splits")
    with pytest.raises(TypeError, match="got DatasetDict"):
        as_outcomes(tmp_path / "splits")


# --- CSV ---

HEADER = "model,method,task,zero_shot_accuracy,final_accuracy"


def csv_file(tmp_path, *lines, encoding="utf-8"):
    (tmp_path / "runs.csv").write_bytes(("\r\n".join(lines) + "\r\n").encode(encoding))
    return tmp_path / "runs.csv"


def test_five_columns_are_enough(tmp_path, path):
    (outcome,) = read_csv(csv_file(tmp_path, HEADER, "my/clip,full,cars,0.6,0.78"))
    assert (outcome.model, outcome.method, outcome.task) == ("my/clip", "full", "cars")
    assert outcome.gain == pytest.approx(0.18)
    assert outcome.source == "added by hand"
    unknown = (outcome.iimm, outcome.inter, outcome.intra, outcome.standard_error)
    assert (*unknown, outcome.n_images, outcome.n_classes) == (None,) * 6
    assert (outcome.model_fingerprint, outcome.task_fingerprint) == ("", "")
    assert (outcome.off_target_before, outcome.recipe, outcome.complete) == ({}, {}, True)
    append_outcome(path, outcome)
    assert read_outcomes(path) == from_dataset(to_dataset([outcome])) == [outcome]


def test_all_columns_are_read_and_empty_cells_are_unknown(tmp_path):
    header = (
        " task ,model,method,final_accuracy,zero_shot_accuracy,iimm,inter,intra,n_images,n_classes,"
        "learning_rate,steps,batch_size,model_fingerprint,task_fingerprint,"
        "before:dogs,after:dogs,after:a:b,before:a:b,"
        "n_train,linear_probe_accuracy,linear_probe_standard_error,linear_probe_n_train,run"
    )
    first = (
        '"cars, old",m,lora, 0.9 ,0,.4,.2,.6,512,10,1e-4,120,32,1f,2e,0.5,0.4,1,0.25,'
        "800,0.7,0.02,512,the first"
    )
    second = "größe,m,lora,1,0.5" + 19 * ","
    path = csv_file(tmp_path, header, first, "", ",,,,", second, encoding="utf-8-sig")
    one, two = read_csv(str(path))
    assert (one.task, one.zero_shot_accuracy, one.final_accuracy) == ("cars, old", 0.0, 0.9)
    assert (one.iimm, one.inter, one.intra, one.n_images, one.n_classes) == (0.4, 0.2, 0.6, 512, 10)
    assert one.recipe == {"learning_rate": 1e-4, "steps": 120, "batch_size": 32}
    assert (one.model_fingerprint, one.task_fingerprint) == ("1f", "2e")
    assert one.off_target_before == {"dogs": 0.5, "a:b": 0.25}
    assert one.off_target_after == {"dogs": 0.4, "a:b": 1.0}
    assert (two.task, two.final_accuracy, two.off_target_before) == ("größe", 1.0, {})
    assert (one.n_train, one.linear_probe_accuracy, one.run) == (800, 0.7, "the first")
    assert (one.linear_probe_standard_error, one.linear_probe_n_train) == (0.02, 512)
    assert (two.recipe, two.iimm, two.n_images) == ({}, None, None)
    assert (two.n_train, two.linear_probe_accuracy, two.trajectory) == (None, None, [])


def test_looks_are_columns_of_quantity_and_share(tmp_path, path):
    looks = "gain@0.5,gain@0.1,forgetting@0.1,worst@0.1,gain_se@0.1,training_loss@0.5,iimm@0.5"
    one = "m,full,cars,0.6,0.78,0.15,-0.02,0.01,0.04,0.005,1.5,0.3"
    two = "m,full,dogs,0.6,0.78,,0.02,,,,,"
    other = "m,full,birds,0.6,0.78,,,,,,,"
    found = read_csv(csv_file(tmp_path, f"{HEADER},{looks}", one, two, other))
    assert [outcome.trajectory for outcome in found] == [
        [
            {"share": 0.1, "gain": -0.02, "forgetting": 0.01, "worst": 0.04, "gain_se": 0.005},
            {"share": 0.5, "gain": 0.15, "training_loss": 1.5, "iimm": 0.3},
        ],
        [{"share": 0.1, "gain": 0.02}],
        [],
    ]
    append_outcome(path, found[0])
    assert read_outcomes(path) == from_dataset(to_dataset(found[:1])) == found[:1]


def test_a_table_of_looks_becomes_these_columns_as_the_docstring_says(tmp_path):
    pandas = pytest.importorskip("pandas")
    runs = pandas.DataFrame(
        [["a", "m", "full", "cars", 0.6, 0.78], ["b", "m", "full", "dogs", 0.5, 0.6]],
        columns=["run", *HEADER.split(",")],
    )
    looks = pandas.DataFrame(
        {"run": ["a", "a", "b"], "share": [0.1, 0.5, 0.5], "gain": [0.02, 0.1, 0.05],
         "forgetting": [0.0, 0.01, 0.02]}
    )  # fmt: skip
    wide = looks.pivot(index="run", columns="share", values=["gain", "forgetting"])
    wide.columns = [f"{quantity}@{share}" for quantity, share in wide.columns]
    runs.join(wide, on="run").to_csv(tmp_path / "runs.csv", index=False)
    one, two = read_csv(tmp_path / "runs.csv")
    assert (one.run, two.run) == ("a", "b")
    assert one.trajectory == [
        {"share": 0.1, "gain": 0.02, "forgetting": 0.0},
        {"share": 0.5, "gain": 0.1, "forgetting": 0.01},
    ]
    assert two.trajectory == [{"share": 0.5, "gain": 0.05, "forgetting": 0.02}]


@pytest.mark.parametrize(
    ("extra", "cells", "says"),
    [
        ("", "m,full,cars,0.6,63", r"column `final_accuracy` .* got '63'; write 0.63 for 63 %"),
        ("", "m,full,cars,63 %,0.7", r"`zero_shot_accuracy` .* '63 %'; write 0.63 for 63 %"),
        ("", "m,full,cars,0.5%,0.7", r"`zero_shot_accuracy` .* '0.5%'; write 0.63 for 63 %"),
        ("", "m,full,cars,-0.1,0.7", r"`zero_shot_accuracy` must be a fraction in \[0, 1\]"),
        ("", "m,full,cars,nan,0.7", r"`zero_shot_accuracy` must be a fraction in \[0, 1\], got 'n"),
        ("", 'm,full,cars,"0,6",0.7', r"`zero_shot_accuracy` must be a number such as 0.63, got"),
        ("", "m,full,,0.6,0.7", r"column `task` is empty"),
        ("", "m,full,cars,0.6,", r"column `final_accuracy` is empty"),
        ("", "m,full,cars,0.6", r"column `final_accuracy` is empty"),
        ("", "m,full,big, red,0.6,0.7", r"has 1 cells more than the header; quote"),
        ("", 'm,full,"cars,0.6,0.7', r"unexpected end of data"),
        (",iimm", "m,full,cars,0.6,0.7,1.5", r"`iimm` must be a number in \[-1, 1\], got 1.5"),
        (",n_images", "m,full,cars,0.6,0.7,1.5", r"`n_images` must be a whole number, got '1.5'"),
        (",n_images", "m,full,cars,0.6,0.7,-5", r"`n_images` must be a whole number from 0"),
        (",steps", "m,full,cars,0.6,0.7,-5", r"`steps` must be a finite number from 0, got '-5'"),
        (",learning_rate", "m,full,cars,0.6,0.7,inf", r"`learning_rate` must be a finite number"),
        (",before:x,after:x", "m,full,cars,0.6,0.7,0.5,", r"fill both `before:x` and `after:x`"),
        (",before:x,after:x", "m,full,cars,0.6,0.7,,0.5", r"fill both `before:x` and `after:x`"),
        (",before:x,after:x", "m,full,cars,0.6,0.7,50,0.5", r"`before:x` .* write 0.63 for 63 %"),
        (
            ",before:cars,after:cars",
            "m,full,cars,0.6,0.7,0.6,0.7",
            r"`before:cars`: leave it empty",
        ),
        (
            ",gain@0.1",
            "m,full,cars,0.6,0.7,12",
            r"`gain@0.1` must be a number in \[-1, 1\], got 12",
        ),
        (",gain@0.1", "m,full,cars,0.6,0.7,12%", r"`gain@0.1` must be a number such as .* '12%'"),
        (",gain@0.1,gain_se@0.1", "m,full,cars,0.6,0.7,0,-1", r"`gain_se@0.1` must be .* got -1"),
        (",worst@0.1", "m,full,cars,0.6,0.7,0.2", r"`gain@0.1` is missing or empty, where `worst@"),
        (
            ",gain@0.1,worst_se@0.1",
            "m,full,cars,0.6,0.7,0.2,0.1",
            r"`worst@0.1` is missing or empty, where `worst_se@0.1` is not; fill both, or neither",
        ),
        (",n_train", "m,full,cars,0.6,0.7,many", r"`n_train` must be a whole number, got 'many'"),
        (
            ",linear_probe_accuracy",
            "m,full,cars,0.6,0.7,71",
            r"`linear_probe_accuracy` must be a fraction in \[0, 1\], got 71",
        ),
    ],
)
def test_a_bad_cell_is_named_by_file_line_and_column(tmp_path, extra, cells, says):
    good = "m,full,dogs,0.5,0.6" + "," * extra.count(",")
    path = csv_file(tmp_path, HEADER + extra, good, cells)
    with pytest.raises(ValueError, match=rf"^{path} line 3: .*{says}"):
        read_csv(path)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ("model,method,task,zero_shot_accuracy", "column `final_accuracy` is missing"),
        (HEADER.replace(",", ";"), "unknown column `model;method;.*with commas between them"),
        (f"{HEADER},n_image", "unknown column `n_image`; expected batch_size"),
        (f"{HEADER},before:x", "column `before:x` needs a column `after:x`"),
        (f"{HEADER},after:x", "column `after:x` needs a column `before:x`"),
        (f"{HEADER},before:,after:", "unknown column `before:`"),
        (f"{HEADER},during:x", "unknown column `during:x`"),
        (f"{HEADER},task", "column `task` is there twice"),
        (f"{HEADER},loss@0.1", "unknown column `loss@0.1`; expected .* a quantity of gain, "),
        (
            f"{HEADER},gain@10",
            r"column `gain@10`: .* must be a fraction in \[0, 1\], got '10'; write",
        ),
        (f"{HEADER},gain@10%", r"column `gain@10%`: .* got '10%'; write gain@0.1 for 10 %"),
        (f"{HEADER},gain@", "column `gain@`: the share of the steps after @ must be a fraction"),
        (f"{HEADER},gain@nan", "column `gain@nan`: the share"),
        (f"{HEADER},gain@0.1,gain@.10", "columns `gain@0.1` and `gain@.10` are the same"),
    ],
)
def test_a_bad_header_is_named(tmp_path, header, says):
    with pytest.raises(ValueError, match=rf"^{tmp_path}/runs\.csv line 1: {says}"):
        read_csv(csv_file(tmp_path, header))


def test_an_empty_file_lacks_its_header_and_latin_1_is_told(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ValueError, match="column `model` is missing"):
        read_csv(tmp_path / "empty.csv")
    latin = csv_file(tmp_path, HEADER, "m,full,größe,0.5,0.6", encoding="latin-1")
    with pytest.raises(ValueError, match="line 2: `task` must be a string in UTF-8"):
        read_csv(latin)
    assert read_csv(csv_file(tmp_path, HEADER)) == []
