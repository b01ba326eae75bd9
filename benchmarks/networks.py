"""The networks whose speed is measured, and what one image takes forward."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from lib import models

NETWORKS = {  # (model, width, channels, side)
    "lenet w=4": ("lenet", 4, 1, 28), "lenet w=16": ("lenet", 16, 1, 28),
    "vgg16 w=2": ("vgg16", 2, 3, 32), "vgg16 w=8": ("vgg16", 8, 3, 32),
    "resnet18 w=2": ("resnet18", 2, 3, 32), "resnet18 w=8": ("resnet18", 8, 3, 32),
}  # fmt: skip


def network(model, width, channels, side, batch=64):
    """The network in evaluation mode, and a batch for it."""
    sizes = {"image_size": side} if model == "lenet" else {}
    net = models.build(model, seed=0, width=width, in_channels=channels, num_classes=10, **sizes).eval()
    generator = torch.Generator().manual_seed(0)
    return net, torch.rand(batch, channels, side, side, generator=generator), torch.arange(batch) % 10


def forward_operations(net, x):
    """Of one image through the network."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x[:1])
    return counter.get_total_flops()
