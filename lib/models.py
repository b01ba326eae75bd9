"""LeNet, VGG16 and ResNet18 by the paper's width factor, and the ensemble of several of them.

Layers, widths and parameter counts follow the experiments of Liu et al. (2020, arXiv:2006.08403, Section 5):
batch normalisation in the two CIFAR networks, none in LeNet, no input normalisation anywhere, so that a model
takes pixels in [0, 1] and a perturbation of eps means the same in front of every model.

Pooling stands before the activation. Both orders give the same function, since max-pooling commutes with every
non-decreasing activation, and this one applies the activation to a quarter of the values.
"""

import math
import pickle
import zipfile
from contextlib import ExitStack

import torch
from torch import nn

from .checks import check_choice, check_count, check_logits
from .files import as_path

ACTIVATIONS = {"relu": nn.ReLU, "softplus": nn.Softplus, "elu": nn.ELU}


def _activation(name):
    check_choice("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def _normed(c_in, c_out, size=3, stride=1, bias=False):
    """A convolution that leaves images their size (at stride 1), and its batch normalisation: a list of two layers."""
    return [nn.Conv2d(c_in, c_out, size, stride, padding=size // 2, bias=bias), nn.BatchNorm2d(c_out)]


def lenet(width=16, *, activation="relu", in_channels=1, image_size=28, num_classes=10):
    """LeNet for 28 x 28 digits: two 5 x 5 convolutions (2w, 4w channels) and a hidden layer of 64w units.

    Returns a module (B, in_channels, image_size, image_size) in [0, 1] -> logits (B, num_classes).
    Raises ValueError for an unknown activation or a width below 1.
    """
    w, num_classes, image_size = check_count(1, width=width, num_classes=num_classes, image_size=image_size)
    return nn.Sequential(
        nn.Conv2d(in_channels, 2 * w, 5, padding=2),
        nn.MaxPool2d(2),
        _activation(activation),
        nn.Conv2d(2 * w, 4 * w, 5, padding=2),
        nn.MaxPool2d(2),
        _activation(activation),
        nn.Flatten(),
        nn.Linear(4 * w * (image_size // 4) ** 2, 64 * w),
        _activation(activation),
        nn.Linear(64 * w, num_classes),
    )


def vgg16(width=8, *, activation="relu", in_channels=3, num_classes=10):
    """VGG16 with batch normalisation: 13 3 x 3 convolutions of 4w to 32w channels and one linear layer.

    Returns a module (B, in_channels, H, W), H and W at least 32, -> logits (B, num_classes).
    """
    layers, c_in, w = [], in_channels, check_count(1, width=width)
    for c_out, convs in ((4 * w, 2), (8 * w, 2), (16 * w, 3), (32 * w, 3), (32 * w, 3)):
        for _ in range(convs):
            layers += [*_normed(c_in, c_out, bias=True), _activation(activation)]
            c_in = c_out
        layers.insert(-1, nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, num_classes))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385)."""

    def __init__(self, c_in, c_out, stride, activation):
        super().__init__()
        first, second = _normed(c_in, c_out, stride=stride), _normed(c_out, c_out)
        self.residual = nn.Sequential(*first, _activation(activation), *second)
        self.shortcut = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(*_normed(c_in, c_out, size=1))
        # A 1 x 1 convolution of stride 2 is one of stride 1 on every second pixel. The latter, because oneDNN's
        # gradient of the former writes past its memory where channels are fewer than a vector (its issue 6035). By
        # pooling single pixels, since the derivative of a slice has channels first in memory, whatever they were
        # before, and the layers that it goes through next are several times slower then.
        self.every_second = nn.AvgPool2d(1, stride) if stride > 1 else nn.Identity()
        self.activation = _activation(activation)

    def forward(self, x):
        return self.activation(self.residual(x) + self.shortcut(self.every_second(x)))


def resnet18(width=8, *, activation="relu", in_channels=3, num_classes=10):
    """ResNet18 for small images: a 3 x 3 stem and four stages of two blocks, 4w to 32w channels.

    Returns a module (B, in_channels, H, W) -> logits (B, num_classes).
    """
    w = check_count(1, width=width)
    layers, c_in = [*_normed(in_channels, 4 * w), _activation(activation)], 4 * w
    for c_out, stride in ((4 * w, 1), (8 * w, 2), (16 * w, 2), (32 * w, 2)):
        layers += [BasicBlock(c_in, c_out, stride, activation), BasicBlock(c_out, c_out, 1, activation)]
        c_in = c_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c_in, num_classes))


class Ensemble(nn.Module):
    """The mean of the members' probabilities (the ensemble of Liu et al. 2020, Section 5), as a model like any other.

    Its logits are the logarithms of the mean probabilities, so that their softmax is that mean; the ensemble of one
    model has its probabilities. Attacks see the gradient of the whole.

    Args:
        members: modules x -> logits (B, classes), at least one.
    Raises:
        ValueError: no members; when called, members that return no logits, or unequal numbers of classes.
    """

    def __init__(self, members):
        super().__init__()
        self.members = nn.ModuleList(members)
        if not len(self.members):
            raise ValueError("an ensemble needs at least one member")

    def forward(self, x):
        logits = [member(x.clone()) for member in self.members]  # some write to what they get
        for z in logits:
            check_logits(z, len(x))
        return self.mix(logits)

    @staticmethod
    def mix(logits):
        """The ensemble's logits from its members'."""
        if len({z.shape for z in logits}) > 1:
            raise ValueError(f"the members have unequal numbers of classes: {[z.shape[-1] for z in logits]}")
        stacked = torch.stack(logits)
        stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))  # not in bfloat16
        return stacked.log_softmax(-1).logsumexp(0) - math.log(len(logits))


LAYERS = {  # their values do not depend on the memory layout of what comes in; neither do those of their compositions
    nn.Sequential, nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Flatten,
    nn.Identity, nn.Dropout, *ACTIVATIONS.values(), BasicBlock, Ensemble, nn.ModuleList,
}  # fmt: skip


def any_layout(model):
    """Whether the model is made of LAYERS alone, so that its memory layout may be chosen for it.

    Others may ask for one (`x.view(len(x), -1)` does): those are subclasses, modules with hooks (normalised weights
    have them) or with a forward of their own.
    """
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not torch.nn.modules.module._has_any_global_hook() and all(
        type(m) in LAYERS and "forward" not in vars(m) and not any(getattr(m, k) for k in kinds)
        for m in model.modules()
    )


MODELS = {"lenet": lenet, "vgg16": vgg16, "resnet18": resnet18}


def build(name, *, seed, **settings):
    """Model `name` of MODELS, initialised by PyTorch's defaults under `seed`; the global generator is left alone.

    Raises ValueError for an unknown name.
    """
    check_choice("model", name, MODELS)
    here = "meta" if torch.get_default_device().type == "meta" else "cpu"  # whatever device the caller has chosen,
    with torch.random.fork_rng(devices=[]), torch.device(here), ExitStack() as afterwards:
        afterwards.callback(torch.set_default_dtype, torch.get_default_dtype())  # and whatever type
        torch.set_default_dtype(torch.float32)
        torch.random.default_generator.manual_seed(check_count(-(2**63), seed=seed))
        return MODELS[name](**settings)


RELEASED = {"lenet": 16, "vgg16": 8, "resnet18": 8}  # width factors of the paper's released networks


def released(path, model, *, width=None):
    """A network of the paper's released code, from its file: a plain `state_dict` as `torch.save` writes it, or a dict
    with one; from several files, as of the periods of a run, their `Ensemble`.

    The architectures hold the same tensors, in the same order and shapes, under other names; so they are copied in
    order. The logits are then those of the released code.

    A damaged file is refused by the checksums in it. Files that PyTorch wrote before 1.6 have none: what is altered in
    their numbers goes unseen.

    Args:
        path: of a .ckpt file, or a list of such paths.
        model: "lenet", "vgg16" or "resnet18".
        width: the width factor, by default the released networks' own.
    Returns:
        The model, in evaluation mode.
    Raises:
        ValueError: no file, or one that Git LFS has not fetched, that is damaged, that holds no tensors, or tensors of
            another width or network or not of finite numbers; it names the file.
    """
    if isinstance(path, list | tuple):
        return Ensemble([released(one, model, width=width) for one in path])
    tensors = _tensors(path)
    width = RELEASED.get(model) if width is None else width
    network = build(model, seed=0, width=width)
    states = tensors, network.state_dict()
    got, want = ([*(tuple(t.shape) for t in state.values()), "nothing more"] for state in states)
    if got != want:
        i = next(i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b)
        what = f"its tensor {i + 1} of {len(tensors)} is {got[i]}, not {want[i]}"
        raise ValueError(f"{path} is no {model} of width {width}: {what}")
    for (name, t), own in zip(tensors.items(), states[1].values(), strict=True):
        there = t.layout == torch.strided and not t.is_meta and t.is_floating_point() >= own.is_floating_point()
        if not there or not t.to(own.dtype).isfinite().all():
            what = f"{name} ({t.dtype}, {t.layout}) is not of floating-point numbers, all of them there and finite"
            raise ValueError(f"{path} is no {model} to be used: {what}")
    network.load_state_dict(dict(zip(states[1], tensors.values(), strict=True)))
    return network.eval()


def _tensors(path):
    """The tensors in a file of `torch.save`, by their names, whichever of the usual dicts holds them."""
    path = as_path(path)
    try:
        with open(path, "rb") as file:
            start = file.read(60)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the network: `git lfs pull` fetches it")
    try:
        if start.startswith(b"PK"):  # PyTorch compares no checksums
            with zipfile.ZipFile(path) as file:
                for entry in file.infolist():
                    if entry.CRC:  # 0 where it was to write none
                        file.read(entry)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = "it is cut, or holds objects beside tensors, which can run code when they are read: save a state_dict"
        raise ValueError(f"{path} is no file of tensors: {what}") from error
    except Exception as error:  # whatever the bytes mean to the reader of pickles
        what = f"{type(error).__name__} {error!s:.100}: fetch it again"
        raise ValueError(f"{path} is no file of tensors, or damaged: {what}") from error
    for name in ("model", "net", "model_state_dict", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    pairs = found.items() if isinstance(found, dict) else ()
    return {str(name).removeprefix("module."): t for name, t in pairs if isinstance(t, torch.Tensor)}
