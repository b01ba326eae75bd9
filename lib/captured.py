"""The gradients of a training step on a GPU, captured once as a CUDA graph and replayed for every mini-batch.

A step of adversarial training is some hundreds to thousands of kernels of a few microseconds each, and Python hands
them over more slowly than the card runs them. A graph hands over all of them at once. What it replays is what was
captured: nothing in it may be read by the CPU, and what changes from step to step stands in tensors of its own.
"""

import torch

from .attacks import LOSSES, frozen, input_gradient

WARM = 2  # passes before capturing, in which the libraries choose and set up what they use


class Captured:
    """The gradients of a model's loss at the worst inputs that projected gradient ascent finds (L-inf, cross entropy).

    Args:
        model: in training mode, on a GPU; its parameters' `grad` are set.
        loss_at: a function (x_adv, y) -> (loss, logits) of the model in training mode.
        num_steps: of the attack.
    """

    def __init__(self, model, loss_at, num_steps):
        self.model, self.loss_at, self.num_steps, self.graphs = model, loss_at, num_steps, {}

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
        buffers = {name: t.clone() for name, t in self.model.named_buffers()}  # training mode changes them
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM):
                gradients_at_worst(self.model, self.loss_at, self.num_steps, *inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            found = gradients_at_worst(self.model, self.loss_at, self.num_steps, *inputs)
        for name, t in self.model.named_buffers():
            t.copy_(buffers[name])
        return graph, inputs, found, [p.grad for p in self.model.parameters()]


def gradients_at_worst(model, loss_at, num_steps, x_adv, y, low, high, step_size):
    """What `Captured` captures: it sets the parameters' gradients, and returns loss, robust error and gradient norm."""
    with frozen(model, x_adv) as logits_of:
        for _ in range(num_steps):
            g, _ = input_gradient(logits_of, x_adv, y, LOSSES["ce"])
            x_adv = (x_adv + g.sign_() * step_size).clamp_(low, high)
    loss, logits = loss_at(x_adv, y)
    model.zero_grad()
    loss.backward()
    return measured(model, loss, logits, y)


def measured(model, loss, logits, y):
    """Loss, robust error and norm of the gradient, a tensor of three, not yet read by the CPU."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return torch.stack([loss.detach().double(), (logits.argmax(1) != y).double().mean(), norm.double()])
