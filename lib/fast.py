"""A network of this library's layers as a function of its input alone, for attacks: same logits, in less time.

The parameters are constants, so what can be computed from them is computed once: batch normalisation is folded into the
convolution before it, weights are laid out as processors convolve fastest and turned to a low type if one is asked for,
and convolutions with few channels are done in ways that fill a processor's vectors.
"""

from functools import cache, partial, reduce
from itertools import product

import torch
import torch.nn.functional as F
from torch import nn

from .differentiate import own
from .models import BasicBlock, Ensemble

FRESH = {nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d}  # what they return may be overwritten
BLOCKS = (4, 4), (2, 4), (1, 4), (1, 2)  # rows and columns that `_in_blocks` makes at once, the first that fit


def as_function(layer, low=None):
    """A layer or model in evaluation mode as a function of its input, equal to it up to rounding.

    Args:
        layer: a module of which `models.any_layout` holds.
        low: the type of convolutions and hidden layers, or None for that of the weights. The linear layer at the end
            stays in the weights' type, lest large logits lose their differences.
    """
    if getattr(layer, "inplace", False):
        return lambda h: layer(h.clone())
    return RULES[type(layer)](layer, low) if type(layer) in RULES else layer


def channels_last(t):
    """t with its channels last in memory, if it has 4 dimensions: the layout that CPUs and GPUs convolve fastest.

    With one channel both layouts are the same memory, and PyTorch takes it for the slow one unless the strides say
    otherwise: pooling what comes out of the first convolution of digits is then several times slower.
    """
    if t.dim() != 4:
        return t
    t = t.contiguous(memory_format=torch.channels_last)
    _, c, h, w = t.shape
    return t.as_strided(t.shape, (h * w, 1, w, 1)) if c == 1 and t.stride(1) != 1 else t


def _sequential(layers, low):
    steps, before, rest = [], None, list(layers)
    while rest:
        layer = rest.pop(0)
        if type(layer) is nn.Conv2d and rest and type(rest[0]) is nn.BatchNorm2d and _fits(layer, rest[0]):
            step = _convolution(layer, low, rest.pop(0))
        elif type(layer) is nn.ReLU and before in FRESH:
            step = torch.relu_
        else:
            step = as_function(layer, low if rest else None)
        steps, before = [*steps, step], type(layer)
    return lambda h: reduce(lambda h, step: step(h), steps, h)


def _fits(convolution, norm):
    return norm.running_mean is not None and len(norm.running_mean) == convolution.out_channels


def _block(block, low):
    residual, shortcut, activation = (as_function(m, low) for m in (block.residual, block.shortcut, block.activation))
    activation = torch.relu_ if type(block.activation) is nn.ReLU else activation
    return lambda h: activation(residual(h) + shortcut(block.every_second(h)))


def _ensemble(ensemble, low):
    members = [as_function(member, low) for member in ensemble.members]
    return lambda h: ensemble.mix([member(h) for member in members])


def _linear(layer, low):
    weight, bias = _constant(layer.weight, low), _constant(layer.bias, low)
    return lambda h: F.linear(h.to(weight.dtype), weight, bias)


def _convolution(layer, low, norm=None):
    weight, bias = layer.weight, layer.bias
    if norm is not None:  # h -> scale * h + shift
        scale = (own(norm.running_var).double() + norm.eps).rsqrt() * (1 if norm.weight is None else own(norm.weight))
        shift = scale * ((0 if bias is None else own(bias)) - own(norm.running_mean).double())
        shift = shift if norm.bias is None else shift + own(norm.bias)
        weight, bias = (t.to(weight.dtype) for t in (own(weight) * scale[:, None, None, None], shift))
    weight, bias = _constant(weight, low), _constant(bias, low)
    if not (functions := _narrow(layer, weight, bias)):
        return lambda h: layer._conv_forward(h.to(weight.dtype), weight, bias)
    return lambda h: _Narrow.apply(h.to(weight.dtype), *functions)


def _batch_norm(norm, _low):
    tensors = [None if t is None else own(t) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    return lambda h: F.batch_norm(h, *tensors, training=norm.running_mean is None, eps=norm.eps)


def _constant(t, low):
    return None if t is None else channels_last(own(t).to(low or t.dtype))


def _narrow(layer, weight, bias):
    """Functions for a convolution and its derivative where few channels make others the faster ones; else None."""
    plain = (layer.stride, layer.dilation, layer.groups, layer.padding_mode) == ((1, 1), (1, 1), 1, "zeros")
    if not plain or weight.device.type != "cpu" or isinstance(layer.padding, str):
        return None
    beyond = [size - 1 - p for size, p in zip(layer.kernel_size, layer.padding, strict=True)]
    if min(beyond) < 0 or min(weight.shape[:2]) > _places(weight) / 2:
        return None
    back = _in_blocks(weight.flip(2, 3).transpose(0, 1), None, beyond)
    if layer.in_channels == 1 and weight.dtype == torch.bfloat16:  # other digits than oneDNN's, for little
        return partial(F.conv2d, weight=weight, bias=bias, padding=layer.padding), back
    return _in_blocks(weight, bias, layer.padding), back


class _Narrow(torch.autograd.Function):
    """A convolution by a function, and its derivative by another."""

    @staticmethod
    def forward(ctx, x, ahead, back):
        ctx.back = back
        return ahead(x).data  # no view, as autograd has it: what comes next may overwrite it

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return ctx.back(g), None, None


def _places(weight):
    """How many channels oneDNN computes at once, as far as that was measured."""
    known = weight.dtype in (torch.float32, torch.bfloat16)
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 0) if known else 0


def _in_blocks(weight, bias, padding):
    """A convolution of stride 1 that makes a block of neighbours at once, as channels, by a kernel so much larger.

    A vector's places are filled with channels, and most stay empty where a few come out (with 8 of 16 it takes 0.6 to
    0.8 of the time, with one a fifth; on an AMD EPYC). Where channels are last in memory, neighbours of a row are then
    where they would be, had they been made one by one.
    """
    (k, _, rows, columns), places = weight.shape, _places(weight)

    @cache
    def larger(a, b):
        out = weight.new_zeros(a, b, *weight.shape[:2], rows + a - 1, columns + b - 1)
        for i, j in product(range(a), range(b)):
            out[i, j, ..., i : i + rows, j : j + columns] = weight
        return channels_last(out.flatten(0, 2)), None if bias is None else bias.repeat(a * b)

    def fits(a, b, h, w):  # but no row at once: for one channel oneDNN is wrong there
        return a * b * k <= places and h % a == w % b == 0 < min(h, w) and (a > 1 or b < w)

    def convolve(x):
        h, w = (x.shape[2 + i] + 2 * padding[i] - size + 1 for i, size in enumerate((rows, columns)))
        a, b = next(((a, b) for a, b in BLOCKS if fits(a, b, h, w)), (1, 1))
        out = F.conv2d(x, *larger(a, b), stride=(a, b), padding=padding).permute(0, 2, 3, 1)
        out = out.reshape(len(x), h // a, w // b, a, b, k).transpose(2, 3)
        return out.reshape(len(x), h, w, k).permute(0, 3, 1, 2)

    return convolve


RULES = {
    nn.Sequential: _sequential,
    BasicBlock: _block,
    Ensemble: _ensemble,
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
}
