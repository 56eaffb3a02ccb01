"""DOT, the distillation-oriented trainer: SGD with one momentum for the task's gradient and another for the distillation's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Tensors = tuple[Tensor, ...] | list[Tensor]


class DOT(torch.optim.Optimizer):
    """SGD that remembers the distillation's gradient longer than the task's.

    With momentum m, `delta` d, weight decay w and learning rate r, a parameter p that both gradients reach moves so:

        v_task = (m - d) v_task + g_task + w p
        v_distillation = (m + d) v_distillation + g_distillation
        p = p - r (v_task + v_distillation)

    A parameter that only one of them reaches (a projector) has one momentum, m, and weight decay, as in PyTorch's SGD.

    `separate` comes before the backward pass of the whole loss, once for each micro-batch; a step without it is SGD's.
    Raises ValueError unless 0 <= d <= m and m + d < 1.
    Source: Zhao et al., ICCV 2023. mdistiller a08d46f leaves the weight decay out of the first step of a parameter that the
    distillation alone reaches; here every step decays it.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, *, delta: float | None = None, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        if not isinstance(delta, int | float):
            raise ValueError(f"optim.options: delta {delta} is no number; dot needs one, such as {{delta: 0.09}}, the paper's")
        if not 0 <= delta <= momentum:
            raise ValueError(f"optim.options: delta {delta} is not between 0 and optim.momentum {momentum}; the paper has 0.09")
        if momentum + delta >= 1:
            raise ValueError(f"optim.options: delta {delta} and optim.momentum {momentum} make 1 or more; lower either")
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})
        self._shared: list[Tensor] | None = None
        """The parameters that both gradients reach; known from the first call of `separate` on."""
        self._distillation: Tensors = ()
        """The distillation's gradient of the step so far, on this process, for each of these."""

    def separate(self, task: Tensor, distillation: Tensor) -> None:
        """Adds the distillation's gradient of a micro-batch to that of the step, and keeps the graph for the backward pass of
        task + distillation, which gives the parameters their `.grad`."""
        # autograd.grad fires no hook of DDP's: that one reduces what the backward pass of the sum leaves in .grad
        if self._shared is None:
            trained = [p for group in self.param_groups for p in group["params"]]
            sides = [torch.autograd.grad(side, trained, retain_graph=True, allow_unused=True) for side in (task, distillation)]
            self._shared = [p for p, *both in zip(trained, *sides, strict=True) if all(each is not None for each in both)]
        if self._shared:
            found = torch.autograd.grad(distillation, self._shared, retain_graph=True, materialize_grads=True)
            # not in place: two of them may be one tensor
            self._distillation = torch._foreach_add(self._distillation, found) if self._distillation else found

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves the parameters by their gradients. A collective on several processes, where `separate` was called."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        separated = dict(zip(self._shared or (), _averaged(self._distillation), strict=False))  # no gradients: SGD's step
        for group in self.param_groups:
            lr, momentum, delta = group["lr"], group["momentum"], group["delta"]
            moved = [p for p in group["params"] if p.grad is not None]
            shared, alone = ([p for p in moved if (p in separated) is wanted] for wanted in (True, False))
            if alone:
                self._move(alone, _decayed([p.grad for p in alone], alone, group), "momentum_buffer", momentum, lr)
            if shared:
                distillation = [separated[p] for p in shared]
                task = torch._foreach_sub([p.grad for p in shared], distillation)
                # the task's goes first: its decay reads the weights of before the step
                self._move(shared, _decayed(task, shared, group), "momentum_buffer", momentum - delta, lr)
                self._move(shared, distillation, "distillation_buffer", momentum + delta, lr)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, the distillation's too: so a step that was not made leaves nothing to the next."""
        super().zero_grad(set_to_none)
        self._distillation = ()

    def _move(self, parameters: list[Tensor], gradients: Tensors, name: str, momentum: float, lr: float) -> None:
        """Adds the gradients to the momentum of this name, and moves the parameters against it."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)  # so the first is the gradient itself, as SGD's is
        buffers = [self.state[parameter][name] for parameter in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        torch._foreach_add_(parameters, buffers, alpha=-lr)


def _decayed(gradients: Tensors, parameters: list[Tensor], group: dict[str, Any]) -> Tensors:
    """The gradients with the group's weight decay."""
    decay = group["weight_decay"]
    return torch._foreach_add(gradients, parameters, alpha=decay) if decay else gradients


def _averaged(gradients: Tensors) -> Tensors:
    """Means over all processes, as DDP gives them: one all-reduce for each type of number."""
    if not gradients or not dist.is_initialized() or dist.get_world_size() == 1:
        return gradients
    means = [torch.empty_like(gradient) for gradient in gradients]  # with its strides: the kernels of a step want them alike
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):  # not a set, whose order differs between processes
        mine = [(mean, gradient) for mean, gradient in zip(means, gradients, strict=True) if gradient.dtype == dtype]
        flat = torch.cat([gradient.flatten() for _, gradient in mine]) / dist.get_world_size()
        dist.all_reduce(flat)
        parts = flat.split([gradient.numel() for _, gradient in mine])
        torch._foreach_copy_([mean for mean, _ in mine], [p.view_as(m) for p, (m, _) in zip(parts, mine, strict=True)])
    return means
