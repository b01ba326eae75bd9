"""The audit against brute force; it must flag a masked network and pass a plain one."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib import audit, inference, models
from lib.attacks import fgsm, pgd
from lib.evaluation import error, predict, wrong

WEAK = {"eps": 0.08, "step_size": 0.04, "num_steps": 2, "random_start": "ball"}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def broken(model, x, y, attack):
    return wrong(model, x, y, attack).tolist()


@pytest.fixture
def batch(digits):
    return digits.x_test[:40], digits.y_test[:40]


class TestFirstFalls:
    def test_image_by_image_as_pgd_with_as_many_restarts(self, trained, batch):
        """pgd attacks from every start and picks the best; for a single image both draw the same starts."""
        seen = set()
        for i in range(20):
            x, y = batch[0][i : i + 1], batch[1][i : i + 1]
            (fall,) = audit.first_falls(trained, x, y, partial(pgd, **WEAK, generator=generator(i)), num_restarts=6,
                                        batch_size=1)  # fmt: skip
            for n in range(1, 7):
                x_adv = pgd(trained, x, y, **WEAK, num_restarts=n, generator=generator(i))
                assert (predict(trained, x_adv).argmax(1) != y).item() == (fall <= n)
            seen.add(min(fall, 7))
        assert len(seen) > 2  # some fall at once, some later, some never

    def test_more_restarts_never_weaken(self, trained, batch):
        falls = [np.array(audit.first_falls(trained, *batch, partial(pgd, **WEAK, generator=generator()),
                                            num_restarts=n, batch_size=40)) for n in (1, 3, 9)]  # fmt: skip
        for few, many, n in ((falls[0], falls[1], 1), (falls[1], falls[2], 3)):
            assert ((many <= n) == (few <= n)).all()
        assert (falls[2] <= 9).sum() > (falls[0] <= 1).sum()

    @pytest.mark.parametrize("batch_size", [1, 3, 7, 500])
    def test_attacks_only_images_still_standing(self, batch_size):
        """Image i falls to its call number i, image 0 without one; counted by the calls for each image."""
        calls = torch.zeros(5, dtype=torch.int64)

        class Reads(nn.Module):
            def forward(self, x):
                return torch.stack([torch.full((len(x),), 0.6), x.amax((1, 2, 3))], 1)

        def attack(_model, x, y):
            out = x.clone()
            for k, image in enumerate(out):
                i = round(image[0, 0, 0].item() * 10)
                calls[i] += 1
                if calls[i] == i:
                    out[k] = 1.0
            return out

        x = (torch.arange(5.0) / 10).view(5, 1, 1, 1).expand(5, 1, 2, 2).clone()
        x[0, 0, 1, 1] = 1.0
        y = torch.zeros(5, dtype=torch.int64)
        falls = audit.first_falls(Reads(), x, y, attack, num_restarts=3, batch_size=batch_size)
        assert falls == [0, 1, 2, 3, 4]
        assert calls[0] == 0 and calls.max() == 3
        if batch_size <= 3:  # no copies of an image go together: none is attacked again after it fell
            assert calls.tolist() == [0, 1, 2, 3, 3]

    def test_eps_zero_is_the_clean_error(self, trained, batch):
        mask = broken(trained, *batch, partial(pgd, eps=0.0, step_size=0.1, num_steps=3))
        assert np.mean(mask) == error(trained, *batch)
        assert mask == (predict(trained, batch[0]).argmax(1) != batch[1]).tolist()

    def test_at_eps_one_every_image_falls_and_beyond_is_refused(self, trained, batch):
        attack = partial(pgd, eps=1.0, step_size=0.1, num_steps=20, generator=generator())
        assert all(broken(trained, *batch, attack))
        with pytest.raises(ValueError, match="eps is a fraction of the pixel range"):
            broken(trained, *batch, partial(pgd, eps=1.01, step_size=0.1, num_steps=1))

    @pytest.mark.parametrize("change, message", [
        ({"num_restarts": 0}, "num_restarts must be an integer >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"x": torch.rand(0, 1, 28, 28), "y": torch.zeros(0, dtype=torch.int64)}, "no data"),
    ])  # fmt: skip
    def test_bad_input(self, trained, batch, change, message):
        arguments = {"model": trained, "x": batch[0], "y": batch[1], "attack": partial(fgsm, eps=0.1)} | change
        with pytest.raises(ValueError, match=message):
            audit.first_falls(**arguments)


@pytest.mark.parametrize("norm, eps", [("linf", 0.1), ("l2", 1.0)])
def test_fgsm_is_one_pgd_step_of_length_eps_from_x(trained, batch, norm, eps):
    x, y = batch
    step = partial(pgd, trained, x, y, eps=eps, step_size=eps, num_steps=1, norm=norm, random_start=False)
    assert torch.equal(fgsm(trained, x, y, eps=eps, norm=norm), step())
    one = step(precision="full")  # a low type rounds the gradient's direction to two or three digits
    a = x.clone().requires_grad_(True)
    (g,) = torch.autograd.grad(F.cross_entropy(trained(a), y, reduction="sum"), a)
    g = g.sign() if norm == "linf" else g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    # Where the gradient is all rounding, such as in the black border, its sign is anybody's.
    same = ((one - (x + eps * g).clamp(0, 1)).abs() < 1e-4).double().mean()
    assert same > 0.99


class TestWorstCase:
    def test_at_least_as_strong_as_each(self):
        rng = np.random.default_rng(0)
        masks = {f"attack {i}": rng.random(50) < 0.2 for i in range(5)}
        worst = audit.worst_case(masks)
        assert all((worst >= mask).all() for mask in masks.values())
        assert worst.tolist() == [any(mask[i] for mask in masks.values()) for i in range(50)]

    @pytest.mark.parametrize("masks, message", [
        ({}, "no attacks: a worst case needs at least one mask"),
        ({"a": [True], "b": [True, False]}, "unequal length"),
        ({"a": np.ma.masked_array([True, False], [True, False])}, "a mask holds booleans"),
    ])  # fmt: skip
    def test_bad_input(self, masks, message):
        with pytest.raises(ValueError, match=message):
            audit.worst_case(masks)


def audited(network, surrogate, x, y, eps):
    """What the notebook does, small."""
    iterated = {"step_size": 0.25 * eps, "num_steps": 20}
    step = partial(pgd, generator=generator(), random_start="ball")
    rivals = {
        "FGSM": broken(network, x, y, partial(fgsm, eps=eps)),
        "Square": broken(network, x, y, audit.attack_by_name("square", eps=eps, num_queries=100)),
        "transfer": broken(network, x, y, lambda _m, a, b: step(surrogate, a, b, eps=eps, **iterated)),
        "noise": broken(network, x, y, audit.attack_by_name("noise", eps=eps)),
    }
    by_eps = {e: broken(network, x, y, partial(step, eps=e, step_size=0.25 * e, num_steps=20)) for e in
              (0.0, eps, 0.5, 1.0)}  # fmt: skip
    return audit.signs(by_eps[eps], rivals, by_eps, audit.flat(network, x, y))


@pytest.fixture(scope="module")
def hardened(digits):
    """PGD-trained for a few seconds, without anything that could mask its gradients."""
    model = models.build("lenet", seed=1, width=2)
    optimizer, g = torch.optim.Adam(model.parameters(), lr=3e-3), generator()
    for _ in range(2):
        for x, y in zip(digits.x_train.split(100), digits.y_train.split(100), strict=True):
            x = pgd(model, x, y, eps=0.1, step_size=0.07, num_steps=2, generator=g)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


class TestSigns:
    def test_a_plain_network_shows_none(self, hardened, trained, digits):
        found = audited(hardened, trained, digits.x_test[:100], digits.y_test[:100], 0.1)
        assert len(found) == 7 and all(mask.mean() <= 0.03 for mask in found.values()), found

    @pytest.mark.parametrize("how", [{"levels": 256}, {"scale": 1e5}])
    def test_a_masked_network_shows_them(self, trained, hardened, digits, how):
        x, y = digits.x_test[:100], digits.y_test[:100]
        masked = audit.Masked(trained, **how)
        assert (predict(masked, x).argmax(1) == predict(trained, x).argmax(1)).all()  # it answers as before
        found = audited(masked, hardened, x, y, 0.1)
        rule = inference.at_most("images that show a sign", bound=0.05)
        square = ["only Square breaks it"] * ("levels" in how)  # of probabilities that are 0 and 1 it sees no slope
        for sign in ("only transfer breaks it", *square, "it stands at eps 1", "its loss is flat"):
            assert rule(found[sign].sum(), len(x)).holds is False

    def test_flat_is_a_gradient_of_zero(self, trained, batch):
        assert not any(audit.flat(trained, *batch))
        assert all(audit.flat(audit.Masked(trained, levels=8), *batch))
        assert audit.flat(trained, *batch, batch_size=7) == audit.flat(trained, *batch)

    def test_each_image_is_counted_where_it_belongs(self):
        a, b, c, d = np.eye(4, dtype=bool)  # one image each
        rivals, tried = {"noise": a | b, "SimBA": b | c | d}, {"SimBA": a | c | d}
        found = audit.signs(a | d, rivals, {1.0: a | b | c, 0.1: a | d, 0.2: a | c}, d, tried)
        assert {sign: mask.nonzero()[0].tolist() for sign, mask in found.items()} == {
            "only noise breaks it": [0], "only SimBA breaks it": [0], "it stands again at a larger eps": [3],
            "it stands at eps 1": [3], "its loss is flat": [3]}  # fmt: skip
        assert len(found["only noise breaks it"]) == 2  # b and c: those that the reported attack leaves
        assert len(found["only SimBA breaks it"]) == 1  # c: b was not tried, whatever its mask says there

    @pytest.mark.parametrize("change, message", [
        ({"rivals": {}}, "needs at least one rival and two eps, got 0 and 2"),
        ({"by_eps": {1.0: [True] * 4}}, "got 1 and 1"),
        ({"flat": [True] * 3}, "unequal length"),
        ({"rivals": {"noise": [True] * 5}}, "unequal length"),
        ({"tried": {"noise": [True] * 5}}, "unequal length"),
    ])  # fmt: skip
    def test_bad_input(self, change, message):
        mask = [True, False, True, False]
        arguments = {"reported": mask, "rivals": {"noise": mask}, "by_eps": {0.1: mask, 1.0: mask}, "flat": mask}
        with pytest.raises(ValueError, match=message):
            audit.signs(**arguments | change)


OWN = {  # attack: its settings; the mean move of a pixel and the label's mean logit, of a usual network and a sure one
    "fgsm": ({}, [2.7613608e-04, 1.23372646, 8.2766004e-05, 126.495895]),
    "pgd": (
        {"step_size": 0.02, "num_steps": 5, "num_restarts": 2},
        [2.5803370e-04, 1.22673155, 3.7412953e-04, 126.092241],
    ),
    "simba": ({"num_queries": 60}, [1.8778462e-04, 1.33197620, 2.6627080e-04, 133.400890]),
    "noise": ({}, [7.1494776e-05, 1.33956220, 7.1494776e-05, 133.956220]),
}


@pytest.mark.parametrize("name", OWN)
def test_attacks_of_our_own_find_what_their_version_says(name):
    """If one is meant to find otherwise: raise `audit.VERSION`, so that what is remembered is not taken for it."""
    settings, expected = OWN[name]
    x, found = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)).double(), []
    for scale in (10, 1000):  # at the second the labels' probabilities are 1, up to rounding
        model = models.build("lenet", seed=0, width=1).double().eval()
        for parameter in model[-1].parameters():
            parameter.data *= scale
        y = predict(model, x).argmax(1)
        x_adv = audit.attack_by_name(name, eps=0.02, **settings)(model, x, y)
        found += [(x_adv - x).mean().item(), predict(model, x_adv).gather(1, y[:, None]).mean().item()]
    assert audit.VERSION == 3 and found == pytest.approx(expected, rel=1e-6)


class TestSubject:
    def test_results_are_remembered_by_what_decides_them(self, trained, batch, tmp_path, monkeypatch):
        monkeypatch.setenv("RUNS_DIR", str(tmp_path))
        subject = audit.Subject(trained, *batch, {"network": "trained"})
        mask = subject.mask("fgsm", eps=0.1)
        assert mask.tolist() == broken(trained, *batch, partial(fgsm, eps=0.1))
        other = audit.Subject(audit.Masked(trained, levels=2), *batch, {"network": "trained"})
        assert (other.mask("fgsm", eps=0.1) == mask).all()  # same facts: read, not computed
        assert not (audit.Subject(other.network, *batch, {"network": "2"}).mask("fgsm", eps=0.1) == mask).all()
        falls = subject.falls("pgd", restarts=3, **WEAK)
        assert (subject.mask("pgd", restarts=3, **WEAK) == (np.array(falls) <= 3)).all()
        away = subject.mask("pgd", source=subject, **WEAK)
        assert (away == subject.mask("pgd", **WEAK)).all()
        with pytest.raises(ValueError, match="facts must not name seed"):  # the second of two seeds would be the first
            audit.Subject(trained, *batch, {"network": "trained", "seed": 1})
        few = audit.Subject(trained, *(t[:7] for t in batch), {"network": "trained"})
        with pytest.raises(ValueError, match="these facts name 40 images, and here are 7"):
            few.mask("fgsm", eps=0.1)

    @pytest.mark.parametrize("name, settings, message", [
        ("cw", {"eps": 0.1}, "unknown attack 'cw': choose one of pgd, fgsm, simba, noise, apgd-ce"),
        ("square", {"eps": 0.1, "num_queries": 0}, "num_queries must be an integer >= 1, got 0"),
        ("simba", {"eps": 0.1, "num_queries": 0}, "num_queries must be an integer >= 1, got 0"),
    ])  # fmt: skip
    def test_bad_input(self, trained, batch, tmp_path, monkeypatch, name, settings, message):
        monkeypatch.setenv("RUNS_DIR", str(tmp_path))
        with pytest.raises(ValueError, match=message):
            audit.Subject(trained, *batch, {}).mask(name, **settings)


def test_masks_have_names():
    with pytest.raises(ValueError, match="masks must have names"):
        audit.worst_case([np.array([True]), np.array([False])])


def test_numbers_of_restarts_are_no_masks():
    curve = {0.1: [True] * 3, 1.0: [True] * 3}
    with pytest.raises(ValueError, match="a mask holds booleans, one per image, got int64"):
        audit.worst_case({"a": [1, 2, 2]})
    with pytest.raises(ValueError, match="a mask holds booleans, one per image, got int64"):
        audit.signs([False] * 3, {"n": [2, 2, 2]}, curve, [False] * 3)
