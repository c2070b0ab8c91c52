"""Files are written whole or not at all."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from vitlib.errors import UsageError
from vitlib.files import check_target, draft_name, sweep, write_whole


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


def test_what_a_killed_process_leaves_is_swept_and_what_a_living_one_writes_stays(tmp_path):
    code = f"""
import os, sys
from vitlib.files import draft_name, write_whole
os.mkdir(os.path.join({str(tmp_path)!r}, draft_name() + ".folder"))
with write_whole(os.path.join({str(tmp_path)!r}, "kept.json")) as draft:
    draft.write_text("half")
    os._exit(9)
"""
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ).returncode
        == 9
    )
    (tmp_path / f"{draft_name()}.mine").write_text("half")
    (tmp_path / ".draft-of-something-else").write_text("whole")
    assert len(os.listdir(tmp_path)) == 4
    sweep(tmp_path)
    left = [name.rsplit(".", 1)[-1] for name in os.listdir(tmp_path)]
    assert sorted(left) == ["draft-of-something-else", "mine"]


@pytest.mark.parametrize("what", ["a folder", "a pipe"])
def test_what_is_no_file_is_not_replaced_by_one(what, tmp_path):
    """Root could put a file in the place of a device."""
    (tmp_path / "x").mkdir() if what == "a folder" else os.mkfifo(tmp_path / "x")
    with pytest.raises(UsageError, match=r"x is there and is no file"), write_whole(tmp_path / "x") as draft:
        draft.write_text("new")
    with pytest.raises(UsageError, match=r"x' is there and is no file: allowed is a file$"):
        check_target(tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"] and not (tmp_path / "x").is_file()
