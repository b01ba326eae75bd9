"""Files are whole or not there."""

import errno
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib import data, files, runs
from lib.files import checksum, folder_from_environment, read_json, write_bytes, write_json
from lib.models import build, released
from lib.training import TrainConfig, train

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("value, expected", [
    (None, "default"), ("", "default"), ("~", "/home/me"), ("~/data", "/home/me/data"), ("~/a b~/é", "/home/me/a b~/é"),
    ("/x/~/y", "/x/~/y"), ("./~", "~"), ("here", "here"),
])  # fmt: skip
def test_a_folder_given_by_the_environment(monkeypatch, value, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("FOLDER", value) if value is not None else monkeypatch.delenv("FOLDER", raising=False)
    assert folder_from_environment("FOLDER", "default") == Path(expected)


def test_the_home_folder_of_nobody(monkeypatch):
    monkeypatch.setenv("FOLDER", "~no-such-user/x")
    with pytest.raises(ValueError, match="FOLDER=~no-such-user/x: there is no such home folder"):
        folder_from_environment("FOLDER", "default")


@pytest.mark.parametrize("name, folder", [("DATA_DIR", data.data_dir), ("RUNS_DIR", runs.runs_dir)])
def test_the_tilde_is_the_home_folder_for_each(monkeypatch, tmp_path, name, folder):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, "~/mine")
    assert folder() == tmp_path / "mine"


def test_the_tilde_is_the_home_folder_in_a_path_that_is_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    digits = data.load("mnist5k").first(20, 4)
    config = TrainConfig(model="lenet", width=1, eps=0.1, step_size=0.1, num_steps=1, epochs=1)
    train(config, digits, folder="~/my run")
    torch.save(build("lenet", seed=0, width=1).state_dict(), "lenet.ckpt")
    released(["~/lenet.ckpt", Path("~/lenet.ckpt")], "lenet", width=1)
    for k, part in product((0, 1), ("train", "test")):
        where = tmp_path / "photos" / part / str(k) / "0.png"
        where.parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(where)
    assert len(data.load("~/photos").y_train) == len(data.image_folder("~/photos").y_test) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lenet.ckpt", "my run", "photos"]


@pytest.mark.parametrize("function", ["open", "fsync", "replace"])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, old):
    path = tmp_path / "a.json"
    if old:
        path.write_bytes(old)

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, function, full)
    with pytest.raises(OSError, match=r"a\.json was not written \(No space left on device\); the old file") as caught:
        write_bytes(path, b"new")
    assert caught.value.errno == errno.ENOSPC
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch):
    """/dev/full refuses every byte, as a full disk does."""
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    plain = open

    def on_a_full_disk(*args, **settings):
        file = plain(*args, **settings)
        device = os.open("/dev/full", os.O_WRONLY)
        os.dup2(device, file.fileno())
        os.close(device)
        return file

    write_json(tmp_path / "a.json", 1)
    monkeypatch.setattr(files, "open", on_a_full_disk, raising=False)
    with pytest.raises(OSError, match=r"a\.json was not written \(No space left on device\)"):
        write_bytes(tmp_path / "a.json", b"x" * 100_000)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"] and read_json(tmp_path / "a.json") == 1


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(_descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(tmp_path / "a", b"new")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match=r"a was not written"):
        write_bytes(tmp_path / "a", b"new")
    tmp_path.chmod(0o700)


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(OSError, match=r"folder/a was not written"):
        write_bytes(tmp_path / "folder" / "a", b"new")


def test_json_is_sorted_exact_and_replaced(tmp_path):
    path = tmp_path / "deep" / "er" / "a.json"
    write_json(path, {"b": [1, 0.1], "a": "ε"})
    first = path.read_bytes()
    lines = first.decode().split("\n")
    assert lines[:2] == ["{", ' "a": "ε",'] and lines[2:6] == [' "b": [', "  1,", "  0.1", " ],"]
    assert lines[6].startswith(' "checksum": "') and lines[7:] == ["}", ""]
    write_json(path, {"a": "ε", "b": [1, 0.1]})
    assert path.read_bytes() == first and path.stat().st_mode & 0o777 == 0o644
    write_json(path, 2)
    assert read_json(path) == 2 and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_numbers_of_numpy_are_numbers(tmp_path):
    plain = {"a": 3, "b": [0.5, 1.5], "c": [[1, 2]], "d": True, "e": [1, 2]}
    of_numpy = {"a": np.int64(3), "b": np.float32([0.5, 1.5]), "c": [np.arange(1, 3)], "d": np.bool_(True), "e": (1, 2)}
    write_json(tmp_path / "plain.json", plain)
    write_json(tmp_path / "numpy.json", of_numpy)
    assert (tmp_path / "plain.json").read_bytes() == (tmp_path / "numpy.json").read_bytes()
    assert checksum(plain) == checksum(of_numpy)
    for bad, error in ((np.float32("nan"), ValueError), (np.array([np.inf]), ValueError), ({1, 2}, TypeError)):
        with pytest.raises(error):
            write_json(tmp_path / "plain.json", {"a": bad})
    assert read_json(tmp_path / "plain.json") == plain


def test_two_keys_that_are_one_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two keys are one text in JSON: \\['1', '1'\\]"):
        write_json(tmp_path / "a.json", {"x": {1: "a", "1": "b"}})
    assert not list(tmp_path.iterdir())


def test_files_allow_no_more_than_the_readers_umask(tmp_path):
    code = "import sys; from lib import files; files.write_bytes(sys.argv[1], b'x')"
    for mask, mode in ((0o077, 0o600), (0o002, 0o644)):
        subprocess.run([sys.executable, "-c", code, tmp_path / "a"], cwd=ROOT, umask=mask, check=True)
        assert (tmp_path / "a").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_disk_that_keeps_no_modes_is_written_to(tmp_path, monkeypatch, number):
    """As vfat and CIFS answer: a good file is no failure."""

    def refuse(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    for name in ("chmod", "fchmod"):
        monkeypatch.setattr(os, name, refuse)
    write_json(tmp_path / "a.json", [1])
    assert read_json(tmp_path / "a.json") == [1] and [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("nan")]}])
def test_nan_is_refused_before_anything_is_written(tmp_path, value):
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == 1


@pytest.mark.parametrize("content", [b"", b'{"a": [1, 2', b"\xff\xfe", b"{} {}"])
def test_corrupted_json_is_named(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is truncated or corrupted: delete it and run again"):
        read_json(tmp_path / "a.json")


def test_every_byte_counts(tmp_path):
    """Any byte changed, or a cut anywhere: refused by name, or the same value (white space, the checksum's own key)."""
    path, value = tmp_path / "a.json", {"é": [1, 2.5e-07, True, None], "b": {"10": "x", "9": -1}, "": ""}
    write_json(path, value)
    whole = path.read_bytes()
    spoilt = [whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1 :] for i in range(len(whole)) for mask in (1, 32, 255)]
    refused = 0
    for content in [*spoilt, *(whole[:i] for i in range(len(whole)))]:
        path.write_bytes(content)
        try:
            found = read_json(path)
        except ValueError as error:
            assert "a.json is truncated or corrupted" in str(error)
            refused += 1
        else:
            assert {k: v for k, v in found.items() if k in value} == value and len(found) <= len(value) + 1
    assert refused > 0.8 * 4 * len(whole)
    write_json(path, {2: 1, 10: 1})  # keys that sort otherwise once they are texts
    assert read_json(path) == {"2": 1, "10": 1}
