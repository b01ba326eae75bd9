"""Architectures against hand-made layer lists and torchvision."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from lib import models
from lib.models import build

ROOT = Path(__file__).resolve().parents[1]


def conv(c_in, c_out, k, bias=True):
    return k * k * c_in * c_out + (c_out if bias else 0)


def linear(n_in, n_out):
    return n_in * n_out + n_out


def by_hand_lenet(w):
    return conv(1, 2 * w, 5) + conv(2 * w, 4 * w, 5) + linear(49 * 4 * w, 64 * w) + linear(64 * w, 10)


def by_hand_vgg16(w):
    channels = [f * w for f in (4, 4, 8, 8, 16, 16, 16, 32, 32, 32, 32, 32, 32)]
    layers = zip([3, *channels], channels, strict=False)
    return sum(conv(a, b, 3) + 2 * b for a, b in layers) + linear(32 * w, 10)


def by_hand_resnet18(w):
    total = conv(3, 4 * w, 3, bias=False) + 2 * 4 * w
    c_in = 4 * w
    for c in (4 * w, 8 * w, 16 * w, 32 * w):
        for _block in range(2):
            total += conv(c_in, c, 3, bias=False) + conv(c, c, 3, bias=False) + 2 * 2 * c
            if c_in != c:
                total += conv(c_in, c, 1, bias=False) + 2 * c
            c_in = c
    return total + linear(32 * w, 10)


BY_HAND = {"lenet": by_hand_lenet, "vgg16": by_hand_vgg16, "resnet18": by_hand_resnet18}


@pytest.mark.parametrize("name, width, count", [
    ("lenet", 16, 3_274_634), ("vgg16", 8, 3_686_954), ("resnet18", 8, 2_797_610),
    ("lenet", 1, None), ("vgg16", 2, None), ("resnet18", 3, None),
])  # fmt: skip
def test_parameter_count(name, width, count):
    by_hand = BY_HAND[name](width)
    assert count in (None, by_hand)
    with torch.device("meta"):
        assert sum(p.numel() for p in build(name, seed=0, width=width).parameters()) == by_hand


@pytest.mark.parametrize("name, shape, settings", [
    ("lenet", (2, 1, 28, 28), {}),
    ("lenet", (2, 3, 32, 32), {"in_channels": 3, "image_size": 32}),
    ("vgg16", (2, 3, 32, 32), {}),
    ("vgg16", (2, 1, 64, 64), {"in_channels": 1}),
    ("resnet18", (2, 3, 32, 32), {}),
    ("resnet18", (2, 1, 20, 24), {"in_channels": 1}),
])  # fmt: skip
@pytest.mark.parametrize("num_classes", [10, 3])
def test_output_shape(name, shape, settings, num_classes):
    model = build(name, seed=0, width=1, num_classes=num_classes, **settings)
    assert model(torch.rand(shape)).shape == (2, num_classes)


@pytest.mark.parametrize("name", models.ACTIVATIONS)
@pytest.mark.parametrize("architecture", ["lenet", "vgg16"])
def test_pooling_before_the_activation_is_pooling_after_it(architecture, name):
    model = build(architecture, seed=0, width=1, activation=name).eval().double()
    layers = list(model)
    pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
    assert len(pools) == {"lenet": 2, "vgg16": 5}[architecture]
    for i in pools:
        layers[i], layers[i + 1] = layers[i + 1], layers[i]
    x = torch.rand(4, *((1, 28, 28) if architecture == "lenet" else (3, 32, 32))).double()
    torch.testing.assert_close(model(x), nn.Sequential(*layers)(x))


def test_lenet_is_the_function_written_out():
    model = build("lenet", seed=1, width=2).double()
    a, b, c, d = (m for m in model if isinstance(m, (nn.Conv2d, nn.Linear)))
    x = torch.rand(5, 1, 28, 28).double()
    h = F.max_pool2d(F.relu(F.conv2d(x, a.weight, a.bias, padding=2)), 2)
    h = F.max_pool2d(F.relu(F.conv2d(h, b.weight, b.bias, padding=2)), 2)
    torch.testing.assert_close(model(x), d(F.relu(c(h.flatten(1)))))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_resnet_is_torchvisions(mode):
    """Their ResNet at our widths: the stem replaced, the weights ours. Both list their layers in the same order."""

    class Narrow(ResNet):
        def __init__(self):
            super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=10)
            self.conv1, self.maxpool = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Identity()
            self.bn1, self.inplanes = nn.BatchNorm2d(8), 8
            stages = ((8, 1), (16, 2), (32, 2), (64, 2))
            self.layer1, self.layer2, self.layer3, self.layer4 = (
                self._make_layer(BasicBlock, c, 2, stride=s) for c, s in stages
            )
            self.fc = nn.Linear(64, 10)

    ours, theirs = build("resnet18", seed=0, width=2).double(), Narrow().double()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight)
            nn.init.uniform_(module.bias)
    values = list(ours.state_dict().values())
    assert len(values) == len(theirs.state_dict())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), values, strict=True)))
    x = torch.rand(4, 3, 32, 32).double()
    torch.testing.assert_close(getattr(ours, mode)()(x), getattr(theirs, mode)()(x))


@pytest.mark.parametrize("side", [7, 8])
def test_every_second_pixel_is_that_of_a_slice_and_its_derivative_has_channels_last(side):
    block, x = models.BasicBlock(4, 8, 2, "relu"), torch.rand(2, 4, side, side, requires_grad=True)
    x = x.contiguous(memory_format=torch.channels_last)
    seen, sliced = block.every_second(x), x[..., ::2, ::2]
    assert torch.equal(seen, sliced)
    direction = torch.randn_like(seen)
    g, expected = (torch.autograd.grad(out, x, direction, retain_graph=True)[0] for out in (seen, sliced))
    assert torch.equal(g, expected) and g.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(models.BasicBlock(4, 4, 1, "relu").every_second, nn.Identity)


@pytest.mark.parametrize("channels", [4, 8])
def test_a_narrow_block_has_its_gradient(channels):
    """A gradient that oneDNN gets wrong here does not only fail: it overwrites memory and ends the process."""
    code = f"""
import copy, torch
from lib.models import BasicBlock

torch.manual_seed(0)
torch.set_num_threads(1)
block = BasicBlock({channels}, {2 * channels}, 2, "softplus").to(memory_format=torch.channels_last)
exact = copy.deepcopy(block).double()
x = torch.rand(32, {channels}, 32, 32).contiguous(memory_format=torch.channels_last)
direction = torch.randn(32, {2 * channels}, 16, 16)
(block(x) * direction).sum().backward()
(exact(x.double()) * direction).sum().backward()
for a, b in zip(block.parameters(), exact.parameters()):
    torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=1e-4 * b.grad.abs().max().item())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name, module", [("relu", nn.ReLU), ("softplus", nn.Softplus), ("elu", nn.ELU)])
@pytest.mark.parametrize("architecture", models.MODELS)
def test_activation_by_name(architecture, name, module):
    model = build(architecture, seed=0, width=1, activation=name)
    used = [type(m) for m in model.modules() if type(m) in (nn.ReLU, nn.Softplus, nn.ELU)]
    assert set(used) == {module} and len(used) == {"lenet": 3, "vgg16": 13, "resnet18": 17}[architecture]


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    a, b, c = (build("lenet", seed=s, width=1).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not any(torch.equal(a[k], c[k]) for k in a)
    torch.manual_seed(0)
    plain = models.lenet(1).state_dict()
    assert all(torch.equal(a[k], plain[k]) for k in a)


@pytest.mark.parametrize("name, settings, message", [
    ("lenet5", {}, "unknown model 'lenet5': choose one of lenet, vgg16, resnet18"),
    ("lenet", {"activation": "gelu"}, "unknown activation 'gelu': choose one of relu, softplus, elu"),
    ("vgg16", {"width": 0}, "width must be an integer >= 1, got 0"),
    ("resnet18", {"width": 1.5}, "width must be an integer >= 1, got 1.5"),
    ("lenet", {"width": True}, "width must be an integer >= 1, got True"),
])  # fmt: skip
def test_bad_input(name, settings, message):
    with pytest.raises(ValueError, match=message):
        build(name, seed=0, **settings)


class TestEnsemble:
    members = tuple(models.build("lenet", seed=s, width=1).double().eval() for s in range(3))
    x = torch.rand(5, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def test_probabilities_are_the_mean(self):
        mean = torch.stack([m(self.x).softmax(1) for m in self.members]).mean(0)
        torch.testing.assert_close(models.Ensemble(self.members)(self.x).softmax(1), mean, atol=1e-14, rtol=1e-12)

    def test_of_one_equals_its_member(self):
        alone = models.Ensemble(self.members[:1])(self.x)
        torch.testing.assert_close(alone, self.members[0](self.x).log_softmax(1), atol=1e-14, rtol=0)

    def test_gradient_is_that_of_the_formula(self):
        """-grad log mean_k p_k(y) = -sum_k p_k(y) grad log p_k(y) / sum_k p_k(y)."""
        y, x = torch.arange(5), self.x.clone().requires_grad_()
        (ours,) = torch.autograd.grad(nn.functional.cross_entropy(models.Ensemble(self.members)(x), y), x)
        top, bottom = 0, 0
        for member in self.members:
            log_p = member(x).log_softmax(1).gather(1, y[:, None])
            (g,) = torch.autograd.grad(log_p.sum(), x)
            p = log_p.detach().exp()[:, :, None, None]
            top, bottom = top + p * g, bottom + p
        torch.testing.assert_close(ours, -top / bottom / 5, atol=1e-14, rtol=1e-10)

    def test_sure_members_do_not_overflow(self):
        class Sure(nn.Module):
            def forward(self, x):
                return torch.tensor([[1e4, -1e4, 0.0]]).expand(len(x), 3)

        assert torch.isfinite(models.Ensemble([Sure(), Sure()])(self.x.float())).all()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="needs at least one member"):
            models.Ensemble([])
        other = models.build("lenet", seed=0, width=1, num_classes=7).double()
        with pytest.raises(ValueError, match=r"unequal numbers of classes: \[10, 7\]"):
            models.Ensemble([self.members[0], other])(self.x)


@pytest.mark.parametrize("prefix, wrapped", [
    ("", None), ("module.", None), (None, None),
    ("", "state_dict"), ("", "model_state_dict"), ("", "model"), ("", "net"),
])  # fmt: skip
@pytest.mark.parametrize("name, shape", [("lenet", (1, 28, 28)), ("vgg16", (3, 32, 32)), ("resnet18", (3, 32, 32))])
def test_released_layout_round_trip(tmp_path, name, shape, prefix, wrapped):
    """Under other names, in order: what is saved comes back bit by bit, running averages of batches too."""
    network = build(name, seed=3, width=1)
    network(torch.rand(4, *shape))  # moves the running averages
    names = (i if prefix is None else f"{prefix}other.{i}" for i in range(999))
    tensors = dict(zip(names, network.state_dict().values(), strict=False))
    torch.save({wrapped: tensors, "epoch": 3} if wrapped else tensors, tmp_path / "x_100.ckpt")
    back = models.released(tmp_path / "x_100.ckpt", name, width=1)
    x = torch.rand(2, *shape)
    assert not back.training and torch.equal(back(x), network.eval()(x))
    three = models.released([tmp_path / "x_100.ckpt"] * 3, name, width=1)
    assert torch.equal(three(x), models.Ensemble([network] * 3)(x))
    both = zip(back.state_dict().values(), network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in both)


@pytest.mark.parametrize("content, message", [
    (None, "x.ckpt cannot be read: No such file"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n", "a pointer of Git LFS.*git lfs pull"),
    (b"", "x.ckpt is no file of tensors"),
    (b"PK\x03\x04 torn", "x.ckpt is no file of tensors"),
    *((text, "x.ckpt is no file of tensors") for text in (b"hello world", b"a", b"Git", b"404: Not Found", b"<html>")),
    (lambda: build("lenet", seed=0, width=2), r"of width 1: its tensor 1 of 8 is \(4, 1, 5, 5\), not \(2, 1, 5, 5\)"),
    (lambda: nn.Sequential(*list(build("lenet", seed=0, width=1))[:-1]), "its tensor 7 of 6 is nothing more"),
    (lambda: [1, 2], "its tensor 1 of 0 is nothing more"),
    (lambda: Path("/"), "objects beside tensors, .* save a state_dict"),  # nothing in a file is run
])  # fmt: skip
def test_what_is_no_released_network(tmp_path, content, message):
    path = tmp_path / "x.ckpt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        made = content()
        torch.save(made.state_dict() if isinstance(made, nn.Module) else made, path)
    with pytest.raises(ValueError, match=message):
        models.released(path, "lenet", width=1)
    with pytest.raises(ValueError, match=r"unknown model 'alexnet'|x\.ckpt"):
        models.released(path, "alexnet")


def test_a_width_of_zero_is_not_the_released_one(tmp_path):
    torch.save(build("lenet", seed=0, width=16).state_dict(), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="width must be an integer >= 1, got 0"):
        models.released(tmp_path / "x.ckpt", "lenet", width=0)


@pytest.mark.parametrize("checked", [True, False])
def test_a_damaged_released_network_is_refused(tmp_path, checked):
    """A bit altered anywhere: refused by the file's own checksums, or the network is the same."""
    network, path = build("lenet", seed=0, width=1), tmp_path / "x.ckpt"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checked)
    torch.save(network.state_dict(), path)
    torch.serialization.set_crc32_options(before)
    whole, x, refused = path.read_bytes(), torch.rand(2, 1, 28, 28), 0
    assert torch.equal(models.released(path, "lenet", width=1)(x), network(x))
    if not checked:  # a file without them is taken as it is
        return
    for at in range(0, len(whole), len(whole) // 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 64]) + whole[at + 1 :])
        try:
            assert torch.equal(models.released(path, "lenet", width=1)(x), network(x))
        except ValueError as error:
            assert "x.ckpt is no file of tensors" in str(error)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("change", [
    lambda t: t * float("nan"), lambda t: t / 0, lambda t: t.double() + 1e300, lambda t: t.int(), lambda t: t > 0,
    lambda t: t.to(torch.complex64), lambda t: t.to_sparse(), lambda t: t.to("meta"),
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
])  # fmt: skip
@pytest.mark.parametrize("name", ["0.weight", "9.bias"])
def test_numbers_of_another_kind_are_refused(tmp_path, change, name):
    tensors = build("lenet", seed=0, width=1).state_dict()
    torch.save(tensors | {name: change(tensors[name])}, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=rf"x\.ckpt is no (lenet to be used: {name} \(torch|file of tensors)"):
        models.released(tmp_path / "x.ckpt", "lenet", width=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_numbers_of_other_lengths_are_taken(tmp_path, dtype):
    network = build("resnet18", seed=0, width=1).to(dtype)
    torch.save(network.state_dict(), tmp_path / "x.ckpt")
    found = models.released(tmp_path / "x.ckpt", "resnet18", width=1)
    both = zip(found.state_dict().values(), network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in both)
