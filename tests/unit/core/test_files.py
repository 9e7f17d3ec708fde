"""Files and directories are complete or absent, whatever ends the writing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from mfcompile.errors import InputError
from mfcompile.files import check_output_dir, staged_directory, write_atomically

INTERRUPTIONS = [RuntimeError("disk on fire"), KeyboardInterrupt(), SystemExit(3)]


def tree(path: Path) -> dict[str, bytes]:
    return {str(item.relative_to(path)): item.read_bytes() for item in sorted(path.rglob("*")) if item.is_file()}


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def write(path: Path, *, overwrite: bool = False, error: BaseException | None = None) -> None:
    with staged_directory(path, overwrite=overwrite) as staging:
        (staging / "new").write_bytes(b"new")
        if error is not None:
            raise error


def test_a_file_is_written_with_its_folders_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.bin"
    assert write_atomically(path, b"one") == path
    write_atomically(path, b"two")
    assert tree(tmp_path) == {"a/b.bin": b"two"}


def test_a_file_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_atomically(tmp_path / "file", b"")
        with staged_directory(tmp_path / "folder") as staging:
            assert stat.S_IMODE(staging.stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_an_interrupted_file_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    path = write_atomically(tmp_path / "file", b"old")

    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(type(error)):
        write_atomically(path, b"new")
    assert tree(tmp_path) == {"file": b"old"}


def test_a_file_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match=r"cannot write to .*file: .*\. Choose another output path"):
        write_atomically(tmp_path / "file" / "below", b"")


def test_a_directory_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "a" / "out"
    with staged_directory(path) as staging:
        assert staging.parent == path.parent  # the same file system, so that a rename is enough
        (staging / "one").write_bytes(b"1")
        (staging / "two").mkdir()
        (staging / "two" / "three").write_bytes(b"3")
        assert not path.exists()
    assert tree(tmp_path) == {"a/out/one": b"1", "a/out/two/three": b"3"}
    assert names(tmp_path / "a") == ["out"]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_an_interrupted_directory_vanishes(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        write(tmp_path / "out", error=error)
    assert names(tmp_path) == []


def filled(path: Path) -> Path:
    path.mkdir()
    (path / "old").write_bytes(b"old")
    return path


def test_what_is_there_stays_without_overwrite(tmp_path: Path) -> None:
    path = filled(tmp_path / "out")
    with pytest.raises(InputError, match=r"the output directory .*out is not empty\. Nothing was written; .* --overwrite"):
        write(path)
    assert tree(tmp_path) == {"out/old": b"old"}


def test_overwrite_replaces_the_whole_directory(tmp_path: Path) -> None:
    path = filled(tmp_path / "out")
    with staged_directory(path, overwrite=True) as staging:
        (staging / "new").write_bytes(b"new")
        assert tree(path) == {"old": b"old"}
    assert tree(tmp_path) == {"out/new": b"new"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_overwrite_keeps_the_old_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    path = filled(tmp_path / "out")
    with pytest.raises(type(error)):
        write(path, overwrite=True, error=error)
    assert tree(tmp_path) == {"out/old": b"old"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda error: type(error).__name__)
def test_overwrite_keeps_the_old_when_the_exchange_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
) -> None:
    path, calls, rename = filled(tmp_path / "out"), [0], os.replace

    def interrupted(source: Path, target: Path) -> None:
        calls[0] += 1
        if calls[0] == failing:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(type(error)):
        write(path, overwrite=True)
    assert tree(tmp_path) == {"out/old": b"old"}
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_an_empty_or_missing_directory_is_fine(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        write(tmp_path / name, overwrite=overwrite)
    assert tree(tmp_path) == {"empty/new": b"new", "missing/new": b"new"}


def test_the_working_directory_may_be_given_as_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path("."))
    assert tree(tmp_path) == {"here/new": b"new"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_no_output_directory(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"the output directory .*out is a file\. Choose another"):
        write(tmp_path / "out", overwrite=overwrite)
    assert tree(tmp_path) == {"out": b"mine"}


def test_a_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"the output directory .* cannot be written: no permission in .*file"):
        check_output_dir(tmp_path / "file" / "a" / "b")


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="cannot be written: no permission in"):
        check_output_dir(tmp_path / "a" / "b")


def test_a_disk_that_refuses_a_folder_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    with pytest.raises(InputError, match=r"cannot write to .*: No space left on device"):
        write(tmp_path / "out")
    assert names(tmp_path) == []
