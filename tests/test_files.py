"""Files are written whole or not at all."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from vitlib.files import write_whole


def test_a_file_appears_when_it_is_complete_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "table.csv"
    with write_whole(path) as draft:
        draft.write_text("a,b\n")
        assert draft.parent == path.parent and draft.suffix == ".csv" and not path.exists()
    assert path.read_text() == "a,b\n" and os.listdir(path.parent) == ["table.csv"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_fault_leaves_the_old_file_and_no_draft(tmp_path, fault):
    path = tmp_path / "kept.json"
    path.write_text("old")
    with pytest.raises(fault), write_whole(path) as draft:
        draft.write_text("half of the n")
        raise fault
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["kept.json"]


def test_a_block_that_writes_nothing_is_a_fault(tmp_path):
    with pytest.raises(FileNotFoundError), write_whole(tmp_path / "a"):
        pass
    assert os.listdir(tmp_path) == []


def test_writers_at_the_same_time_do_not_meet(tmp_path):
    def write(number):
        with write_whole(tmp_path / "same") as draft:
            draft.write_text(str(number) * 1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    text = (tmp_path / "same").read_text()
    assert text == text[: len(text) // 1000] * 1000 and os.listdir(tmp_path) == ["same"]


def test_a_link_stays_a_link_and_its_target_is_written(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with write_whole(tmp_path / "link") as draft:
        draft.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"
