"""A folder that is written as a whole, or not at all."""

import os

import pytest

from keras_learnbits.command_line.folder import new_folder

NAMES = {"a", "b"}


def write(path, text, overwrite=False):
    with new_folder(str(path), overwrite, NAMES) as folder, open(f"{folder}/a", "w") as file:
        file.write(text)


def test_a_folder_takes_its_name_at_the_end(tmp_path):
    with new_folder(str(tmp_path / "deep" / "new"), False, NAMES) as folder:
        assert os.listdir(tmp_path / "deep") == [os.path.basename(folder)]
    assert os.listdir(tmp_path / "deep") == ["new"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_folder(tmp_path, error):
    write(tmp_path / "new", "old")

    def fail():
        with new_folder(str(tmp_path / "new"), True, NAMES) as folder:
            open(f"{folder}/b", "w").close()
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == ["a"]


def test_an_empty_folder_is_used_and_an_old_one_replaced(tmp_path):
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", "old")
    (tmp_path / "new" / "b").write_text("other")
    write(tmp_path / "new", "young", overwrite=True)
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == ["a"]
    assert (tmp_path / "new" / "a").read_text() == "young"


def test_a_failed_rename_brings_the_old_folder_back(tmp_path, monkeypatch):
    write(tmp_path / "new", "old")
    rename = os.rename

    def fail(source, target):
        if source.endswith(".tmp"):
            raise PermissionError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(PermissionError):
        write(tmp_path / "new", "young", overwrite=True)
    assert os.listdir(tmp_path) == ["new"]
    assert (tmp_path / "new" / "a").read_text() == "old"


def test_a_file_that_appears_in_the_meantime_stays(tmp_path):
    with pytest.raises(FileExistsError, match="a"), new_folder(str(tmp_path / "new"), False, NAMES):
        write(tmp_path / "new", "other")
    assert (tmp_path / "new" / "a").read_text() == "other"
    assert os.listdir(tmp_path) == ["new"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a").read_text() == "text"


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "new").write_text("file")
    with pytest.raises(FileExistsError, match="is a file"):
        write(tmp_path / "new", "text", overwrite=True)
    assert (tmp_path / "new").read_text() == "file"
