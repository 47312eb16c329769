import os
import stat

import pytest

from hf_aegis.atomic_files import replacing, write_bytes, write_text


@pytest.fixture
def umask():
    earlier = os.umask(0o027)
    yield
    os.umask(earlier)


def test_a_file_is_replaced_whole_with_an_ordinary_mode(tmp_path, umask):
    path = tmp_path / "file.txt"
    write_text(path, "einß\n")
    write_text(str(path), "zweiß\n")
    assert path.read_bytes() == "zweiß\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    write_bytes(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_or_interruption_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def write_half(error):
        with replacing(path) as staged:
            staged.write_text("half")
            raise error

    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error):
            write_half(error)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_two_writers_do_not_share_a_half_written_file(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path) as first, replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"


def test_a_file_is_on_the_disk_before_it_takes_a_place(tmp_path, monkeypatch):
    path, done = tmp_path / "file.txt", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        done.append((kind, os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def note_replace(source, target):
        done.append("replaced")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_text(path, "new")
    assert done == [("file", path.stat().st_ino), "replaced", ("folder", tmp_path.stat().st_ino)]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "other.txt").write_text("other")
    link = tmp_path / "link.txt"
    link.symlink_to("other.txt")
    write_text(link, "new")
    assert not link.is_symlink()
    assert (tmp_path / "other.txt").read_text() == "other"
