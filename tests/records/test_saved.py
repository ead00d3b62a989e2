"""A folder that `datasets` saved: its rows as they are stored, and nothing outside of it."""

import json

import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from test_outcomes import PUBLISHED, RUN

from iimm_callbacks import read_outcomes
from iimm_callbacks.records.as_dataset import check_names, from_dataset, read_table, to_dataset
from iimm_callbacks.records.store import as_outcomes, check_store


@pytest.fixture
def folder(tmp_path):
    to_dataset([RUN, PUBLISHED]).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_rows_are_those_that_were_saved(folder):
    assert read_table(folder).to_pylist() == to_dataset([RUN, PUBLISHED]).to_list()
    to_dataset([]).save_to_disk(folder.parent / "none")
    assert read_outcomes(folder.parent / "none") == []
    to_dataset([RUN, PUBLISHED, RUN]).save_to_disk(folder.parent / "shards", num_shards=2)
    assert read_outcomes(folder.parent / "shards") == [RUN, PUBLISHED, RUN]
    check_names(folder)


@pytest.mark.parametrize(
    "name", ["../other/data-00000-of-00001.arrow", "/etc/hostname", "..", "", ".", "a\\b", "a\0", 5]
)
def test_a_file_outside_of_the_folder_is_refused_by_its_name(folder, name):
    to_dataset([RUN]).save_to_disk(folder.parent / "other")
    change(folder / "state.json", _data_files=[{"filename": name}])
    for read in (read_outcomes, check_store, as_outcomes, read_table, check_names):
        with pytest.raises(ValueError, match=r"state\.json is not one that") as caught:
            read(folder)
        assert "`_data_files[0]['filename']` must be " in str(caught.value)
        assert str(caught.value).endswith(f", got {name!r}")


def test_a_split_outside_of_the_folder_is_refused_by_its_name(tmp_path, folder):
    DatasetDict({"train": to_dataset([RUN])}).save_to_disk(tmp_path / "splits")
    check_names(tmp_path / "splits")
    with pytest.raises(TypeError, match="got DatasetDict; of several splits name the folder of"):
        read_table(tmp_path / "splits")
    change(tmp_path / "splits" / "train" / "state.json", _data_files=[{"filename": "../x"}])
    with pytest.raises(ValueError, match=r"train/state\.json .* got '\.\./x'"):
        check_names(tmp_path / "splits")
    change(tmp_path / "splits" / "dataset_dict.json", splits=["../saved"])
    with pytest.raises(ValueError, match=r"`splits\[0\]` must be the name .* got '\.\./saved'"):
        check_names(tmp_path / "splits")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"\xff", b"[" * 100_000, b'{"_data_files": [{}]}'], ids=str
)
def test_a_damaged_list_of_files_is_told_with_its_path(folder, content):
    (folder / "state.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{folder}/state\.json is "):
        read_outcomes(folder)


def test_a_folder_of_something_else_is_told_with_its_path(tmp_path):
    with pytest.raises(OSError, match=r"state\.json"):
        read_outcomes(tmp_path)


def test_rows_that_claim_more_than_there_is_are_refused(folder):
    """pyarrow itself would read past the end of the column."""
    (file,) = folder.glob("*.arrow")
    offsets = pa.array([0, 2**31 - 1, 1], pa.int32()).buffers()[1]
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"x")])
    table = pa.Table.from_arrays([column], names=["model"])
    table.validate()  # sees nothing amiss
    with pa.ipc.new_stream(str(file), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(ValueError, match=rf"^{folder} is damaged: "):
        read_outcomes(folder)


def test_a_file_that_a_row_names_is_not_opened(tmp_path, folder):
    """A column of images names files, which `datasets` opens as a row is read."""
    picture = tmp_path / "no.png"
    rows = [row | {"picture": {"path": str(picture)}} for row in to_dataset([RUN, RUN])]
    kinds = to_dataset([RUN]).features | {"picture": Image()}
    dataset = Dataset.from_list(rows, features=Features(kinds))
    with pytest.raises(FileNotFoundError, match=r"no\.png"):
        dataset[0]
    assert from_dataset(dataset) == [RUN, RUN]
    picture.write_text("")  # its size is asked for
    dataset.save_to_disk(tmp_path / "pictures")
    picture.unlink()
    assert read_outcomes(tmp_path / "pictures") == [RUN, RUN]
    lying = Features(to_dataset([RUN]).features | {"model": Image(), "iimm": Value("float64")})
    change(folder / "dataset_info.json", features=lying.to_dict())
    assert read_outcomes(folder) == [RUN, PUBLISHED]  # what it says of its columns is not asked
