"""CAT-KD: class attention transfer (Guo et al., CVPR 2023): the class activation maps of both models, cell by cell.

The map of class k is the feature map times the classifier's weight of k, without the bias. Averaging a map commutes with a
linear head, so an r x r map is the region logits of an r x r grid less the head's bias: nothing new has to be computed.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from distill.losses.inputs import check_classes, check_pair, check_weights, teacher_of
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Needs, Regions, Target
from distill.regions import pooling_matrix


def cat_loss(student_cams: Tensor, teacher_cams: Tensor, normalise: bool = False, eps: float = 1e-12) -> Tensor:
    """The mean squared difference of two stacks of class activation maps, per image: [B, R, K] x 2 -> [B].

    `normalise` divides the R cells of each class by their L2 norm, or by `eps` where that is larger: a map of zeros then has a
    gradient of up to 1/eps.
    Source: GzyAftermath/CAT-KD 4467073, `CAT_loss`, which takes the batch mean. The paper normalises always, half of the
    released configurations do not. Computed in float32 (float64 stays), no gradient to the teacher. Raises ValueError for
    shapes that differ.
    """
    check_pair(student_cams, teacher_cams, "class activation maps", dimensions=3)
    with no_autocast(student_cams):
        mine, theirs = full_precision(student_cams), full_precision(teacher_cams.detach())
        if normalise:
            mine, theirs = F.normalize(mine, dim=1, eps=eps), F.normalize(theirs, dim=1, eps=eps)
        return (mine - theirs).square().mean((1, 2))


class CATKD(Criterion):
    """Class attention transfer (CAT-KD; Guo et al., CVPR 2023): the batch mean of `cat_loss`.

    Defined where a model's logits are the mean over cells of an affine map of its feature map: global average pooling and a
    linear classifier. The released code trains converted models without a bias; here both models keep theirs, and it is taken
    off the maps. Grids and channels may differ; a grid of fewer cells than `resolution` repeats them. The teacher's logits
    are not read. The mean is over classes too: weights grow with their number (0.5 to 15 plain, 2 to 600 normalised).

    Args:
        student: facts of the student: its classes.
        teacher: facts of the teacher: the same classes.
        resolution: r of the r x r cells of a map; 2 for most pairs, 4 in the released ShuffleNet configurations.
        normalise: compare the shape of each class's map, not its size; the paper, and released pairs of two architectures.
        eps: smallest norm that `normalise` divides by; 1e-12 in the released code, where a map of zeros, as a classifier of
            zeros gives it, has a gradient of 1e12. Maps of a larger norm do not see it.
    """

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        resolution: int = 2,
        normalise: bool = False,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_classes(student, teacher, "cat_kd")
        check_weights(eps=eps)
        pooling_matrix(1, 1, (resolution,), "adaptive")  # raises for a resolution that no map can have
        last = student.stages[-1]
        if normalise and (resolution == 1 or last.height * last.width == 1):
            raise ValueError(
                f"normalised maps of one cell are all 1 or -1 (resolution {resolution}, the student's map is "
                f"{last.height} x {last.width}): no gradient; set normalise to false"
            )
        self.regions = Regions((resolution,), "adaptive")
        self.normalise, self.eps = normalise, eps
        self.student_needs = self.teacher_needs = Needs(region_logits=(self.regions,), head_bias=True)

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """Batch mean; the labels, hard or soft, are not read."""
        mine, theirs = self._maps(student), self._maps(teacher_of(teacher, "cat_kd"))
        return cat_loss(mine, theirs, self.normalise, self.eps).mean(), {}

    def _maps(self, output: ModelOutput) -> Tensor:
        if output.head_bias is None:
            raise ValueError("cat_kd reads head_bias, the logits of an empty feature map, and this model output has none")
        # the bias keeps its gradient here, so that it cancels with that of the region logits
        return full_precision(output.region_logits[self.regions]) - full_precision(output.head_bias)
