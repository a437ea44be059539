"""Training on a few CPU cores: Muon, an optimiser that needs few steps, and threads that share the work of a step."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Workers:
    """Threads that each take the next item of a list until none is left.

    Where other programs use the CPU too, this is faster than several threads inside every operation: those all wait for
    the slowest one hundreds of times a step, these once.

    part: how many samples a worker takes at once; with fewer, convolutions spend their time on laying out weights."""

    def __init__(self, model: nn.Module, count: int, part: int = 12) -> None:
        torch.set_num_threads(1)
        self.part = part
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        # A replica a worker, with the same weights, so that each has gradients of its own.
        self.replicas = [model] + [copy.deepcopy(model) for _ in range(count - 1)]
        for replica in self.replicas[1:]:
            for q, p in zip(replica.parameters(), model.parameters(), strict=True):
                q.data = p.data

    def each(self, work: Callable[[nn.Module, Any], None], items: Iterable[Any]) -> None:
        """Call work(the worker's replica of the model, item) for all items."""
        left = deque(items)

        def take(replica: nn.Module) -> None:
            while True:
                try:
                    item = left.popleft()
                except IndexError:
                    return
                work(replica, item)

        list(self.pool.map(take, self.replicas))  # list: raises what a worker raised

    def gradients(self, inputs: tuple[Tensor, ...], target: Tensor) -> float:
        """The mean squared error of model(*inputs), with its gradients in the model's `.grad`."""
        losses: list[float] = []

        def work(replica: nn.Module, tensors: tuple[Tensor, ...]) -> None:
            *given, wanted = tensors
            loss = F.mse_loss(replica(*given), wanted, reduction="sum") / target.numel()
            loss.backward()
            losses.append(loss.item())

        self.each(work, zip(*(a.split(self.part) for a in (*inputs, target)), strict=True))
        for p, *others in zip(*(r.parameters() for r in self.replicas), strict=True):
            for q in others:
                if q.grad is not None:
                    p.grad = q.grad if p.grad is None else p.grad.add_(q.grad)
                    q.grad = None
        return math.fsum(losses)


class Muon(torch.optim.Optimizer):
    """Momentum, each matrix of it made orthogonal before it is added (Jordan et al. 2024).

    Every direction of a weight matrix then learns at the same speed. For hidden weights only, a convolution taken as
    the matrix [out, in * kernel]; biases, norms, embeddings, the first and the last layer belong to AdamW."""

    def __init__(
        self, params: list[nn.Parameter], workers: Workers, lr: float, momentum: float = 0.95, weight_decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.workers = workers

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        # Large ones first, so that no worker is still at one when the others have nothing left to do.
        group = self.param_groups[0]
        self.workers.each(self._update, sorted(group["params"], key=torch.numel, reverse=True))

    @torch.no_grad()
    def _update(self, _: nn.Module, p: nn.Parameter) -> None:
        if p.grad is None:
            return
        group, state = self.param_groups[0], self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - group["momentum"])
        update = orthogonalise(p.grad.lerp(state["momentum"], group["momentum"]).flatten(1))  # Nesterov's momentum
        # This scale gives the update the size that AdamW's have, so that both can go by one learning rate.
        scale = 0.2 * math.sqrt(max(update.shape))
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update.view_as(p), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Newton-Schulz iteration with Jordan's quintic: the same singular vectors, singular values near 1.

    Each step multiplies x from the left by a polynomial of x @ x.T. The products of these are all that changes, so the
    iteration runs on square matrices of the short side: a kernel's matrix is up to nine times as long as it is high."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    product = identity = torch.eye(len(x), dtype=x.dtype)
    for _ in range(5):
        step = a * identity + b * gram + c * gram @ gram
        product = step @ product
        gram = step @ gram @ step
    x = product @ x
    return x.T if tall else x
