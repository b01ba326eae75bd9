"""Interval bounds: what no point of an L-inf ball can do to a network's logits, their margins and their gradients.

The ball of radius eps round x, cut to the pixels' range [0, 1], is a box, and interval arithmetic carries it through
the layers (interval bound propagation, Gowal et al. 2018, arXiv:1810.12715): an affine map takes centre c and radius r
to W c + b and |W| r, a non-decreasing one is applied to both ends. Backwards through the layers, the same arithmetic
bounds the derivatives at all points of the box (as Fast-Lip of Weng et al. 2018, arXiv:1804.09699, does). Nothing is
missed, but each layer forgets how its units depend on one another, so the bounds are loose, more so with depth.

Bounds are computed in float64, rounded to nearest. They are proofs for the network as a function of real numbers, up
to the rounding of float64; the logits that the same weights give in float32 can differ from it in the seventh digit.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, vjp

from .checks import check_count, check_data, check_eps, check_inputs, check_labels, check_logits
from .copies import copied
from .models import ACTIVATIONS, BasicBlock


def bounds(model, x, *, eps, batch_size=500):
    """Lower and upper bounds of the logits over {x' in [0, 1]: ||x' - x||_inf <= eps}.

    Args:
        model: an nn.Module of the layers in RULES, evaluated in evaluation mode; it is left as it was.
        x: inputs (N, C, H, W), floating, in [0, 1].
        eps: radius, as a fraction of the pixel range.
    Returns:
        (lower, upper), each (N, classes), float64; infinite where infinite weights leave nothing to say.
    Raises:
        ValueError: a layer without a rule (named); eps negative, NaN or above 1; x outside [0, 1]; logits that are NaN.
    """
    check_data(x)
    x, _, eps = check_inputs(x, torch.zeros(len(x), dtype=torch.int64, device=x.device), eps)
    batch_size = check_count(1, batch_size=batch_size)
    with torch.inference_mode(False), torch.no_grad():
        exact = _exact(model)
        if exact(x[:1].double()).isnan().any():
            raise ValueError("the model returned NaN logits: check its parameters")
        parts = [_carry(exact, *_box(part.double(), eps))[:2] for part in x.split(batch_size)]
        low, high = (torch.cat(ends) for ends in zip(*parts, strict=True))
        check_logits(low, len(x))
        return low.where(~low.isnan(), -torch.inf), high.where(~high.isnan(), torch.inf)


def margin_bounds(model, x, y, *, eps, batch_size=500):
    """Upper bounds (N, classes), float64, of logit minus logit of the label y; 0 in the label's own column.

    The last layer is merged into the differences of logits, which is tighter than the difference of their `bounds`.
    Where all other columns are negative, every point of the ball is proved to be given its label. Arguments and errors
    as for `bounds`; labels that do not match, and a model that is not an nn.Sequential with a linear layer at its end.
    """
    return _in_batches(worst_margins, model, x, y, eps, batch_size)


def proved(margins, y):
    """Which inputs are proved robust by bounds (N, classes) as of `margin_bounds`, y their labels: booleans (N,)."""
    return margins.scatter(1, y[:, None], -torch.inf).amax(1) < 0


def certified_error(model, x, y, *, eps, batch_size=500):
    """Share of the inputs that are not `proved` robust by `margin_bounds`: an upper bound of the true robust error.

    At eps 0 it is the error, a tie for the largest logit counted as wrong. Arguments and errors as for `margin_bounds`.
    """
    margins = margin_bounds(model, x, y, eps=eps, batch_size=batch_size)
    return (~proved(margins, y)).double().mean().item()


def local_lipschitz(model, x, y, *, eps, batch_size=50):
    """Upper bounds L (N, classes), float64, of the local Lipschitz constants of the margins m_j = logit_j - logit_y.

    |m_j(a) - m_j(b)| <= L_j ||a - b||_inf for all a, b in [0, 1] within eps of x. L_j is the sum over the pixels of a
    bound of the partial derivative's absolute value. Arguments and errors as for `margin_bounds`; memory grows with
    batch_size times the number of classes.
    """
    return _in_batches(_gradient_norms, model, x, y, eps, batch_size)


class WeightBox(NamedTuple):
    """Bounds at all weights of a box: logits (N, classes), float64; mean cross-entropy (nats), floats.

    gradient: upper bound of the Euclidean norm of the loss's gradient with respect to the parameters, hence of the
    loss's Lipschitz constant: |L(a) - L(b)| <= gradient ||a - b||_2 for all a, b in the box.
    """

    logits_low: torch.Tensor
    logits_high: torch.Tensor
    loss_low: float
    loss_high: float
    gradient: float


def weight_box(model, x, y, *, radius):
    """Interval bounds where the inputs are fixed and every parameter moves by at most `radius`, on its own.

    The same arithmetic as for pixels, with weights that are intervals too: the product of two intervals with centres
    a, b and radii r, s lies within |a| s + r |b| + r s of a b. At radius 0 all bounds are the exact values.

    Args:
        model: an nn.Sequential of parameterless layers in RULES, nn.Linear and nn.Conv2d, in evaluation mode here.
        x: inputs (N, C, H, W), floating, in [0, 1]. y: labels (N,), int64. All at once.
        radius: in the units of the parameters, >= 0.
    Returns:
        WeightBox.
    Raises:
        ValueError: as for `margin_bounds`; another layer that has parameters, or a parameter that two layers share.
    """
    (x, y, _), radius = check_inputs(x, y), check_eps(radius, name="radius", norm="l2")
    with torch.inference_mode(False), torch.no_grad():
        exact, squares = _exact(model, backwards=True), []
        _split(exact)
        owned = [id(p) for layer in exact if _moves(layer) for p in layer.parameters()]
        if owned != [id(p) for p in exact.parameters()]:  # which names a parameter once
            raise ValueError("a box of weights takes nn.Linear and nn.Conv2d, not nested, that share no parameter")

        def carry(layer, low, high):
            return _moving(layer, low, high, radius, squares) if _moves(layer) else _carry(layer, low, high)

        low, high, back = _sequential(exact, x.double(), x.double(), carry)
        check_labels(low, y)
        own = torch.eye(low.shape[1], dtype=torch.bool, device=low.device)  # a class and its rivals at opposite ends
        p_low, p_high = (torch.where(own, a[:, None], b[:, None]).log_softmax(2).diagonal(dim1=1, dim2=2)
                         for a, b in ((low, high), (high, low)))  # fmt: skip
        loss_high, loss_low = (F.nll_loss(p, y).item() for p in (p_low, p_high))
        g = [(p.exp() - F.one_hot(y, len(own)))[None] / len(y) for p in (p_low, p_high)]
        back(*g)
        return WeightBox(low, high, loss_low, loss_high, sum(squares) ** 0.5)


def _moves(layer):
    return type(layer) in (nn.Linear, nn.Conv2d)


def _moving(layer, low, high, radius, squares):
    """As `_carry`, where the layer's parameters move too; `back` adds the squared norm of their gradient to squares.

    With inputs of middle m and half-width s, a weight w and its half-width r: |(w + dw)(m + dm) - w m| is at most
    (|w| + r) s + r |m|, which is a layer of weight `reach` at s and one of weight `move` at |m|; a bias adds r.
    """
    own, middle, spread = dict(layer.named_parameters()), (low + high) / 2, (high - low) / 2
    reach = {k: (p.abs() if k == "weight" else 0) + torch.full_like(p, radius) for k, p in own.items()}
    move = {k: torch.full_like(p, radius if k == "weight" else 0) for k, p in own.items()}

    def call(h, parameters):
        return functional_call(layer, parameters, (h,))

    def back(g_low, g_high):
        g, g_spread = (g_low[0] + g_high[0]) / 2, (g_high[0] - g_low[0]) / 2
        (to_h, to_own), (h_1, own_1), (h_2, own_2) = (
            vjp(call, *point)[1](v)
            for v, point in ((g, (middle, own)), (g_spread, (middle.abs() + spread, reach)), (g.abs(), (spread, move)))
        )
        largest = {k: to_own[k].abs() + own_1[k] + (own_2[k] if k == "weight" else 0) for k in own}
        squares.append(sum(t.square().sum().item() for t in largest.values()))
        return (to_h - h_1 - h_2)[None], (to_h + h_1 + h_2)[None]

    centre, half = call(middle, own), call(spread, reach) + call(middle.abs(), move)
    return centre - half, centre + half, back


def worst_margins(model, x, y, *, eps):
    """As `margin_bounds`, in the model's own type and mode, at once, differentiable in the parameters: for training."""
    check_inputs(x, y, eps)
    check_layers(model)
    body, last = _split(model)
    low, high, _ = _carry(body, *_box(x, eps))
    logits = last((low + high) / 2)
    spread = _differences(last, y).abs() @ ((high - low) / 2)[:, :, None]
    return logits - logits.gather(1, y[:, None]) + spread.squeeze(2)


def _gradient_norms(model, x, y, *, eps):
    body, last = _split(model)
    check_layers(body, backwards=True)
    *_, back = _carry(body, *_box(x, eps))
    rows = _differences(last, y).transpose(0, 1)
    return torch.maximum(*(g.abs() for g in back(rows, rows))).flatten(2).sum(2).T


def _in_batches(bound, model, x, y, eps, batch_size):
    (x, y, eps), batch_size = check_inputs(x, y, eps), check_count(1, batch_size=batch_size)
    with torch.inference_mode(False), torch.no_grad():
        exact = _exact(model)
        logits = exact(x[:1].double())
        check_logits(logits, 1)
        check_labels(logits.expand(len(y), -1), y)
        batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
        found = torch.cat([bound(exact, a.double(), b, eps=eps) for a, b in batches])
        return found.where(~found.isnan(), torch.inf)


def _exact(model, *, backwards=False):
    """A copy in float64 and evaluation mode, all of whose layers have a rule (`check_layers`)."""
    exact = copied(model).double().eval()
    check_layers(exact, backwards=backwards)
    return exact


def check_layers(model, *, backwards=False):
    """Raise ValueError, naming the layer, unless each has a rule in its mode, for gradients too if `backwards`."""
    for name, layer in model.named_modules():
        if objection := _objection(layer, backwards):
            kind = str(layer).splitlines()[0].removesuffix("(")
            raise ValueError(f"no interval bounds for layer {kind} ({name or 'the model itself'}): {objection}")


def _objection(layer, backwards):
    if type(layer) not in RULES:  # a subclass may compute something else
        known = ", ".join(k.__name__ for k in RULES)
        return f"known are {known} (a fixed normalisation is a BatchNorm2d with its mean and variance)"
    if layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer):
        return "hooks, such as those of weight_norm, or a forward of its own change what it computes"
    hooked = layer._backward_pre_hooks or (layer._backward_hooks and layer._is_full_backward_hook)
    if backwards and hooked and RULES[type(layer)] in (_affine, _convex):
        return "through full backward hooks PyTorch has no vjp"
    if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and (layer.training or layer.running_mean is None):
        return "by the statistics of a batch it mixes the inputs"
    if isinstance(layer, nn.Dropout) and layer.training:
        return "in training mode it is random"
    if isinstance(layer, nn.ELU) and not 0 <= layer.alpha <= 1:
        return "it is convex for alpha from 0 to 1 only"
    if isinstance(layer, nn.Softplus) and not (layer.beta > 0 and layer.threshold >= (20 if layer.beta >= 1 else 36)):
        return "it is not increasing and convex, or falls where it becomes linear"
    if isinstance(layer, nn.MaxPool2d) and (layer.ceil_mode or layer.return_indices):
        return "neither ceil_mode nor return_indices are known"
    if isinstance(layer, nn.AvgPool2d) and (layer.divisor_override or 1) < 0:
        return "a negative divisor_override exchanges low and high"
    return None


def _split(model):
    if type(model) is not nn.Sequential or len(model) == 0 or type(model[-1]) is not nn.Linear:
        raise ValueError(f"the model must be an nn.Sequential that ends in nn.Linear, got {type(model).__name__}")
    return model[:-1], model[-1]


def _box(x, eps):
    return (x - eps).clamp_min(0), (x + eps).clamp_max(1)


def _differences(last, y):
    """(N, classes, features): the weights of logit_j - logit_y."""
    return last.weight - last.weight[y][:, None]


def _carry(layer, low, high):
    """Carry the box [low, high] through a layer.

    Returns the box's image, low and high, and `back`: it takes bounds (K, N, ...) of K gradients with respect to the
    layer's output, at every point of the box, to bounds of those with respect to its input.
    """
    return RULES[type(layer)](layer, low, high)


def _sequential(layers, low, high, carry=_carry):
    backs = []
    for layer in layers:
        low, high, back = carry(layer, low, high)
        backs.insert(0, back)

    def back(g_low, g_high):
        for back in backs:
            g_low, g_high = back(g_low, g_high)
        return g_low, g_high

    return low, high, back


def _block(block, low, high):
    r_low, r_high, residual = _carry(block.residual, low, high)
    s_low, s_high, shortcut = _carry(nn.Sequential(block.every_second, block.shortcut), low, high)
    low, high, activation = _carry(block.activation, r_low + s_low, r_high + s_high)

    def back(g_low, g_high):
        g = activation(g_low, g_high)
        return tuple(a + b for a, b in zip(residual(*g), shortcut(*g), strict=True))

    return low, high, back


def _affine(layer, low, high):
    change = {"weight": torch.abs, "bias": torch.zeros_like, "running_mean": torch.zeros_like}
    tensors = {k: change[k](t) for k, t in [*layer.named_parameters(), *layer.named_buffers()] if k in change}

    def absolute(radius):
        return functional_call(layer, tensors, (radius,))

    def back(g_low, g_high):
        (middle,) = torch.vmap(vjp(layer, low)[1])((g_low + g_high) / 2)
        (spread,) = torch.vmap(vjp(absolute, low)[1])((g_high - g_low) / 2)
        return middle - spread, middle + spread

    middle, spread = layer((low + high) / 2), absolute((high - low) / 2)
    return middle - spread, middle + spread, back


def _convex(layer, low, high):
    """Non-decreasing and convex: so is the activation's derivative non-decreasing, and its ends are at the ends."""

    def value(t):
        return layer(t.clone())  # it may work in place

    def back(g_low, g_high):
        d_low, d_high = (vjp(value, t)[1](torch.ones_like(t))[0] for t in (low, high))
        return g_low * torch.where(g_low > 0, d_low, d_high), g_high * torch.where(g_high > 0, d_high, d_low)

    return value(low), value(high), back


def _max_pool(layer, low, high):
    size = {k: getattr(layer, k) for k in ("kernel_size", "stride", "dilation")}
    rows, columns = layer.padding if isinstance(layer.padding, tuple) else (layer.padding, layer.padding)

    def windows(t):
        """(N, channels, size of a window, windows)."""
        t = F.pad(t, (columns, columns, rows, rows), value=-torch.inf)
        return F.unfold(t, **size).unflatten(1, (t.shape[1], -1))

    def back(g_low, g_high):
        lows, highs = windows(low), windows(high)
        may = highs >= lows.amax(2, keepdim=True)  # which places can hold the largest value of their window
        must = may & (may.sum(2, keepdim=True) == 1)
        g_low, g_high = (g.flatten(3).unsqueeze(3) for g in (g_low, g_high))
        pull = torch.vmap(vjp(windows, low)[1])
        (g_low,) = pull(g_low * torch.where(g_low > 0, must, may))
        (g_high,) = pull(g_high * torch.where(g_high > 0, may, must))
        return g_low, g_high

    return layer(low), layer(high), back


RULES = {
    nn.Sequential: _sequential,
    BasicBlock: _block,
    **dict.fromkeys((nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
                     nn.Flatten, nn.Identity, nn.Dropout), _affine),
    **dict.fromkeys(ACTIVATIONS.values(), _convex),
    nn.MaxPool2d: _max_pool,
}  # fmt: skip
