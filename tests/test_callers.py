"""Whatever the caller brings (a state of autograd, a memory layout, a kind of module or number), the answer is the one
for plain contiguous tensors and an ordinary network, or a ValueError that names the cause."""

import copy
import itertools
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from fractions import Fraction
from functools import cached_property, partial
from unittest import mock

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import check_rounding
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from torch import nn
from torch.nn.utils import prune

from lib import attacks, audit, curvature, fast, landscape, models
from lib.attacks import as_function, autoattack, fgsm, pgd, simba
from lib.evaluation import attacked, evaluate, predict, robust_error, unit_activity, wrong


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


PGD = partial(pgd, eps=0.1, step_size=0.04, num_steps=2)
FUNCTIONS = {
    "pgd": lambda m, x, y: PGD(m, x, y, generator=generator()),
    "pgd, l2": lambda m, x, y: PGD(m, x, y, norm="l2", num_restarts=2, stop_early=True, generator=generator()),
    "fgsm": lambda m, x, y: fgsm(m, x, y, eps=0.1),
    "simba": lambda m, x, y: simba(m, x, y, eps=0.1, num_queries=4, generator=generator()),
    "autoattack": lambda m, x, y: autoattack(
        m, x, y, eps=0.1, attacks=("apgd-ce", "fab-t", "square"), num_steps=2, num_restarts=1, num_queries=3
    ),
    "predict": lambda m, x, y: predict(m, x),
    "wrong": lambda m, x, y: wrong(m, x, y, partial(PGD, generator=generator())),
    "evaluate": lambda m, x, y: evaluate(m, x, y, eps=0.1, step_size=0.04, num_steps=2),
    "first_falls": lambda m, x, y: audit.first_falls(m, x, y, partial(PGD, generator=generator()), num_restarts=2),
    "flat": lambda m, x, y: audit.flat(m, x, y),
    "unit_activity": lambda m, x, y: unit_activity(m, x),
}
every_function = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


class Views(nn.Module):
    """The textbook's network: it flattens by `view`, which takes one memory layout only."""

    def __init__(self, channels=2):
        super().__init__()
        self.c, self.relu, self.f = nn.Conv2d(channels, 4, 3, padding=1), nn.ReLU(), nn.Linear(4 * 64, 5)

    def forward(self, x):
        h = self.relu(self.c(x))
        return self.f(h.view(len(h), -1))


def network(kind="ours", seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "views":
            return Views().eval()
        layers = [nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(64, 5)).eval()


X, Y = torch.rand(6, 2, 8, 8, generator=generator()), torch.arange(6) % 5


def same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b) and not b.requires_grad and not b.is_inference()
    else:
        assert a == b


def inference(t):
    with torch.inference_mode():
        return t.clone()


STATES = {
    "gradients off": (torch.no_grad, lambda t: t),
    "inference mode": (torch.inference_mode, lambda t: t),
    "inference mode, tensors made there": (torch.inference_mode, inference),
    "tensors made in inference mode": (torch.enable_grad, inference),
    "autocast": (partial(torch.autocast, "cpu", torch.bfloat16), lambda t: t),
    "images that want gradients": (torch.enable_grad, lambda t: t.clone().requires_grad_(t.is_floating_point())),
}


@every_function
@pytest.mark.parametrize("kind", ["ours", "views"])
@pytest.mark.parametrize("state, bring", STATES.values(), ids=STATES)
def test_autograd_states(function, kind, state, bring):
    model, x, y = network(kind), bring(X), bring(Y)
    expected = function(model, X, Y)
    flags = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(model.parameters())]
    with state():
        found = function(model, x, y)
    same(expected, found)
    assert [p.requires_grad for p in model.parameters()] == flags and all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled() and x.grad is None


@pytest.mark.parametrize("name", ["pgd", "autoattack", "flat", "predict"])
def test_a_model_made_in_inference_mode(name):
    with torch.inference_mode():
        model = network()
    same(FUNCTIONS[name](network(), X, Y), FUNCTIONS[name](model, X, Y))


class Forgets(nn.Module):
    """A network that throws activations away and makes them again in the backward pass."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.inner, self.reentrant = network("views"), reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.inner(x)
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)


DERIVED = {
    "hessian": lambda m, x, y: curvature.Hessian(m, x, y)(landscape.random_directions(m, 1)[0]),
    "top_eigenpairs": lambda m, x, y: curvature.top_eigenpairs(m, x, y, k=2).values,
    "trace": lambda m, x, y: curvature.trace(m, x, y, num_probes=2),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("function", (FUNCTIONS | DERIVED).values(), ids=FUNCTIONS | DERIVED)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_activation_checkpointing(function, reentrant):
    """The plain network's answer, or a refusal; derivatives of the parameters would be zero, without a word."""
    expected = function(Forgets().eval(), X, Y)
    try:
        found = function(Forgets(reentrant).eval(), X, Y)
    except ValueError as error:
        assert "switch activation checkpointing off" in str(error)
    else:
        same(expected, found)


class Prepares(Views):
    """In evaluation mode it uses what it made of its weights when the mode changed."""

    def __init__(self, rebinds):
        super().__init__()
        self.rebinds, self.merged = rebinds, False
        self.extra = nn.Parameter(torch.ones(5, 4 * 64) / 100)
        self.register_buffer("sum", torch.zeros(5, 4 * 64))

    def train(self, mode=True):
        super().train(mode)
        if self.merged != (not mode):
            self.merged = not mode
            if self.rebinds:
                self.f.weight.data = self.f.weight.data + (1 if self.merged else -1) * self.extra.data
            else:
                self.sum.copy_(self.f.weight.data + self.extra.data)
        return self

    def forward(self, x):
        h = self.relu(self.c(x)).flatten(1)
        weight = self.f.weight if self.rebinds else self.sum
        return h @ (weight if self.merged else self.f.weight + self.extra).T


@every_function
@pytest.mark.parametrize("rebinds", [True, False])
def test_models_that_prepare_themselves_when_their_mode_changes(function, rebinds):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Prepares(rebinds)
    expected = function(model.eval(), X, Y)
    model.train()
    same(expected, function(model, X, Y))
    assert model.training and not model.merged


def _patched(model):
    before = model.forward
    model.forward = lambda x: before((x - 0.5) / 0.25)


def _lambdas(model):
    stages = [lambda x: model.relu(model.c(x)), lambda h: model.f(h.flatten(1))]
    model.stages = stages
    model.forward = lambda x: stages[1](stages[0](x))


def _hooked(model):
    model.register_forward_hook(lambda module, x, out: out * model.f.weight.norm())


def _beside(model):
    model.kept = model.f.weight.T * 2
    type(model).forward = lambda self, x: self.relu(self.c(x)).flatten(1) @ self.kept


STRAYS = {"patched forward": _patched, "lambdas": _lambdas, "hook": _hooked, "kept beside": _beside}
OTHER = network("views", 1)
MOVING = DERIVED | {
    "surface": lambda m, x, y: landscape.surface(m, landscape.random_directions(m, 1), [0.0, 0.5], x, y),
    "descent": landscape.descent_direction,
    "scatter": lambda m, x, y: landscape.scatter(
        m, landscape.random_directions(m, 1)[0], [0.1], x, y, partial(PGD, random_start=False)
    ),
    "connect": lambda m, x, y: landscape.connect(m, OTHER, x, y, epochs=1),
    "along": lambda m, x, y: landscape.along(landscape.Curve(m, OTHER), [0, 0.5], x, y),
}


@pytest.mark.parametrize("stray", STRAYS.values(), ids=STRAYS)
@pytest.mark.parametrize("function", MOVING.values(), ids=MOVING)
def test_what_a_copy_cannot_follow_is_refused(function, stray):
    """Its parameters would move, and the loss would not: flat surfaces and Hessians of zeros."""

    class Own(Views):
        pass

    model = Own().eval()
    flags = [p.requires_grad for p in model.parameters()]
    stray(model)
    with pytest.raises(ValueError, match="a copy of the model still computes with"):
        function(model, X, Y)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_cached_parametrisations_are_refused():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(128, 5))
    model = nn.Sequential(nn.Flatten(), model).eval()
    with nn.utils.parametrize.cached(), pytest.raises(ValueError, match=r"leave parametrize.cached\(\)"):
        landscape.surface(model, landscape.random_directions(model, 1), [0.0, 0.5], X, Y)


@pytest.mark.parametrize("shape", [(1,), (3,), (-1, 1), (2, -1)])
def test_a_hessian_takes_one_vector(shape):
    hessian = curvature.Hessian(network(), X, Y)
    v = torch.ones(hessian.size * (2 if shape[0] == 2 else 1)).view(shape) if -1 in shape else torch.ones(shape)
    with pytest.raises(ValueError, match=f"v must be \\({hessian.size},\\), one number for each parameter"):
        hessian(v)


@pytest.mark.parametrize("label", [-100, -1, 5])
def test_labels_that_the_model_has_no_class_for(label):
    y = Y.clone()
    y[2] = label
    curve = landscape.Curve(network("views"), network("views", 1))
    for function in (*FUNCTIONS.values(), *MOVING.values(), lambda m, x, y: landscape.along(curve, [0, 1], x, y)):
        if function not in (FUNCTIONS["predict"], FUNCTIONS["unit_activity"]):
            with pytest.raises(ValueError, match=f"labels run from .*{label}"):
                function(network("views"), X, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("function", (FUNCTIONS | MOVING).values(), ids=FUNCTIONS | MOVING)
def test_the_default_type_of_numbers_does_not_matter(function, dtype):
    def numbers(found):
        if isinstance(found, landscape.Curve):
            found = found.model(0.5).f.weight
        if isinstance(found, dict):
            found = [value for name, value in found.items() if name != "layer"]
        if isinstance(found, (tuple, list)):
            return torch.cat([numbers(part) for part in found])
        return torch.as_tensor(found, dtype=torch.float64).reshape(-1)

    model = network("views")
    expected = numbers(function(model, X, Y))
    torch.set_default_dtype(dtype)
    try:
        found = numbers(function(model, X, Y))
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("wrapper", ["compiled", "parallel"])
def test_hooks_on_a_wrapper_are_not_lost(wrapper):
    model = torch.compile(network(), backend="eager") if wrapper == "compiled" else nn.DataParallel(network())
    same(predict(network(), X), predict(model, X))
    model.register_forward_hook(lambda module, x, out: -out)
    with pytest.raises(ValueError, match=r"register the hooks of .* on the module inside"):
        predict(model, X)


def test_a_class_of_the_readers_may_call_its_part_as_a_compiled_one_does():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self._orig_mod = network("views")

        def forward(self, x):
            return -self._orig_mod(x)

    same(-predict(network("views"), X), predict(Mine().eval(), X))


LAYOUTS = {
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": lambda t: torch.stack([t, t], -1).flatten(3)[..., ::2],
    "offset": lambda t: torch.cat([t, t], 1)[:, 2:],
    "expanded": lambda t: t[:1].expand_as(t),
}


@every_function
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("kind", ["ours", "views"])
def test_memory_layouts_of_images(function, kind, layout):
    x = layout(X)
    same(function(network(kind), x.clone(memory_format=torch.contiguous_format), Y), function(network(kind), x, Y))


class Wraps(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.m, self.wrap = network(), wrap

    def forward(self, x):
        return self.wrap(self.m(x))


@every_function
@pytest.mark.parametrize("wrap", [
    lambda z: (z, z), lambda z: {"logits": z}, lambda z: z.tolist(), lambda z: None, lambda z: z[:, None],
    lambda z: z[:, 0], lambda z: z[:-1], lambda z: st,
])  # fmt: skip
def test_outputs_that_are_no_logits(function, wrap):
    with pytest.raises(ValueError, match=r"the model must return logits \(\d+, classes\), got"):
        function(Wraps(wrap).eval(), X, Y)


@every_function
@pytest.mark.parametrize("wrap", [torch.fft.fft, lambda z: z.to_sparse()])
def test_logits_that_are_no_real_numbers(function, wrap):
    with pytest.raises(ValueError, match="the model must return logits, one real number each, got torch"):
        function(Wraps(wrap).eval(), X, Y)


@every_function
def test_logits_of_a_finer_type_keep_their_differences(function):
    """In the images' type they were all alike: the model was reported to give the first class always."""
    model = Wraps(lambda z: z.double() * 1e-9 + 1e3).eval()
    best = network()(X).argmax(1)
    assert torch.equal(predict(model, X).argmax(1), best) and not wrong(model, X, best).any()
    assert function(model, X, best) is not None


class Energy(Wraps):
    """It moves the image along a gradient of its own first."""

    def __init__(self, switches):
        super().__init__(torch.tanh)
        self.switches = switches

    def forward(self, x):
        with torch.enable_grad() if self.switches else nullcontext():
            x = x if x.requires_grad else x.requires_grad_()
            (g,) = torch.autograd.grad(super().forward(x).logsumexp(1).sum(), x, create_graph=True)
            return super().forward(x + 0.1 * g)


@every_function
def test_models_that_differentiate_in_their_forward(function):
    """They are as sure of gradients as in use, or told how to be: where they only are used, PyTorch's are off."""
    function(Energy(True).eval(), X, Y)
    model = Energy(False).eval()
    expected = model(X.clone())
    try:
        function(model, X, Y)
    except ValueError as error:
        assert "let it switch them on (torch.enable_grad)" in str(error)
    assert torch.equal(model(X.clone()), expected)


class Learns(Wraps):
    """It adapts to each batch, by an optimiser of its own; or it only holds one."""

    def __init__(self, steps):
        super().__init__(torch.tanh)
        self.optimizer, self.steps = torch.optim.SGD(self.parameters(), lr=0.1), steps

    def forward(self, x):
        for _ in range(self.steps):
            with torch.enable_grad():
                super().forward(x.detach()).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return super().forward(x)


@every_function
def test_models_that_learn_while_they_are_used(function):
    """Their optimiser had the parameters, and the attack constants: the answers were of a model that does not learn."""
    same(function(Wraps(torch.tanh).eval(), X, Y), function(Learns(0).eval(), X, Y))
    with pytest.raises(ValueError, match="the model learns while it is used, by an optimiser that it holds"):
        function(Learns(1).eval(), X, Y)


class Cut(nn.Module):
    """Nothing goes back to the input, and a parameter is not used."""

    def __init__(self, rounds):
        super().__init__()
        self.f, self.unused, self.rounds = nn.Linear(128, 5), nn.Parameter(torch.ones(3)), rounds

    def forward(self, x):
        return self.f(x.flatten(1).round()) if self.rounds else self.f.bias.expand(len(x), -1)


class Unaware(Cut):
    @torch.no_grad()
    def forward(self, x):
        return self.f(x.flatten(1))


class Bits(Cut):
    def forward(self, x):
        return self.f((x.flatten(1) > 0.5).float())


CUT = {"pgd": PGD, "fgsm": partial(fgsm, eps=0.1)} | {
    name: partial(autoattack, eps=0.1, attacks=name, num_steps=2, num_queries=3) for name in attacks.LEAST_CLASSES
}


@pytest.mark.parametrize("attack", CUT)
@pytest.mark.parametrize("kind, cut", [(Unaware, True), (Bits, True), (lambda _: Cut(False), False), (Cut, False)])
def test_attacks_say_when_they_have_nothing_to_follow(kind, cut, attack):
    """A model of no_grad or whole numbers was reported as robust, without a word; a constant one is."""
    model = kind(True).eval()
    y = predict(model, X).argmax(1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        CUT[attack](model, X, y)
    said = [w for w in said if "no gradient leads from the model's output" in str(w.message)]
    assert bool(said) == (cut and attack != "square") and all(type(model).__name__ in str(w.message) for w in said)
    assert all(w.filename in (__file__, attacks.__file__) for w in said)  # not in the machinery between


class Caches(nn.Module):
    """In evaluation mode it keeps what it made of a parameter, as an attribute or in a dict."""

    def __init__(self, in_dict):
        super().__init__()
        self.scale, self.f = nn.Parameter(torch.linspace(0.5, 1.5, 128)), nn.Linear(128, 5)
        self.in_dict, self.kept, self.cache = in_dict, {}, None

    def train(self, mode=True):
        if mode:
            self.kept, self.cache = {}, None
        return super().train(mode)

    def forward(self, x):
        made = self.kept.get("scale") if self.in_dict else self.cache
        if made is None:
            made = self.scale * 1.0
        if not self.training and self.in_dict:
            self.kept["scale"] = made
        elif not self.training:
            self.cache = made
        return self.f(x.flatten(1) * made)


@pytest.mark.parametrize("in_dict", [False, True])
@pytest.mark.parametrize("used", [None, torch.no_grad, torch.enable_grad])
def test_models_that_keep_what_they_computed(in_dict, used):
    """A surface along such a parameter was flat, and its curvature zero."""
    for measure in (
        DERIVED["trace"],
        lambda m, x, y: landscape.surface(m, landscape.random_directions(m, 1), [0.0], x, y),
    ):
        model = Caches(in_dict).eval()
        if used:
            with used():
                model(X)
        with pytest.raises(ValueError, match=r"keeps what it has computed from its parameters|still computes with "):
            measure(model, X, Y)


def _as_attribute(model):
    if not hasattr(model, "weights"):
        model.weights = model.scale * 1.0
    return model.weights


def _as_cached(model):
    return model.cached


def _as_pair(model):
    if model.pair is None:
        model.pair = (model.scale * 0.5, model.scale * 0.5)
    return sum(model.pair)


def _as_buffer(model):
    if not model.ready:
        model.register_buffer("late", model.scale * 1.0)
        model.ready = True
    return model.late


def _in_place_of_one(model):
    if not model.ready:
        model.empty = model.scale * 1.0
        model.ready = True
    return model.empty


def _by_a_flag(model):
    if not model.ready:
        model.plain, model.ready = model.scale * 1.0, True
    return model.plain


def _in_a_child(model):
    if not model.ready:
        model.child.late, model.ready = model.scale * 1.0, True
    return model.child.late


def _in_a_childs_buffer(model):
    if not model.ready:
        model.child.register_buffer("late", model.scale * 1.0)
        model.ready = True
    return model.child.late


def _in_a_new_dict(model):
    if not hasattr(model, "several"):
        model.several = {"scale": model.scale * 1.0}
    return model.several["scale"]


class Late(nn.Module):
    """It makes something of its parameters when it is first run, keeps it in some way, and may note that it has."""

    def __init__(self, made):
        super().__init__()
        self.scale, self.f, self.made = nn.Parameter(torch.linspace(0.5, 1.5, 128)), nn.Linear(128, 5), made
        self.register_buffer("empty", torch.zeros(0))
        self.pair, self.plain, self.ready, self.child = None, None, False, nn.Identity()

    @cached_property
    def cached(self):
        return self.scale * 1.0

    def forward(self, x):
        return self.f(x.flatten(1) * self.made(self))


LATE = [
    _as_attribute, _as_cached, _as_pair, _as_buffer, _in_place_of_one, _by_a_flag, _in_a_child, _in_a_childs_buffer,
    _in_a_new_dict,
]  # fmt: skip


@every_function
@pytest.mark.parametrize("made", LATE)
def test_models_that_make_something_when_they_are_first_run(function, made):
    """What they note goes with what they keep: a note alone left the attack, and then its owner, without the rest."""
    torch.manual_seed(0)
    model, names = Late(made).eval(), [*Late(made).state_dict()]
    expected = copy.deepcopy(model)
    expected.made = lambda model: model.scale
    before = dict(vars(model))
    same(function(expected, X, Y), function(model, X, Y))
    assert vars(model) == before and [*model.state_dict()] == names
    nn.functional.cross_entropy(model(X), Y).backward()
    assert model.scale.grad is not None and model.scale.grad.any()


@every_function
def test_modules_with_two_names_keep_their_parameters(function):
    """An optimiser would have moved those that were the model's, without a word."""
    torch.manual_seed(0)
    model = Twice().eval()
    before = [(m, name, p) for m in model.modules() for name, p in m._parameters.items()]
    function(model, X, Y)
    assert all(m._parameters[name] is p for m, name, p in before)
    torch.testing.assert_close(predict(model, X), predict(network("views"), X))


@pytest.mark.parametrize("in_dict", [False, True])
def test_what_a_model_keeps_during_an_attack_goes_with_it(in_dict):
    model = Caches(in_dict).eval()
    PGD(model, X, Y)
    nn.functional.cross_entropy(model(X), Y).backward()
    assert model.scale.grad is not None and model.scale.grad.any()


class Plain(nn.Module):
    def __init__(self, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.f, self.before, self.after = nn.Linear(128, 5), before, after

    def forward(self, x):
        return self.after(self.f(self.before(x).flatten(1)))


def without_gradient(x):
    with torch.no_grad():
        return (x - 0.5) / 0.25


@pytest.mark.parametrize(
    "before, after",
    [
        (lambda x: x.sub_(0.5).div_(0.25), None),  # in place
        (without_gradient, None),
        (lambda x: x + ((x * 255).round() / 255 - x).detach(), None),  # straight through
        (None, lambda z: z.masked_fill(torch.arange(5) > 2, -1e9)),
        (None, lambda z: z.masked_fill(torch.arange(5) > 1, torch.finfo(torch.float32).min)),
    ],
)
def test_derivatives_by_the_parameters_do_not_ask_for_those_by_the_input(before, after):
    torch.manual_seed(0)
    model = Plain(*(f or (lambda t: t) for f in (before, after))).eval()
    y = torch.arange(6) % 2
    found = landscape.descent_direction(model, X, y)[0]
    logits = model(X.clone())
    expected = torch.autograd.grad(nn.functional.cross_entropy(logits, y), [*model.parameters()])
    expected = torch.cat([g.flatten() for g in expected])
    assert torch.nn.functional.cosine_similarity(found, -expected, 0) > 1 - 1e-6
    curvature.trace(model, X, y, num_probes=2)


def test_a_module_that_is_used_twice_is_named_and_not_fed_its_first_input_again():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.act = nn.Linear(128, 16), nn.Linear(16, 8), nn.Linear(8, 5), nn.GELU()

        def forward(self, x):
            h = self.act(self.a(x.flatten(1)))
            return self.c(self.act(self.b(h / h.norm(dim=1, keepdim=True).detach())))

    with pytest.raises(ValueError, match=r"derivative of the model itself \(Twice\) is not that of its values"):
        landscape.descent_direction(Twice().eval(), X, Y)


def test_a_module_that_returns_nothing():
    class Empty(Plain):
        def __init__(self):
            super().__init__()
            self.none = nn.Identity()

        def forward(self, x):
            return super().forward(x) + self.none(x[:, :0]).sum()

    assert torch.isfinite(landscape.descent_direction(Empty().eval(), X, Y)[0]).all()


SEEDED = {
    "autoattack": lambda seed: autoattack(network(), X, Y, eps=0.1, attacks=("square",), num_queries=3, seed=seed),
    "attack_by_name": lambda seed: audit.attack_by_name("pgd", eps=0.1, step_size=0.04, num_steps=1, seed=seed),
    "evaluate": lambda seed: evaluate(network(), X, Y, eps=0.1, step_size=0.04, num_steps=1, seed=seed),
    "trace": lambda seed: curvature.trace(network(), X, Y, num_probes=2, seed=seed),
    "random_directions": lambda seed: landscape.random_directions(network(), 1, seed=seed),
    "connect": lambda seed: landscape.connect(network("views"), network("views", 1), X, Y, epochs=1, seed=seed),
    "build": lambda seed: models.build("lenet", seed=seed, width=1),
}


@pytest.mark.parametrize("function", SEEDED.values(), ids=SEEDED)
def test_seeds_of_64_bits_are_taken_and_others_refused(function):
    for seed in (-(2**63), np.int64(-1), np.uint64(2**64 - 1), 2**63):
        function(seed)
    for seed in (np.random.SeedSequence(0).spawn(1)[0].entropy + 2**100, 2**64, -(2**63) - 1, 0.0, "0", None, True):
        with pytest.raises(ValueError, match="seed must be"):
            function(seed)


class Beside(nn.Module):
    """A network with a parameter that it hardly uses."""

    def __init__(self, parameter):
        super().__init__()
        self.inner, self.beside = nn.Sequential(nn.Flatten(), nn.Linear(128, 5)), parameter

    def forward(self, x):
        return self.inner(x) + self.beside.sum()


MEASURES = {
    "top_eigenpairs": lambda m: curvature.top_eigenpairs(m, X, Y, 1).values,
    "random_directions": lambda m: landscape.random_directions(m, 2),
    "descent_direction": lambda m: landscape.descent_direction(m, X, Y),
    "surface": lambda m: landscape.surface(m, torch.zeros(1, 645), [0.0], X, Y).loss,
    "connect": lambda m: landscape.connect(m, m, X, Y, epochs=1).points,
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("beside, message", [
    (nn.Parameter(torch.arange(3), requires_grad=False), r"'beside' is of torch\.int64"),
    (nn.Parameter(torch.ones(3, dtype=torch.bool), requires_grad=False), r"'beside' is of torch\.bool"),
    (nn.Parameter(torch.ones(3, dtype=torch.complex64)), "'beside' is complex"),
    (nn.UninitializedParameter(), "'beside' has no numbers yet: run the model once"),
])  # fmt: skip
def test_parameters_that_are_no_real_floating_point_numbers_are_named(measure, beside, message):
    with pytest.raises(ValueError, match=f"parameter {message}"):
        measure(Beside(beside).eval())


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3, 3)])
@pytest.mark.filterwarnings("error::UserWarning")
def test_parameters_without_numbers_change_nothing(measure, shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Beside(nn.Parameter(torch.zeros(shape))).eval()
    np.testing.assert_allclose(measure(model), measure(model.inner), rtol=1e-4, atol=1e-6)


def _tied(how):
    """Two layers whose weights are one in memory (how: a function of the first) or as a parameter (how None)."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 128), nn.Softplus(), nn.Linear(128, 128), nn.Linear(128, 5))
    first, second = model[1], model[3]
    if how is None:
        second.weight = first.weight
    else:
        how(first, second)
    return model.eval()


IN_MEMORY = {
    "data": lambda a, b: setattr(b.weight, "data", a.weight.data),
    "another parameter": lambda a, b: setattr(b, "weight", nn.Parameter(a.weight)),
    "transposed": lambda a, b: setattr(b, "weight", nn.Parameter(a.weight.t())),
    "a part": lambda a, b: setattr(b, "bias", nn.Parameter(a.weight.detach()[0])),
    "a buffer": lambda a, b: b.register_buffer("teacher", a.weight.data),
}


@pytest.mark.parametrize("measure", [curvature.trace, landscape.descent_direction])
@pytest.mark.parametrize("how", IN_MEMORY.values(), ids=IN_MEMORY)
def test_parameters_that_are_one_in_memory_alone_are_refused(measure, how):
    with pytest.raises(ValueError, match=r"3\.(weight|bias|teacher) and 1\.weight share their memory"):
        measure(_tied(how), X, Y)
    measure(_tied(None), X, Y)
    measure(_tied(lambda a, b: b.weight.data.copy_(a.weight.data)), X, Y)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
@pytest.mark.parametrize("last", [lambda z: z.softmax(1), lambda z: z.double().softmax(1).to(z),
                                  lambda z: z.abs() / z.abs().sum(1, keepdim=True)])  # fmt: skip
def test_probabilities_are_no_logits(measure, last):
    class Ends(nn.Sequential):
        def forward(self, x):
            return last(super().forward(x))

    model = Ends(nn.Flatten(), nn.Linear(128, 5)).eval()
    if measure is MEASURES["random_directions"]:
        measure(model)  # which are of its parameters alone
        return
    with pytest.raises(ValueError, match="returns probabilities, and the loss takes the softmax of logits"):
        measure(model)


def test_sparse_buffers():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mix", torch.eye(128).to_sparse())
            self.f = nn.Linear(128, 5)

        def forward(self, x):
            return self.f(torch.sparse.mm(self.mix, x.flatten(1).T).T)

    model = Sparse().eval()
    assert robust_error(model, X, Y, lambda m, x, y: x) == wrong(model, X, Y).double().mean()


def test_modules_that_only_hold_parametrizations_have_no_mode():
    model = network("views")
    nn.utils.parametrizations.weight_norm(model.f)
    assert np.isfinite(landscape.surface(model, landscape.random_directions(model, 1), [0.0], X, Y).loss).all()


def test_a_model_that_casts_by_itself_is_refused_by_that_name():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(128, 5).bfloat16()

        def forward(self, x):
            return self.f(x.flatten(1).bfloat16()).float()

    with pytest.raises(ValueError, match="casts by itself"):
        curvature.trace(Casts().eval(), X, Y)


@every_function
@pytest.mark.parametrize("rounds", [False, True])
def test_outputs_cut_off_from_the_input(function, rounds):
    found = function(Cut(rounds).eval(), X, Y)
    if function is FUNCTIONS["flat"]:
        assert all(found)


def normed(how):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old ones are deprecated, and in use
        how(model[0])
    return model


class Keeps(Views):
    """It keeps what it computed, with its graph, and cannot be copied."""

    def forward(self, x):
        self.seen = super().forward(x)
        return self.seen


class Writes(Views):
    """It normalises in place, or not."""

    def __init__(self, inplace):
        super().__init__()
        self.inplace = inplace

    def forward(self, x):
        return super().forward(x.sub_(0.5).div_(0.2) if self.inplace else (x - 0.5) / 0.2)


@every_function
def test_models_that_write_to_what_they_get(function):
    models_, x = [], X.clone()
    for inplace in (True, False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            models_.append(Writes(inplace).eval())
    same(function(models_[1], X, Y), function(models_[0], x, Y))
    assert torch.equal(x, X)


def test_a_stack_that_begins_with_an_activation_in_place():
    x, model = X - 0.5, nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(128, 5)).eval()
    before = x.clone()
    assert torch.allclose(predict(model, x), model(x.clone())) and torch.equal(x, before)


class Counts(Views):
    """Buffers that change in evaluation mode, too; and a mode that merges weights, as layers of low rank do."""

    def __init__(self):
        super().__init__()
        self.bn, self.merged = nn.BatchNorm2d(2), False
        self.register_buffer("n", torch.zeros(()))

    def train(self, mode=True):
        super().train(mode)
        self.bn.train()
        self.merged = not mode
        return self

    def forward(self, x):
        self.n += 1
        return super().forward(self.bn(x))


@every_function
@pytest.mark.parametrize("mode", [True, False])
def test_buffers_and_modes_are_put_back(function, mode):
    model = Counts().train(mode)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    function(model, X, Y)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.training, model.bn.training, model.merged) == (mode, True, not mode)


def test_a_parameter_that_is_a_buffer_too():
    model = Views().eval()
    model.register_buffer("again", model.f.bias)
    assert torch.equal(predict(model, X), model(X).detach())


def test_wrappers_of_parallel_training_and_torchscript():
    model = network("views")
    same(PGD(model, X, Y, generator=generator()), PGD(nn.DataParallel(model), X, Y, generator=generator()))
    with pytest.raises(ValueError, match="TorchScript keeps its weights"):
        predict(torch.jit.trace(model, X), X)


def test_an_attack_that_leaves_its_graph_on_what_it_returns():
    found = attacked(network(), X, Y, lambda m, x, y: (x + 0 * m(x).sum()).clamp(0, 1))
    assert torch.equal(found, X) and not found.requires_grad


def test_an_attack_that_leaves_the_model_in_another_state():
    def rude(model, x, y):
        model.train()
        for p in model.parameters():
            p.requires_grad_(False)
        return x.mul_(0.5)

    model, x = network(), X.clone()
    assert torch.equal(attacked(model, x, Y, rude), X / 2) and torch.equal(x, X)
    assert not any(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="an attack must return images"):
        attacked(model, x, Y, lambda m, x, y: (x, y))


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * float("nan")


@pytest.mark.parametrize("attack", ["apgd-ce", "fab"])
def test_a_gradient_that_is_nan_is_no_robustness(attack):
    class Net(Views):
        def forward(self, x):
            return super().forward(NoGradient.apply(x))

    model = Net().eval()
    y = model(X).argmax(1)  # an image that is misclassified is not attacked
    with pytest.raises(ValueError, match=r"gradient .* is NaN"):
        autoattack(model, X, y, eps=0.1, attacks=(attack,), num_steps=2, num_restarts=1)


def test_members_of_an_ensemble_that_return_no_logits():
    class Net(Views):
        def forward(self, x):
            return (super().forward(x),)

    with pytest.raises(ValueError, match="the model must return logits"):
        predict(models.Ensemble([Net().eval()]), X)


@every_function
def test_arrays_in_place_of_tensors(function):
    with pytest.raises(ValueError, match="x must be a tensor"):
        function(network(), X.numpy(), Y)


class SecondWay(Views):
    """A parameter that is reached by another way than its name."""

    def __init__(self):
        super().__init__()
        self.held = [self.f.weight]

    def forward(self, x):
        return nn.functional.linear(self.relu(self.c(x)).flatten(1), self.held[0], self.f.bias)


class Turned(nn.Conv2d):
    def forward(self, x):
        return -x


def keeps():
    model = Keeps().eval()
    model(X)
    return model


KINDS = {
    "weight_norm": lambda: normed(nn.utils.weight_norm),
    "parametrised weight_norm": lambda: normed(nn.utils.parametrizations.weight_norm),
    "spectral_norm": lambda: normed(nn.utils.spectral_norm),
    "parametrised spectral_norm": lambda: normed(nn.utils.parametrizations.spectral_norm),
    "compiled": lambda: torch.compile(network(), backend="eager"),
    "keeps a graph": keeps,
    "reached a second way": lambda: SecondWay().eval(),
    "hook": lambda: (lambda m: m[0].register_forward_hook(lambda *a: 2 * a[2]) and m)(network()),
    "own forward": lambda: (lambda m: setattr(m[5], "forward", lambda h: h[:, :5]) or m)(network()),
    "subclass": lambda: nn.Sequential(Turned(2, 4, 3), nn.Flatten(), nn.Linear(128, 5)).eval(),
    "no running statistics": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False),
                                                   nn.Flatten(), nn.Linear(144, 5)).eval(),
}  # fmt: skip


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_kinds_of_modules(make, low, monkeypatch):
    """The same logits, and all attacks run, in low precision too: that is for layers whose every step is known."""
    monkeypatch.setattr(attacks, "fast_dtype", lambda _device: low)
    model = make()
    check_rounding(predict(model, X), model, X)
    before = {k: (v, v.clone()) for k, v in model.state_dict().items()}
    for name in ("pgd", "simba", "autoattack", "flat"):
        FUNCTIONS[name](model, X, Y)
    check_rounding(predict(model, X), model, X)
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k][1])
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert unit_activity(model, X)[-1]["layer"] == "logits"


def test_an_activation_used_twice_or_never():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.g, self.a, self.never = nn.Linear(128, 6), nn.Linear(6, 5), nn.ReLU(), nn.ReLU()

        def forward(self, x):
            return self.a(self.g(self.a(self.f(x.flatten(1)))))

    model = Net().eval()
    found = unit_activity(model, X, batch_size=4)
    assert [(row["layer"], row["units"]) for row in found] == [("a", 6), ("a again", 5), ("logits", 5)]
    hidden = model.f(X.flatten(1)).relu()
    assert found[0]["dead"] == (hidden == 0).all(0).double().mean().item()


@given(
    eps=st.one_of(st.floats(1e-9, 1), st.fractions(0, 1).map(float), st.sampled_from([0.25, 0.5, 8 / 255, 2.0**-30])),
    dtype=st.sampled_from([torch.float32, torch.float64]), norm=st.sampled_from(["linf", "l2"]),
    attack=st.sampled_from(["pgd", "fgsm", "simba", "autoattack"]), seed=st.integers(0, 99), corners=st.booleans(),
)  # fmt: skip
@settings(max_examples=50)
def test_eps_is_kept_to_the_last_digit(eps, dtype, norm, attack, seed, corners):
    x = torch.rand(3, 2, 8, 8, generator=generator(seed)).to(dtype)
    x = (x * 3).round() / 3 if corners else x
    model, y = network(seed=seed).to(dtype), torch.arange(3)
    found = {
        "pgd": lambda: pgd(model, x, y, eps=eps, step_size=eps, num_steps=2, norm=norm, generator=generator(seed)),
        "fgsm": lambda: fgsm(model, x, y, eps=eps, norm=norm),
        "simba": lambda: simba(model, x, y, eps=eps, num_queries=5, norm=norm, generator=generator(seed)),
        "autoattack": lambda: autoattack(model, x, y, eps=eps, norm=norm, attacks=("apgd-ce",), num_steps=2),
    }[attack]()
    delta = (found.double() - x.double()).flatten(1)
    assert found.dtype == dtype and found.min() >= 0 and found.max() <= 1
    assert (delta.abs().max() if norm == "linf" else delta.norm(dim=1).max()) <= eps


@every_function
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_types_that_are_too_coarse_for_eps(function, kind):
    if function in (FUNCTIONS["predict"], FUNCTIONS["unit_activity"]):
        assert function(network().to(kind), X.to(kind), Y) is not None
    else:
        with pytest.raises(ValueError, match=r"x must be float32 or float64 .* convert it, and the model"):
            function(network().to(kind), X.to(kind), Y)


@every_function
@pytest.mark.parametrize("kind", ["ours", "views"])
def test_a_model_of_another_type_than_its_images(function, kind):
    with pytest.raises(ValueError, match=r"a model of torch.float64 .* does not take images of torch.float32"):
        function(network(kind).double(), X, Y)


NUMBERS = [np.float64, np.float32, lambda v: Fraction(v), np.float16]


@pytest.mark.parametrize("number", NUMBERS)
def test_every_number_is_a_number(number):
    eps, step = number(0.125), number(0.0625)
    expected = pgd(network(), X, Y, eps=0.125, step_size=0.0625, num_steps=2, generator=generator())
    found = pgd(network(), X, Y, eps=eps, step_size=step, num_steps=np.int64(2), num_restarts=np.int8(1),
                generator=generator())  # fmt: skip
    assert torch.equal(found, expected)
    many = {"num_steps": np.int64(2), "num_restarts": np.int64(1), "num_queries": np.int32(3)}
    expected = autoattack(network(), X, Y, eps=0.125, **{k: int(v) for k, v in many.items()})
    assert torch.equal(autoattack(network(), X, Y, eps=eps, **many), expected)


@pytest.mark.parametrize("logits", [
    lambda z: z * 0, lambda z: z * 1e6, lambda z: z * 1e-12, lambda z: z + 1e6, lambda z: z.round(),
    lambda z: torch.cat([z[:, :1]] * 5, 1),
])  # fmt: skip
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", attacks.LEAST_CLASSES)
def test_autoattack_on_degenerate_logits(attack, norm, logits):
    model = Wraps(logits).eval()
    try:
        found = autoattack(model, X, Y, eps=0.1, norm=norm, attacks=(attack,), num_steps=3, num_queries=20)
    except ValueError as error:
        assert str(error).startswith("square under l2 cannot attack images of (2, 8, 8) with such logits")
    else:
        stands = predict(model, found).argmax(1) == Y
        assert torch.equal(found[stands], X[stands]) and not found.isnan().any()


@pytest.mark.parametrize(
    "coarse", [lambda z: z.round(), lambda z: (z + 9).bfloat16(), lambda z: z - z, lambda z: z > 9]
)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("count", [1, 6])
def test_square_goes_on_while_an_image_stands(count, norm, coarse):
    """It took a tie for a fall and stopped there, though of equal logits the first is the answer."""
    model, calls = Wraps(coarse).eval(), []
    x = X[:count]
    y = predict(model, x).argmax(1)
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = autoattack(model, x, y, eps=0.01, norm=norm, attacks="square", num_queries=50)
    handle.remove()
    assert len(calls) >= 50 or wrong(model, found, y).all()


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (2, 1, 5, 9), (1, 2, 12, 6), (2, 1, 1, 1), (2, 1, 3, 3), (2, 1, 1, 7)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", attacks.LEAST_CLASSES)
def test_autoattack_on_images_of_every_shape(attack, norm, shape):
    x, y = torch.rand(shape, generator=generator()), torch.arange(shape[0])
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 5)).eval()
    y = predict(model, x).argmax(1)
    run = partial(autoattack, model, x, y, eps=0.1, norm=norm, attacks=(attack,), num_steps=3, num_queries=20)
    if (attack, norm) == ("square", "l2") and shape[2:] not in ((5, 5), (5, 9)):
        with pytest.raises(ValueError, match=r"square under l2 cannot attack images of"):
            run()
    else:
        assert run().shape == shape


@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t"])
def test_autoattack_is_the_packages_own_at_its_defaults(attack):
    x = torch.rand(2, 1, 6, 6, generator=generator())
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 10)).eval()
    y, eps = predict(model, x).argmax(1), 0.04
    found = autoattack(model, x, y, eps=eps, attacks=(attack,))
    with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"), attacks.frozen(model, x) as logits_of:
        whole = AutoAttack(logits_of, attacks=[attack], version="custom", eps=eps, seed=0, norm="Linf")
        whole.logger.disabled = True
        expected, _ = whole.run_standard_evaluation(x, y, batch_size=256)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_derives_its_checkpoints_from_its_steps(loss):
    model, eps = network("views"), 0.1
    y = predict(model, X).argmax(1)
    found = autoattack(model, X, y, eps=eps, attacks=(f"apgd-{loss}",), num_steps=20, num_restarts=1)
    with torch.random.fork_rng():
        whole = APGDAttack(model, n_iter=20, norm="Linf", n_restarts=1, eps=eps, seed=0, loss=loss, device="cpu")
        expected = whole.perturb(X, y)
    fell = predict(model, expected).argmax(1) != y
    assert fell.any()
    torch.testing.assert_close(found[fell], expected[fell], atol=1e-6, rtol=0)
    assert torch.equal(found[~fell], X[~fell])


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("restarts", [1, 3])
def test_stopping_early_breaks_no_fewer_images(trained, digits, norm, restarts):
    x, y, eps = digits.x_test[:100], digits.y_test[:100], {"linf": 0.07, "l2": 1.0}[norm]
    seen = []
    handle = trained.register_forward_pre_hook(lambda _m, inputs: seen.append(len(inputs[0])))
    run = partial(pgd, trained, x, y, eps=eps, step_size=eps / 4, num_steps=10, norm=norm, num_restarts=restarts)
    whole = run(generator=generator())
    steps, seen = sum(seen), seen.clear() or seen
    early = run(generator=generator(), stop_early=True)
    handle.remove()
    fallen = wrong(trained, whole, y)
    more = wrong(trained, early, y) & ~fallen  # images that fell on the way, and would have recovered by the end
    assert 0 < fallen.sum() < 100 and not (fallen & ~wrong(trained, early, y)).any()
    assert more.sum() <= (0 if restarts == 1 else 2)
    assert sum(seen) < 0.9 * steps
    assert robust_error(trained, x, y, partial(run.func, **run.keywords, stop_early=True, generator=generator())) > 0


class TestFast:
    """The network as a function (`lib.fast`) against the network."""

    @pytest.mark.parametrize("name, settings", [
        ("lenet", {"image_size": 12}), ("lenet", {"in_channels": 3, "image_size": 12}), ("vgg16", {}), ("resnet18", {}),
        ("resnet18", {"in_channels": 1}),
    ])  # fmt: skip
    @pytest.mark.parametrize("activation", models.ACTIVATIONS)
    def test_logits_and_gradients_of_every_architecture(self, name, settings, activation):
        model = models.build(name, seed=0, width=1, activation=activation, **settings).double()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for values in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                    values.uniform_(0.5, 1.5)
        size, channels = settings.get("image_size", 32), settings.get("in_channels", 1 if name == "lenet" else 3)
        check_fast(model.eval(), torch.rand(3, channels, size, size, dtype=torch.float64))
        x = torch.rand(3, channels, size, size)
        check_rounding(predict(model.float(), x), model, x)

    @given(st.data())
    @settings(max_examples=40)
    def test_random_stacks(self, data):
        torch.manual_seed(0)
        channels = c = data.draw(st.sampled_from([1, 2]))
        layers, side = [], 9
        for kind in data.draw(st.lists(st.sampled_from("cccbbrripds"), min_size=1, max_size=8)):
            if kind == "c":
                out = data.draw(st.sampled_from([1, 3]))
                k, p, s = data.draw(
                    st.sampled_from([(3, 1, 1), (3, 0, 1), (2, 1, 1), (3, "same", 1), (1, 0, 2), (3, 2, 2)])
                )
                mode = data.draw(st.sampled_from(["zeros", "reflect", "circular"]))
                if (mode != "zeros" and side < 4) or side < 3:
                    continue
                layers.append(nn.Conv2d(c, out, k, s, p, padding_mode=mode, bias=data.draw(st.booleans())))
                c = out
            elif kind == "b":
                affine, stats = data.draw(st.booleans()), data.draw(st.booleans())
                layers.append(nn.BatchNorm2d(c, affine=affine, track_running_stats=stats))
                if stats:
                    layers[-1].running_mean.uniform_(-1, 1)
                    layers[-1].running_var.uniform_(0.5, 2)
            elif (kind == "p" and side < 4) or (kind == "i" and not isinstance((layers or [0])[-1], nn.Conv2d)):
                continue  # in place on the caller's images, or on what a derivative needs: PyTorch refuses both
            else:
                layers.append({"r": nn.ReLU(), "i": nn.ReLU(inplace=True), "p": nn.MaxPool2d(2), "d": nn.Dropout(),
                               "s": nn.Sequential(nn.Identity())}[kind])  # fmt: skip
            side = nn.Sequential(*layers)(torch.rand(2, channels, 9, 9)).shape[-1]
        model = nn.Sequential(*layers, nn.Flatten()).double().eval()
        assert models.any_layout(model)
        with mock.patch.object(fast, "_places", return_value=data.draw(st.sampled_from([0, 16]))):
            check_fast(model, torch.rand(2, channels, 9, 9, dtype=torch.float64))

    @pytest.mark.parametrize("kernel, padding", [(3, 1), (5, 2), (1, 0), ((3, 2), (0, 1)), (2, 1), (3, 2), (3, 3)])
    def test_neighbours_made_at_once_are_those_made_one_by_one(self, kernel, padding, monkeypatch):
        monkeypatch.setattr(fast, "_places", lambda _weight: 16)
        torch.manual_seed(0)
        for c, out in ((1, 8), (3, 8), (8, 8), (8, 16), (16, 8), (4, 3), (16, 1), (9, 20), (20, 9)):
            layer = nn.Conv2d(c, out, kernel, padding=padding, bias=c != 8).double()
            few = padding != 3 and min(c, out) <= 8  # 3: beyond the kernel
            assert bool(fast._narrow(layer, layer.weight, layer.bias)) == few
            for side in (5, 8, 14):
                check_fast(layer, torch.rand(2, c, side, side + 2, dtype=torch.float64))
            made = as_function(layer.float())(fast.channels_last(torch.rand(2, c, 8, 8)))
            assert made.is_contiguous(memory_format=torch.channels_last)
            assert as_function(layer)(made.new_zeros(0, c, 8, 8)).shape == (0, *made.shape[1:])

    @pytest.mark.parametrize("size", list(itertools.product([1, 2, 3, 6], [1, 2, 3, 4])))
    def test_neighbours_made_at_once_on_images_of_a_few_pixels(self, size, monkeypatch):
        """In float32, which is computed by other kernels than float64: oneDNN's, which have their own faults."""
        monkeypatch.setattr(fast, "_places", lambda _weight: 16)
        torch.manual_seed(0)
        for c, out in ((1, 1), (1, 8), (8, 1), (3, 3)):
            layer, x = nn.Conv2d(c, out, 3, padding=1), torch.rand(3, c, *size)
            check_fast(layer, x, atol=1e-5, rtol=1e-5)

    def test_an_image_smaller_than_the_kernel_is_refused_in_the_words_of_pytorch(self, monkeypatch):
        monkeypatch.setattr(fast, "_places", lambda _weight: 16)
        with pytest.raises(RuntimeError, match=r"\(2 x 2\). Kernel size: \(5 x 5\)"):
            as_function(nn.Conv2d(3, 8, 5))(torch.rand(1, 3, 2, 2))

    def test_the_low_type_leaves_the_differences_of_large_logits(self, monkeypatch, trained, digits):
        monkeypatch.setattr(attacks, "fast_dtype", lambda _device: torch.bfloat16)
        x, y = digits.x_test[:60], digits.y_test[:60]
        for add, factor in ((0, 1), (3000, 1), (0, 50)):
            model = models.build("lenet", seed=0, width=2)
            model.load_state_dict(trained.state_dict())
            model[-1].weight.data *= factor
            model[-1].bias.data = model[-1].bias * factor + add
            run = partial(pgd, eps=0.06, step_size=0.015, num_steps=10, random_start=False)
            auto, full = (wrong(model, x, y, partial(run, precision=p)) for p in ("auto", "full"))
            assert auto.sum() >= full.sum() - 2 and full.sum() > 5


def check_fast(model, x, *, atol=1e-9, rtol=1e-9):
    before, direction = x.clone(), None
    outs = []
    for run in (model, attacks.as_function(model)):
        leaf = x.clone().requires_grad_()
        logits = run(leaf * 1)
        direction = torch.randn_like(logits) if direction is None else direction
        (g,) = torch.autograd.grad((logits * direction).sum(), leaf)
        outs.append((logits, g))
        with torch.no_grad():
            run(x)
        assert torch.equal(x, before)
    for a, b in zip(*outs, strict=True):
        torch.testing.assert_close(b, a, atol=atol, rtol=rtol)


@pytest.mark.parametrize("use", [
    lambda m, attack: attacked(m, X, Y, attack),
    lambda m, attack: wrong(m, X, Y, attack),
    lambda m, attack: audit.first_falls(m, X, Y, attack, num_restarts=2),
    lambda m, attack: landscape.connect(m, network(seed=1), X, Y, attack=attack, epochs=1),
], ids=["attacked", "wrong", "first_falls", "connect"])  # fmt: skip
def test_an_attack_that_writes_to_what_it_gets(use):
    """It is refused, or harmless, wherever an attack is called: the caller's images and model stay as they are."""

    def rude(model, x, y):
        model.train().requires_grad_(False)
        return x.mul_(0.5)

    model, before = network(), X.clone()
    use(model, rude)
    assert torch.equal(X, before)
    assert not any(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


class Asks(Views):
    """It goes on only where its weights want gradients, as backbones that are frozen by halves do."""

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.c.weight.requires_grad):
            h = self.relu(self.c(x))
        return self.f(h.flatten(1))


class Half(Views):
    """It shows a part of its parameters only, as those that are fine-tuned do."""

    def parameters(self, recurse=True):
        return self.f.parameters(recurse)


class Labelled(Views):
    """Its parameters have attributes, and have to be parameters."""

    def __init__(self):
        super().__init__()
        self.f.weight.scale = 2.0

    def forward(self, x):
        assert isinstance(self.f.weight, nn.Parameter)
        return super().forward(x) * (self.f.weight.scale / 2)


class Named(nn.Parameter):
    """A class of parameters with a method of its own."""

    def doubled(self):
        return self * 2


class Subclassed(Views):
    def __init__(self):
        super().__init__()
        self.f.weight = Named(self.f.weight.data / 2)

    def forward(self, x):
        return nn.functional.linear(self.relu(self.c(x)).flatten(1), self.f.weight.doubled(), self.f.bias)


class Noted(Views):
    """A buffer with an attribute, and one that has to be a buffer."""

    def __init__(self):
        super().__init__()
        one = torch.ones(())
        one.by = 2.0
        self.register_buffer("one", one)
        self.two = nn.Buffer(torch.full((), 2.0))

    def forward(self, x):
        assert isinstance(self.two, nn.Buffer)
        return super().forward(x) * (self.one * self.one.by / self.two)


class Twice(Views):
    """One module under two names, with a weight that a third has, too."""

    def __init__(self):
        super().__init__()
        self.again, self.tied = self.f, nn.Linear(4 * 64, 5)
        self.tied.weight = self.f.weight

    def forward(self, x):
        h = self.relu(self.c(x)).flatten(1)
        return (self.f(h) + self.again(h) + self.tied(h) - self.tied.bias + self.f.bias) / 3


class Again(Views):
    """It gives the same tensor again and again, as captured graphs do."""

    def forward(self, x):
        z = super().forward(x)
        if torch.is_grad_enabled():
            return z
        self.kept = self.kept.copy_(z) if len(getattr(self, "kept", ())) == len(z) else z
        return self.kept


@every_function
@pytest.mark.parametrize("kind", [Asks, Half, Labelled, Subclassed, Noted, Again])
def test_models_that_compute_as_the_textbooks_does(function, kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind().eval()
    places = [p for m in model.modules() for p in (*m._parameters.values(), *m._buffers.values())]
    same(function(network("views"), X, Y), function(model, X, Y))
    after = [p for m in model.modules() for p in (*m._parameters.values(), *m._buffers.values())]
    assert all(a is b for a, b in zip(places, after, strict=True))
    same(predict(network("views"), X), predict(model, X, batch_size=3))


class Jealous(torch.Tensor):
    """A class of tensors that refuses to meet another, as those of some libraries do."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        if any(kind not in (torch.Tensor, nn.Parameter, cls) for kind in kinds):
            return NotImplemented
        return super().__torch_function__(function, kinds, args, kwargs or {})


class Envious(Jealous):
    pass


@every_function
def test_classes_of_tensors_that_refuse_each_other(function):
    expected, found = (function(network("views"), *pair) for pair in
                       ((X, Y), (X.as_subclass(Jealous), Y.as_subclass(Envious))))  # fmt: skip
    same(expected, found.as_subclass(torch.Tensor) if isinstance(found, torch.Tensor) else found)


@every_function
def test_nothing_of_ours_stays_in_a_cache(function):
    model = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(128, 5))).eval()
    with nn.utils.parametrize.cached(), pytest.raises(ValueError, match=r"leave parametrize.cached\(\)"):
        function(model, X, Y)


def test_threads_may_share_a_model():
    class Slow(Views):
        def forward(self, x):
            time.sleep(0.01)
            return super().forward(x)

    model = Slow().train()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: predict(model, X), range(8)))
    assert all(torch.equal(found[0], z) for z in found)
    assert model.training and all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_members_that_write_to_what_they_get():
    class Normalises(Views):
        def forward(self, x):
            return super().forward(x.sub_(0.5).div_(0.2))

    members = [Normalises().eval(), Normalises().eval()]
    mean = sum(predict(m, X).softmax(1) for m in members) / 2
    torch.testing.assert_close(predict(models.Ensemble(members), X).softmax(1), mean)


def test_an_ensemble_of_our_networks_is_evaluated_as_these_are():
    members = [network().double(), network(seed=1).double()]
    ensemble = models.Ensemble(members).eval()
    assert models.any_layout(ensemble)
    check_fast(ensemble, X.double())
    mean = sum(predict(m, X.double()).softmax(1) for m in members) / 2
    torch.testing.assert_close(predict(ensemble, X.double()).softmax(1), mean)


@pytest.mark.parametrize("make", [iter, tuple, np.array, lambda names: (name for name in names)])
def test_attacks_named_in_any_way(make):
    model, y = network("views"), predict(network("views"), X).argmax(1)
    same(autoattack(model, X, y, eps=0.3, attacks=["apgd-ce"], num_steps=5),
         autoattack(model, X, y, eps=0.3, attacks=make(["apgd-ce"]), num_steps=5))  # fmt: skip


@pytest.mark.parametrize("number", [np.int64, np.uint8, np.int8])
def test_counts_of_numpy(number):
    model, y, n = network("views"), predict(network("views"), X).argmax(1), number(127)
    step = partial(fgsm, eps=0.001)
    assert audit.first_falls(model, X, y, step, num_restarts=n) == [128] * 6
    same(predict(model, X), predict(model, X, batch_size=number(3)))
    same(evaluate(model, X, y, eps=0.1, step_size=0.1, num_steps=1, seed=3),
         evaluate(model, X, y, eps=0.1, step_size=0.1, num_steps=number(1), seed=number(3)))  # fmt: skip
    assert torch.equal(models.build("lenet", seed=3, width=1)[0].weight,
                       models.build("lenet", seed=number(3), width=1)[0].weight)  # fmt: skip


@pytest.mark.parametrize("batch", ["train", "backward", "labels"])
def test_what_an_attack_of_the_readers_does_to_the_model_is_undone(batch):
    def rude(model, x, y):
        if batch == "train":
            model.train()
        x = x.requires_grad_()
        nn.functional.cross_entropy(model(x), y).backward()
        if batch == "labels":
            y.zero_()
        return (x + 0.1 * x.grad.sign()).clamp(0, 1).detach()

    model, y = network(), Y.clone()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    before = {k: t.clone() for k, t in model.state_dict().items()}
    attacked(model, X, y, rude)
    wrong(model, X, predict(model, X).argmax(1), rude)
    assert torch.equal(y, Y) and all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight)) and model[-1].weight.grad is None


@torch.no_grad()
def _perturbs(model):
    for p in model.parameters():
        p.add_(1)


def _replaces(model):
    model.f.weight = nn.Parameter(torch.zeros_like(model.f.weight))
    model.register_buffer("more", torch.ones(3))
    model.c.bias = None


@pytest.mark.parametrize(
    "does", [_perturbs, _replaces, lambda m: m.half(), lambda m: m.double(), lambda m: m.to("meta")]
)
@pytest.mark.parametrize("use", [robust_error, audit.first_falls])
def test_an_attack_that_changes_the_models_numbers_breaks_nothing(use, does):
    """What it had made of the model was judged, and stayed."""
    model = network("views")
    y, before = predict(model, X).argmax(1), {k: (t, t.clone()) for k, t in model.state_dict(keep_vars=True).items()}
    found = use(model, X, y, lambda m, x, y: (does(m), x)[1])
    assert found == 0 if use is robust_error else found == [2] * 6
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and all(after[k] is t and torch.equal(t, v) for k, (t, v) in before.items())


def test_hooks_on_all_modules_are_seen():
    def clamp(module, _, out):
        return out.clamp(-0.1, 0.1) if isinstance(module, nn.Linear) else None

    model = network()
    with nn.modules.module.register_module_forward_hook(clamp), torch.no_grad():
        same(model(X), predict(model, X))


def test_a_wrapper_with_a_forward_of_its_own_is_refused():
    class Normalises(nn.DataParallel):
        def forward(self, x):
            return super().forward((x - 0.5) / 0.2)

    with pytest.raises(ValueError, match="Normalises has a forward of its own"):
        predict(Normalises(network("views")), X)


def test_layers_of_a_compiled_part():
    torch._dynamo.reset()
    model = nn.Sequential(nn.Identity(), torch.compile(network("views"), backend="eager")).eval()
    predict(model, X)
    assert [row["layer"] for row in unit_activity(model, X)] == ["1._orig_mod.relu", "logits"]


def test_out_of_memory_is_said_as_it_is():
    class Full(Views):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls > 1:
                raise torch.OutOfMemoryError("no memory")
            return super().forward(x)

    with pytest.raises(torch.OutOfMemoryError):
        autoattack(Full().eval(), X.repeat(8, 1, 1, 1), torch.arange(48) % 5, eps=0.1)


@pytest.mark.parametrize("kind", ["ours", "views"])
@pytest.mark.parametrize("function", (FUNCTIONS | DERIVED).values(), ids=FUNCTIONS | DERIVED)
def test_another_default_device_than_the_images(function, kind):
    model, y = network(kind), predict(network(kind), X).argmax(1)
    expected = function(model, X, y)
    with torch.device("meta"):
        found = function(model, X, y)
    same(expected, found)


def test_another_default_device_than_the_parameters():
    model, other, direction = network(), network(seed=1), landscape.random_directions(network(), 1)
    for function in (
        lambda m, x, y: landscape.surface(m, direction, [0.0, 0.5], x, y),
        lambda m, x, y: landscape.scatter(m, direction[0], [0.1], x, y, partial(PGD, random_start=False)),
        lambda m, x, y: landscape.along(landscape.Curve(m, other, [direction[0]]), [0, 0.5], x, y, x_statistics=x),
    ):
        expected = function(model, X, Y)
        with torch.device("meta"):
            np.testing.assert_array_equal(function(model, X, Y), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_are_float32_whatever_the_default(dtype):
    torch.set_default_dtype(dtype)
    try:
        model = models.build("lenet", seed=0, width=1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(model[0].weight, models.build("lenet", seed=0, width=1)[0].weight)


def test_full_precision_is_full_whatever_was_chosen_for_products():
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.backends.mkldnn.conv
    seen, before = [], torch.get_float32_matmul_precision()

    class Looks(Views):
        def forward(self, x):
            seen.append([kind.fp32_precision for kind in backends])
            return super().forward(x)

    try:
        torch.set_float32_matmul_precision("medium")
        chosen = [kind.fp32_precision for kind in backends]
        predict(Looks(), X)
        assert seen == [["ieee"] * 3] and [kind.fp32_precision for kind in backends] == chosen != seen[0]
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("error", [TypeError, RuntimeError])
@pytest.mark.parametrize("name", ["pgd", "fgsm", "simba", "autoattack", "wrong", "first_falls"])
def test_devices_without_float64_are_refused_by_that_name(name, error):
    class There(torch.Tensor):
        """Images where there is none, as on Apple's GPUs."""

        @classmethod
        def __torch_function__(cls, function, kinds, args=(), kwargs=None):
            if function in (torch.Tensor.double, torch.Tensor.new_empty):
                raise error("Cannot convert a MPS Tensor to float64")
            return super().__torch_function__(function, kinds, args, kwargs or {})

    with pytest.raises(ValueError, match="has no float64, in which attacks keep to eps: take the CPU"):
        FUNCTIONS[name](network("views"), X.as_subclass(There), Y)


@pytest.mark.parametrize("function", MOVING.values(), ids=MOVING)
def test_what_is_measured_is_of_full_precision_whatever_was_chosen_for_products(function):
    backends = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul, torch.backends.mkldnn.conv
    seen, before = set(), torch.get_float32_matmul_precision()

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, g):  # in the first derivative and, as a part of it, in the second
            seen.update(kind.fp32_precision for kind in backends)
            return g.clone()

    class Looking(Views):
        def forward(self, x):
            seen.update(kind.fp32_precision for kind in backends)
            return Looks.apply(super().forward(x))

    model = Looking().eval()
    model.load_state_dict(network("views").state_dict())
    with mock.patch.object(landscape, "_check_alike", lambda *ends, leaves=True: None):  # one that looks, and another
        expected = function(model, X, Y)
        seen.clear()
        try:
            torch.set_float32_matmul_precision("medium")
            found = function(model, X, Y)
        finally:
            torch.set_float32_matmul_precision(before)
    assert seen == {"ieee"}
    if isinstance(found, landscape.Curve):
        found, expected = found.points, expected.points
    np.testing.assert_array_equal(found, expected)


def test_a_seed_for_all_devices_is_taken_back_on_all(monkeypatch):
    forked, fork = [], torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(list(devices)) or fork(devices=[]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    autoattack(network(), X, Y, eps=0.1, attacks="apgd-ce", num_steps=1)  # pyautoattack seeds them all
    assert [0, 1, 2] in forked


def test_a_pruned_weight_is_the_models_own_after_an_attack():
    pruned = prune.random_unstructured(Views().f, "weight", 0.5)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), pruned)
    model(X)
    PGD(model, X, Y)
    pruned.weight.square().sum().backward()
    assert pruned.weight_orig.grad is not None


def test_a_normalisation_of_another_width_is_an_error_in_evaluation_too():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(144, 3)).eval()
    for function in (model, partial(predict, model)):
        with pytest.raises(RuntimeError, match="should contain 4 elements not 1"):
            function(X)


@pytest.mark.parametrize("kind", [np.uint8, np.int16])
def test_widths_of_small_integers(kind):
    ours, plain = (models.build("lenet", seed=0, width=w, num_classes=n) for w, n in ((kind(16), kind(10)), (16, 10)))
    assert [p.shape for p in ours.parameters()] == [p.shape for p in plain.parameters()]
    assert next(models.vgg16(kind(8)).parameters()).shape[0] == 32


def test_long_perturbations_are_shortened():
    half = attacks.project(torch.full((1, 3, 224, 224), 200.0).half(), eps=1000.0, norm="l2")
    assert half.double().norm().item() == pytest.approx(1000, rel=2e-3)
    torch.testing.assert_close(attacks.project(torch.full((1, 4), 1e20), eps=1.0, norm="l2"), torch.full((1, 4), 0.5))


BAD = {
    "labels elsewhere": (lambda m: PGD(m, X, Y.to("meta")), "the labels are on meta, and the images on cpu"),
    "no pixels at hand": (lambda m: PGD(m, X.to("meta"), Y), "x must hold its pixels"),
    "sparse": (lambda m: PGD(m, X.to_sparse(), Y), "x must hold its pixels"),
    "empty images": (lambda m: PGD(m, X[:, :, :0], Y), r"x must be a tensor \(B, C, H, W\)"),
    "a seed for a generator": (lambda m: PGD(m, X, Y, generator=0), "generator must be None or torch.Generator"),
    "numpy's generator": (lambda m: simba(m, X, Y, eps=0.1, num_queries=2, generator=np.random.default_rng(0)),
                          "generator must be None or torch.Generator"),
    "a number": (lambda m: predict(m, torch.tensor(1.0)), "x must be a tensor"),
    "a text": (lambda m: predict(m, "abc"), "x must be a tensor"),
    "no seed": (lambda m: autoattack(m, X, Y, eps=0.1, seed=None), "seed must be an integer"),
    "beyond float32": (lambda m: PGD(m, X, Y, eps=1e39, norm="l2"), "eps must be finite"),
    "one logit": (lambda m: PGD(nn.Sequential(nn.Flatten(), nn.Linear(128, 1)).eval(), X, 0 * Y), "a single logit"),
    "exported": (lambda m: predict(torch.export.export(m, (X,)).module(), X), "has no evaluation mode"),
    "square again": (lambda m: audit.Subject(m, X, Y, {}).falls("square", restarts=2, eps=0.1), "its own num_restarts"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_refusals_that_name_the_cause(what):
    call, message = BAD[what]
    with pytest.raises(ValueError, match=message):
        call(network("views"))
