"""The gradients of a training step on a GPU, captured once as a CUDA graph and replayed for every mini-batch.

A step of adversarial training is some hundreds to thousands of kernels of a few microseconds each, and Python hands
them over more slowly than the card runs them. A graph hands over all of them at once. What it replays is what was
captured: nothing in it may be read by the CPU, and what changes from step to step stands in tensors of its own.
"""

import torch
import torch.nn.functional as F

from .attacks import LOSSES, frozen, input_gradient
from .compute import fast_dtype
from .fast import channels_last

WARM = 2  # passes before capturing, in which the libraries choose and set up what they use


class Captured:
    """The gradients of a model's loss at the worst inputs that projected gradient ascent finds (L-inf, cross entropy).

    Args:
        model: in training mode, on a GPU; its parameters' `grad` are set.
        num_steps: of the attack.
    """

    def __init__(self, model, num_steps):
        self.model, self.num_steps, self.graphs = model, num_steps, {}

    def __call__(self, x_adv, y, low, high, step_size):
        """Gradients for one mini-batch, and a tensor of loss, robust error and gradient norm.

        Args:
            x_adv: where the attack starts (B, C, H, W); low, high: what it may not leave; y: labels (B,).
            step_size: a float.
        """
        given = [x_adv, y, low, high, torch.full((), step_size, device=x_adv.device)]
        if len(y) not in self.graphs:
            self.graphs[len(y)] = self.capture([t.clone() for t in given])
        graph, inputs, found, gradients = self.graphs[len(y)]
        torch._foreach_copy_(inputs, given)
        graph.replay()
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return found.clone()

    def capture(self, inputs):
        buffers = [t.clone() for t in self.model.buffers()]  # training mode changes them
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                gradients_at_worst(self.model, self.num_steps, *inputs)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            found = gradients_at_worst(self.model, self.num_steps, *inputs)
        for t, before in zip(self.model.buffers(), buffers, strict=True):
            t.copy_(before)
        return graph, inputs, found, [p.grad for p in self.model.parameters()]


def gradients_at_worst(model, num_steps, x_adv, y, low, high, step_size):
    """What `Captured` captures: it sets the parameters' gradients, and returns loss, robust error and gradient norm.

    A gradient at the inputs that is not finite cannot be refused here, and its sign would be 0: the loss is NaN then.
    """
    strange = torch.zeros((), device=x_adv.device)
    with frozen(model, x_adv) as logits_of:
        for _ in range(num_steps):
            g, _ = input_gradient(logits_of, x_adv, y, LOSSES["ce"])
            strange = strange + 0 * g.sum()
            x_adv = (x_adv + g.sign_() * step_size).clamp_(low, high)
    loss, logits = loss_at(model, x_adv, y)
    model.zero_grad()
    loss.backward()
    return measured(model, loss + strange, logits, y)


def loss_at(model, x, y):
    """The model's loss at these inputs, and its logits, in the number format of training."""
    low = fast_dtype(x.device)
    with torch.autocast(x.device.type, dtype=low, enabled=low is not None, cache_enabled=False):
        logits = model(channels_last(x)).float()
    return F.cross_entropy(logits, y), logits


def measured(model, loss, logits, y):
    """Loss, robust error and norm of the gradient, a tensor of three, not yet read by the CPU."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return torch.stack([loss.detach().double(), (logits.argmax(1) != y).double().mean(), norm.double()])
