"""A network of this library's layers as a function of its input alone, for attacks: same logits, in less time.

The parameters are constants, so what can be computed from them is computed once: batch normalisation is folded into the
convolution before it, weights are laid out as processors convolve fastest and turned to a low type if one is asked for,
and where images have one channel the gradient at them is a product with a banded matrix.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import nn

from .differentiate import own
from .models import BasicBlock, Ensemble

FRESH = {nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.MaxPool2d}  # what they return may be overwritten


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
    return lambda h: activation(residual(h) + shortcut(h[..., :: block.stride, :: block.stride]))


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
    plain = (layer.stride, layer.dilation, layer.padding_mode) == ((1, 1), (1, 1), "zeros")
    here = weight.device.type == "cpu" and weight.dtype != torch.bfloat16  # where `_OneChannel` is the faster one
    if plain and layer.in_channels == 1 and here and isinstance(layer.padding, tuple):
        return lambda h: _OneChannel.apply(h, weight, bias, layer.padding)
    return lambda h: layer._conv_forward(h.to(weight.dtype), weight, bias)


def _batch_norm(norm, _low):
    tensors = [None if t is None else own(t) for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)]
    return lambda h: F.batch_norm(h, *tensors, training=norm.running_mean is None, eps=norm.eps)


def _constant(t, low):
    return None if t is None else channels_last(own(t).to(low or t.dtype))


class _OneChannel(torch.autograd.Function):
    """A convolution of images of one channel, with a faster derivative in them (a third of oneDNN's time).

    A row of the gradient, all its channels, times a banded matrix is what it adds to each of the rows under the kernel.
    Half a row at a time, since the matrix holds a zero for all that is out of the kernel's reach.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, padding):
        ctx.weight, ctx.padding = weight, padding
        return F.conv2d(x, weight, bias, padding=padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (n, c, h, w), (rows, columns) = g.shape, ctx.weight.shape[2:]
        part = w if w % 2 else w // 2
        band = g.new_zeros(part, c, rows, part + columns - 1)
        for i in range(part):
            band[i, :, :, i : i + columns] = ctx.weight[:, 0]
        pieces = g.permute(0, 2, 3, 1).reshape(-1, part * c) @ band.flatten(0, 1).flatten(1)
        pieces = pieces.view(n, h, w // part, rows, -1)
        out = g.new_zeros(n, h + rows - 1, w + columns - 1)
        for i in range(rows):
            for j in range(w // part):
                out[:, i : i + h, j * part : (j + 1) * part + columns - 1] += pieces[:, :, j, i]
        top, left = ctx.padding
        return out[:, None, top : out.shape[1] - top, left : out.shape[2] - left], None, None, None


RULES = {
    nn.Sequential: _sequential,
    BasicBlock: _block,
    Ensemble: _ensemble,
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm2d: _batch_norm,
}
