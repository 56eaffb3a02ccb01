"""SimKD: simple knowledge distillation (Chen et al., CVPR 2022): the student's projected map against the teacher's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from distill.losses.inputs import teacher_of
from distill.losses.maps import smaller_grid, to_grid
from distill.precision import full_precision
from distill.protocols import Criterion, ModelFacts, ModelOutput, Needs, Target


def simkd_loss(projected: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference of two maps, the larger averaged adaptively: [B, C, H, W], [B, C, H', W'] -> [B].

    Source: DefangChen/SimKD 2b389c3, which takes the batch mean. Computed in float32 (float64 stays), no gradient to the
    teacher. Raises ValueError for other batches or channels.
    """
    if projected.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"projected map {list(projected.shape)} and teacher's {list(teacher.shape)} must have the same images and channels"
        )
    grid = smaller_grid(projected, teacher)
    return (
        (to_grid(full_precision(projected), *grid) - to_grid(full_precision(teacher.detach()), *grid)).square().mean((1, 2, 3))
    )


class SimKD(Criterion):
    """Simple knowledge distillation (SimKD; Chen et al., CVPR 2022): the batch mean of `simkd_loss` of the feature maps.

    The student is another model: body, projector and the teacher's classifier (`distill.models.simkd.SimKDStudent`), whose
    feature map is the projected one. It has nothing to train here, and its classifier is frozen; no cross-entropy is taken with
    it as published, so labels are not needed at all. Weight 1.

    Args:
        student: facts of the student: as many channels as the teacher.
        teacher: facts of the teacher.
        factor: the teacher's channels over the inner ones of the student's projector, which a run builds with it: 2 as
            published, 4 and 8 are cheaper.
    """

    @staticmethod
    def build_student(student: Any, teacher: Any, *, student_images: Tensor, teacher_images: Tensor, factor: int) -> nn.Module:
        """The student's body, a projector to the teacher's map, and the teacher's classifier: a `SimKDStudent`."""
        from distill.models.simkd import build_simkd_student  # brings timm, which takes 2 s and no other loss needs

        images = {"student_images": student_images, "teacher_images": teacher_images}
        return build_simkd_student(student, teacher, **images, factor=factor)

    def __init__(self, student: ModelFacts, teacher: ModelFacts, *, factor: int = 2) -> None:
        super().__init__()
        if not 1 <= factor <= teacher.stages[-1].channels:
            raise ValueError(f"factor {factor} must lie in 1..{teacher.stages[-1].channels}, the teacher's channels")
        self.student_needs = self.teacher_needs = Needs(stages=(-1,))
        own, other = student.stages[-1].channels, teacher.stages[-1].channels
        if own != other:
            raise ValueError(
                f"simkd compares the student's map of {own} channels with the teacher's of {other}; the student must be a "
                "simkd_student, which projects its map to the teacher's"
            )

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; labels are not read."""
        return simkd_loss(student.feature_map, teacher_of(teacher, "simkd").feature_map).mean(), {}
