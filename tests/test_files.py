"""Files that are there as a whole or not at all, and are made once."""

import os
import time

import pytest

from common import InputError
from common.reads.files import make_once, written_whole


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_fails_leaves_the_old_and_nothing_else(tmp_path, kind):
    path = tmp_path / "sub" / "result"
    if kind == "file":
        path.parent.mkdir()
        path.write_text("old")
    with pytest.raises(ZeroDivisionError), written_whole(path) as part:
        if kind == "folder":
            part.mkdir()
        (part / "inside" if kind == "folder" else part).write_text("half")
        raise ZeroDivisionError
    assert [path.read_text() for path in path.parent.iterdir()] == (["old"] if kind == "file" else [])
    with written_whole(path) as part:
        if kind == "folder":
            part.mkdir()
        (part / "inside" if kind == "folder" else part).write_text("new")
    assert (path / "inside" if kind == "folder" else path).read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_written_is_named_with_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"^--out file/result: cannot be written \(.*\); wait a while$"
    with (
        pytest.raises(InputError, match=message),
        written_whole(tmp_path / "file" / "result", "wait a while", "--out file/result"),
    ):
        raise AssertionError


def test_of_many_processes_one_makes_it(tmp_path):
    path, log = tmp_path / "made", tmp_path / "log"

    def make():
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.2)  # so that the others come meanwhile
        path.mkdir()

    children = []
    for _ in range(8):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                make_once(path, make)
                code = 0 if path.exists() else 2
            finally:
                os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 8
    assert len(log.read_text().splitlines()) == 1


def test_making_that_failed_is_tried_again(tmp_path):
    path = tmp_path / "sub" / "made"
    with pytest.raises(ZeroDivisionError):
        make_once(path, lambda: 1 / 0)
    make_once(path, path.mkdir)
    make_once(path, lambda: 1 / 0)
    assert sorted(path.parent.iterdir()) == [path, path.with_name("made.lock")]
