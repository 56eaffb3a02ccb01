"""The one module that DDP wraps: the student and every trained part of the losses. The teacher stays outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.errors import LossError
from distill.optim import Schedule
from distill.protocols import Criterion, Losses, ModelOutput, Target


class Distiller(nn.Module):
    """Student backbone and weighted criteria: images in, losses out.

    Each criterion has the schedule of its weight. A term whose weight is 0 is still computed: its projector must take part in
    every step for DDP, and its value is wanted in the log.
    """

    def __init__(
        self,
        student: nn.Module,
        criteria: Mapping[str, Criterion],
        weights: Mapping[str, Schedule],
        before_losses: Callable[[], None] = lambda: None,
    ) -> None:
        """before_losses: called when the student's forward pass is launched and the teacher's outputs are about to be read."""
        super().__init__()
        if criteria.keys() != weights.keys():
            raise ValueError(f"criteria {sorted(criteria)} and weights {sorted(weights)} differ; each term needs both")
        for name, criterion in criteria.items():
            unknown = criterion.no_weight_decay - {key for key, _ in criterion.named_parameters()}
            if unknown:
                raise ValueError(f"loss {name}: no_weight_decay names {sorted(unknown)}, which are none of its parameters")
        self.student = student
        self.criteria = nn.ModuleDict(criteria)
        self.weights = dict(weights)
        self.before_losses = before_losses
        self._can_rest = any(criterion.rests for criterion in criteria.values())
        self._distilling = {name for name, criterion in criteria.items() if criterion.teacher_needs is not None}
        # DDP sends rank 0's buffers to all ranks before every forward pass. The student's BatchNorm statistics need that: a
        # resumed run has rank 0's on every rank, so a run that goes on must have them too. A criterion's state does not: it is
        # kept alike on every rank by the criterion, and a memory bank is gigabytes. DDP reads this list.
        self._ddp_params_and_buffers_to_ignore = [f"criteria.{name}" for name, _ in self.criteria.named_buffers()]
        self._gradients_checked = False
        self.resting: tuple[nn.Parameter, ...] = ()
        """The trained parameters that no term with a weight reaches in the present epoch: the optimiser must leave them alone.
        A gradient of 0 would not do: weight decay and momentum would move them."""
        self._rested: tuple[int, frozenset[str]] | None = None
        """The epoch, and the terms with a weight, that `resting` is of."""

    def forward(self, images: Tensor, teacher: ModelOutput | None, target: Target) -> Losses:
        """images float [B, 3, H, W] in [0, 1], what the teacher gave for them, and what else the step knows -> `Losses`.

        Raises LossError for a criterion that reads what no needs ask for or gives something else than its protocol says, and,
        at the first step of training, for one that leaves its own parameters or everything without a gradient.
        """
        output = _asked(self.student(images), "student")
        self.before_losses()
        teacher = _asked(teacher, "teacher")
        terms: dict[str, Tensor] = {}
        statistics: dict[str, Tensor] = {}
        for name, criterion in self.criteria.items():
            try:
                given = criterion(output, teacher, target)
            except LossError as error:
                raise LossError(f"loss.{name}: {error}") from None
            terms[name], found = _checked(name, given)
            statistics |= {f"{name}/{key}": value for key, value in found.items()}
        weights = {name: self.weights[name](target.progress) for name in terms}
        weighted = {name: weights[name] * term for name, term in terms.items()}
        total = _sum(weighted.values())
        if self.training and torch.is_grad_enabled():
            if not self._gradients_checked:
                self._check_gradients(terms)
                self._gradients_checked = True
            if self._can_rest or not all(weights.values()) or self.resting:
                self._rest(terms, frozenset(name for name, weight in weights.items() if weight), target.progress.epoch)
                total = total + _nothing_of(self.resting)
        return Losses(total, terms, weighted, statistics)

    def _rest(self, terms: Mapping[str, Tensor], counting: frozenset[str], epoch: int) -> None:
        """Finds out which parameters rest, at the first call of an epoch and whenever other terms count."""
        if self._rested != (epoch, counting):
            reached: set[Tensor] = set().union(*(_reached(terms[name]) for name in counting))
            self.resting = tuple(p for p in self.parameters() if p.requires_grad and p not in reached)
            self._rested = epoch, counting

    def sides(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """The two parts of the total: the task's, of the terms that read no teacher, and the distillation's, of the others."""
        task, distillation = (
            _sum(term for name, term in losses.weighted.items() if (name in self._distilling) is wanted)
            for wanted in (False, True)
        )
        return task, distillation

    def _check_gradients(self, terms: Mapping[str, Tensor]) -> None:
        """Raises LossError for terms that train nothing, or not all parameters of their criterion: DDP would wait for their
        gradients and fail a step later, without a name, and one process alone would never say so.

        With several processes, also where no term reaches a parameter of the student; one process trains the others (a hint
        alone, before the classifier's turn).
        """
        trained: set[Tensor] = set()
        for name, term in terms.items():
            if not term.requires_grad:
                raise LossError(f"loss.{name}: its value has no gradient; compute it from the student's output, not detached")
            reached = _reached(term)
            trained |= reached
            own = self.criteria[name].named_parameters()
            idle = [key for key, parameter in own if parameter.requires_grad and parameter not in reached]
            if idle and not cast(Criterion, self.criteria[name]).rests:
                raise LossError(
                    f"loss.{name}: its value gives {', '.join(idle)} no gradient; compute it with every parameter in"
                    " every step, or drop those parameters"
                )
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        if idle := [key for key, p in self.student.named_parameters() if p.requires_grad and p not in trained]:
            raise LossError(
                f"loss: no term gives {', '.join(idle[:3])} of the student a gradient, and several processes wait for it; add"
                " one that reads the student's logits, with weight 0 if it is not to count, or train on one process"
            )

    @property
    def plain_student(self) -> nn.Module:
        """The timm model inside the student's backbone."""
        return cast(nn.Module, self.student.model)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that criteria keep from weight decay."""
        criteria = cast(Mapping[str, Criterion], self.criteria)
        return {f"criteria.{name}.{key}" for name, criterion in criteria.items() for key in criterion.no_weight_decay}

    def trained_state(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps: the plain student, and the criteria's parameters and state, apart."""
        return {"student": self.plain_student.state_dict(), "criteria": self.criteria.state_dict()}


class _Asked(ModelOutput):
    """A model's output that names the need that is missing, where a criterion reads an entry that nobody asked for."""

    side: str = "a model"

    def __getattribute__(self, name: str) -> Any:
        """The entry; LossError for one that is absent."""
        value = super().__getattribute__(name)
        if value is None and name in ModelOutput._fields:
            raise LossError(f"reads {self.side}.{name}, and its {self.side}_needs do not say so; set Needs({name}=True)")
        return value


class _AskedMaps(dict[Any, Tensor]):
    """The tensors of one entry, likewise."""

    def __init__(self, found: Mapping[Any, Tensor], side: str, entry: str) -> None:
        super().__init__(found)
        self.side, self.entry = side, entry

    def __missing__(self, key: Any) -> Tensor:
        where, needs = f"{self.side}.{self.entry}[{key}]", f"Needs({self.entry}=({key},))"
        raise LossError(f"reads {where}, and its {self.side}_needs do not say so; set {needs}")


def _asked(output: Any, side: str) -> Any:
    """A model's output as criteria are given it; None stays None."""
    if not isinstance(output, ModelOutput):
        return output
    entries: dict[str, Any] = output._asdict()
    entries |= {key: _AskedMaps(each, side, key) for key, each in entries.items() if isinstance(each, Mapping)}
    asked = _Asked(**entries)
    asked.side = side
    return asked


def _checked(name: str, given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """What a loss gave, if it is what the protocol says. Only types and shapes are looked at: that waits for no device."""
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], dict)):
        raise LossError(f"loss.{name}: forward gave {_named(given)}; it must give (loss, dictionary of statistics)")
    loss, statistics = given
    for what, value in (("the loss", loss), *((f"statistic {key}", value) for key, value in statistics.items())):
        if not isinstance(value, Tensor) or value.dim() > 0:
            raise LossError(f"loss.{name}: forward gave {_named(value)} as {what}; it must be a tensor of no dimension")
    return loss, statistics


def _sum(terms: Iterable[Tensor]) -> Tensor:
    """The sum of one or more terms."""
    return reduce(torch.add, terms)


def _nothing_of(parameters: Sequence[nn.Parameter]) -> Tensor | float:
    """0, with a gradient of 0 to each of the parameters: DDP waits for all of them in every step."""
    return 0.0 * torch.stack([parameter.flatten()[0].float() for parameter in parameters]).sum() if parameters else 0.0


def _reached(value: Tensor) -> set[Tensor]:
    """The tensors that a backward pass from `value` gives a gradient to. Reads the graph alone: it waits for no device."""
    if value.grad_fn is None:
        return {value}
    waiting, seen, leaves = [value.grad_fn], {value.grad_fn}, set()
    while waiting:
        node = waiting.pop()
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves.add(leaf)
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        waiting += following
    return leaves


def _named(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
