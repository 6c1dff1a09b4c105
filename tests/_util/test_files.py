"""The check for free space before the work, whole files after it, and another folder if it fails."""

import errno
import os
import stat

import pytest

from bnlora._util.files import room, room_for, write_whole, written

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full_disk(monkeypatch):
    """A disk that takes files of up to 1,000 bytes; the sizes that were tried."""
    tried = []

    def fsync(number):
        tried.append(os.fstat(number).st_size)
        if tried[-1] > 1000:
            raise FULL

    monkeypatch.setattr(os, "fsync", fsync)
    return tried


def test_room_leaves_nothing_where_nothing_came_in(tmp_path):
    with room(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    with room(tmp_path / "a" / "b") as require:
        require(3 * 2**20 + 5)
        assert list((tmp_path / "a" / "b").iterdir()) == []
        (tmp_path / "a" / "b" / "fit").write_text("fitted")
    assert (tmp_path / "a" / "b" / "fit").read_text() == "fitted"
    with room(tmp_path / "a"), room(tmp_path):
        pass
    assert (tmp_path / "a").is_dir()


def test_what_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("taken")
    for place, reason in {"file": "File exists", "file/below": "Not a directory"}.items():
        with (
            pytest.raises(OSError, match=rf"cannot be written \({reason}\); choose another"),
            room(tmp_path / place),
        ):
            pytest.fail("the work began")
    assert (tmp_path / "file").read_text() == "taken"


def test_a_full_disk_is_found_with_the_size_of_the_result(tmp_path, full_disk):
    with room(tmp_path / "new") as require:
        require(1000)
        with pytest.raises(OSError, match=r"which needs 2.5 MiB \(No space left on device\); choose another"):
            require(5 * 2**19)
    assert full_disk == [1, 1000, 5 * 2**19]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the root user may write everywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)"), room(tmp_path / "new"):
            pytest.fail("the work began")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_file_needs_a_name_of_its_own(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"), room_for(tmp_path):
        pytest.fail("the work began")
    with room_for(None), room_for(tmp_path / "pages" / "page.html"):
        (tmp_path / "pages" / "page.html").write_text("page")
    with room_for(tmp_path / "pages" / "page.html"):
        pass
    assert (tmp_path / "pages" / "page.html").read_text() == "page"


def test_a_table_that_is_read_stays(tmp_path, monkeypatch):
    """For every name of the file: itself, a link, or a path with detours."""
    source, link = tmp_path / "a.csv", tmp_path / "b.csv"
    source.write_text("text\nx\n")
    link.symlink_to(source)
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in (source, link, tmp_path / "deep" / ".." / "a.csv"):
        for read in (source, source.relative_to(tmp_path)):
            with (
                pytest.raises(ValueError, match="is the input table and would be overwritten"),
                room_for(path, source=read),
            ):
                pytest.fail("the work began")
    with room_for(tmp_path / "new" / "c.csv", source=source):
        pass


def test_what_cannot_be_written_is_written_elsewhere(tmp_path):
    wanted, spare = tmp_path / "there" / "table.csv", [tmp_path / "full", tmp_path / "free"]

    def write(path):
        if path == wanted or tmp_path / "full" in path.parents:
            raise FULL
        path.write_text("rows")

    place, problem = written(wanted, write, spare)
    assert place.read_text() == "rows"
    assert place.name == "table.csv"
    assert tmp_path / "free" in place.parents
    assert problem == (
        f"'{wanted}' cannot be written (No space left on device), nor '{spare[0]}' (No space left on device)"
    )
    again, _ = written(wanted, write, spare)
    assert again != place
    assert written(tmp_path / "here" / "table.csv", write, spare) == (tmp_path / "here" / "table.csv", "")
    with pytest.raises(OSError, match="No space left on device.*; the result is lost"):
        written(wanted, write, spare[:1])


def test_a_file_that_fails_leaves_no_part_of_itself(tmp_path):
    def write(path):
        path.write_text("half")
        raise FULL

    (tmp_path / "file").write_text("before")
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "file", write)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "before")]
