"""What every loss does to its inputs first: full precision, and one-line errors for shapes and labels that cannot be right.

Shapes and types are checked in every call, for they cost nothing. Values are checked only where that needs no waiting for a
device: labels on the CPU by the host, labels on a GPU by an assertion on the device. NaN and infinity are never repaired: they
go through to the loss, where the training loop sees and names them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.protocols import ModelFacts, ModelOutput


def check_pair(student: Tensor, teacher: Tensor, what: str, dimensions: int | None = None) -> None:
    """Raises ValueError unless both are floating-point tensors of one non-empty shape (with this number of dimensions)."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what}: student {list(student.shape)} and teacher {list(teacher.shape)} differ; both must have one shape"
        )
    if dimensions is not None and student.dim() != dimensions:
        raise ValueError(f"{what}: got {list(student.shape)}, {student.dim()} dimensions; it must have {dimensions}")
    if student.dim() == 0 or student.numel() == 0:
        raise ValueError(f"{what}: got shape {list(student.shape)}; it must hold at least one row and one column")
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not tensor.is_floating_point():
            raise ValueError(f"{what}: the {name} is {tensor.dtype}; it must be floating point")


def soft_labels(labels: Tensor, logits: Tensor) -> bool:
    """True for soft labels, float [..., K] like the logits; False for class indices, integer [...].

    Raises ValueError for any other shape or type, and for an index outside 0..K-1 (on a GPU a device-side assertion stops
    the process instead, which needs no synchronisation).
    """
    if labels.is_floating_point():
        if labels.shape != logits.shape:
            raise ValueError(f"soft labels {list(labels.shape)} must have the shape of the logits {list(logits.shape)}")
        return True
    if labels.dtype == torch.bool or labels.is_complex():
        raise ValueError(f"labels are {labels.dtype}; give integer class indices or floating-point soft labels")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {list(labels.shape)} must be {list(logits.shape[:-1])}, one class index per row of logits")
    _check_indices(labels, logits.shape[-1])
    return False


def _check_indices(labels: Tensor, classes: int) -> None:
    if labels.device.type == "cuda":
        # not every loss reads its labels by a gather, which would assert this by itself
        torch._assert_async(((labels >= 0) & (labels < classes)).all())
    elif not torch.compiler.is_compiling():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"labels run from {low} to {high}; class indices must lie in 0..{classes - 1}")


def check_temperature(temperature: float | Tensor) -> None:
    """Raises ValueError unless the temperature is a positive, finite number, or a tensor of one number (of any value)."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature {list(temperature.shape)} must be one number")
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature {temperature} must be positive and finite")


def check_weights(**weights: float | None) -> None:
    """Raises ValueError for a weight that is negative or no finite number; None, a default, passes."""
    for name, weight in weights.items():
        if weight is not None and not 0 <= weight < float("inf"):
            raise ValueError(f"{name} {weight} must be finite and not negative")


def teacher_of(teacher: ModelOutput | None, loss: str) -> ModelOutput:
    """The teacher's output; raises ValueError where there is none."""
    if teacher is None:
        raise ValueError(f"{loss} compares with a teacher and got none; name a teacher, or leave {loss} out")
    return teacher


def check_classes(student: ModelFacts, teacher: ModelFacts, loss: str) -> None:
    """Raises ValueError unless both models have a classifier of the same number of classes."""
    if student.num_classes != teacher.num_classes or student.num_classes < 1:
        raise ValueError(
            f"{loss} compares classes and got a student of {student.num_classes} and a teacher of {teacher.num_classes}; "
            "give both one classifier's classes, or take a loss that reads feature maps"
        )


def check_rows(student: Tensor, teacher: Tensor, what: str, dimensions: tuple[int, ...]) -> None:
    """Raises ValueError unless both are floating-point [B, ...] of the same images, with one of these numbers of dimensions."""
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.dim() not in dimensions or tensor.numel() == 0:
            allowed = " or ".join(str(number) for number in dimensions)
            raise ValueError(
                f"{what}: the {name} is {list(tensor.shape)}; it must have {allowed} dimensions, none of them empty"
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{what}: the {name} is {tensor.dtype}; it must be floating point")
    if len(student) != len(teacher):
        raise ValueError(f"{what}: {len(student)} rows of the student and {len(teacher)} of the teacher; give the same images")


def embedding_of(output: ModelOutput) -> Tensor:
    """What the model's last linear layer reads, [B, D]; raises ValueError where the output lacks it."""
    if output.embedding is None:
        raise ValueError("the output has no embedding; ask for it with Needs(embedding=True)")
    return output.embedding


def check_embeddings(loss: str, **models: ModelFacts) -> None:
    """Raises ValueError for a model that has no last linear layer whose input could be compared."""
    for name, facts in models.items():
        if facts.embedding < 1:
            raise ValueError(
                f"{loss} reads what the last linear layer reads, and the {name} has no such layer; take one on maps, such as sp"
            )
