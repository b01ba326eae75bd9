"""What several test files share: digits, a small trained network, and no network connection."""

import urllib.request

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings

from lib import data, models

settings.register_profile("any machine", deadline=None)  # a slow or busy one is no fault
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def digits():
    """The 4,000 + 1,000 digits that need no network."""
    return data.load("mnist5k")


@pytest.fixture(scope="session")
def trained(digits):
    """A LeNet (width 2) trained for a few seconds by a plain loop: tests must not change it."""
    torch.set_num_threads(1)
    model = models.build("lenet", seed=0, width=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for x, y in list(zip(digits.x_train.split(100), digits.y_train.split(100), strict=True)) * 2:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(autouse=True)
def repeatable():
    """One thread, and the same numbers whichever tests have run before in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def offline(monkeypatch):
    """Every attempt to reach the network fails as it does without one."""

    def refuse(*_args, **_kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
