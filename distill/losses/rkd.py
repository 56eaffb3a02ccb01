"""Relational knowledge distillation (RKD): distances and angles between the images of a batch are the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distill.losses.gathering import joined_batch
from distill.losses.inputs import check_embeddings, check_rows, check_weights, embedding_of, teacher_of
from distill.precision import double_precision, full_precision_type, no_autocast
from distill.protocols import Criterion, Gathered, ModelFacts, ModelOutput, Needs, Target

EPS = 1e-12
COINCIDENT = 1e-12
"""Rows whose squared distance is no more than this share of their squared lengths are one point: the rest is rounding."""
CHUNK_ANGLES = {"cpu": 2**20}
"""Angles handled at once: 8 MiB in double precision for each intermediate."""
CHUNK_ANGLES_ELSEWHERE = 2**24


def rkd_distance_loss(student: Tensor, teacher: Tensor, eps: float = EPS, squared: bool = False) -> Tensor:
    """The mean over j of Huber(d_s,ij - d_t,ij) for each image i: [B, D_s] and [B, D_t] -> [B].

    d are Euclidean distances (or their squares), at least sqrt(eps), divided by their mean over the pairs of different images;
    Huber is x^2 / 2 up to 1 and |x| - 1/2 beyond. Source: Park et al., CVPR 2019, eq. 5-7; lenscloth/RKD 0a6c3c0 and mdistiller
    a08d46f, which count the B pairs of an image with itself in the mean, as here. Where we differ: one image gives 0 (there
    NaN). Computed in float64 from centred rows: in float32 the distance of near rows is rounding, wrong by a third. Equal rows
    have distance sqrt(eps) and no gradient: the loss is blind to a collapse. No gradient to the teacher.
    """
    check_rows(student, teacher, "rkd", dimensions=(2,))
    with no_autocast(student):
        mine, theirs = (_relative_distances(each, eps, squared) for each in (student, teacher.detach()))
        losses = F.smooth_l1_loss(mine, theirs, reduction="none").mean(1)
    return losses.to(full_precision_type(student))


def rkd_angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over j and k of Huber(cos_s - cos_t) of the angle at image a between j and k: [B, D_s] and [B, D_t] -> [B].

    All B^2 pairs count, those with a itself as 0 against 0. Source: Park et al., CVPR 2019, eq. 8-9; the code named above.
    Where we differ: rows that coincide have cosine 0 with everything, as there, and no gradient (there: up to 1e10).
    Computed in float64 from the products of centred rows, some images a at a time and again in the backward pass: O(B^3)
    operations, O(B^2) numbers kept (there: B^3 and 2 B^2 D, 134 MB each at B 256, D 512). No gradient to the teacher.
    """
    check_rows(student, teacher, "rkd", dimensions=(2,))
    with no_autocast(student):
        mine, theirs = _products(student), _products(teacher.detach())
        limit = CHUNK_ANGLES.get(student.device.type, CHUNK_ANGLES_ELSEWHERE)
        count = len(mine)
        step = max(1, limit // count**2)
        parts = [
            checkpoint(_angle_losses, mine, theirs, vertices, use_reentrant=False)
            for vertices in torch.arange(count, device=mine.device).split(step)
        ]
    return torch.cat(parts).to(full_precision_type(student))


def _products(rows: Tensor) -> Tensor:
    """The products of the rows with each other, from their mean: distances and angles do not know where the origin is."""
    rows = double_precision(rows)
    rows = rows - rows.mean(0)
    return rows @ rows.T


def _squared_distances(products: Tensor) -> Tensor:
    lengths = products.diagonal()
    return lengths[:, None] + lengths[None, :] - 2 * products


def _relative_distances(rows: Tensor, eps: float, squared: bool) -> Tensor:
    """[B, D] -> [B, B], 0 with itself, the others' mean 1."""
    distances = _squared_distances(_products(rows)).clamp_min(eps)
    distances = distances if squared else distances.sqrt()
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    distances = distances * others
    # every other distance is positive, for eps is: no need to look how many are
    pairs = max(1, len(rows) * (len(rows) - 1))
    return distances / (distances.sum() / pairs).clamp_min(eps)


def _angle_losses(student: Tensor, teacher: Tensor, vertices: Tensor) -> Tensor:
    """The losses of some vertices, from the products of all rows."""
    return F.smooth_l1_loss(_cosines(student, vertices), _cosines(teacher, vertices), reduction="none").mean((1, 2))


def _cosines(products: Tensor, vertices: Tensor) -> Tensor:
    """The cosine at each of V vertices between the directions to rows j and k: [B, B], [V] -> [V, B, B]."""
    own = products[vertices]  # [V, B], the vertex with each row
    lengths = products.diagonal()
    between = products[None] - own[:, :, None] - own[:, None, :] + lengths[vertices][:, None, None]
    squared = lengths[None] - 2 * own + lengths[vertices][:, None]
    apart = squared > (COINCIDENT * (lengths[None] + lengths[vertices][:, None])).clamp_min(EPS**2)
    scale = torch.where(apart, squared, 1).rsqrt() * apart
    return between * scale[:, :, None] * scale[:, None, :]


class RKD(Criterion):
    """Relational knowledge distillation (Park et al., CVPR 2019) on what the last linear layers read.

    Defined for every pair of models with a last linear layer, of any widths. The papers' weight is 1.

    Args:
        student: facts of the student, which must have an embedding.
        teacher: facts of the teacher, likewise.
        distance_weight: of the distances between two images.
        angle_weight: of the angles between three images.
        gather: compare with the images of all processes; the angles then cost the cube of their number.
    """

    student_needs = Needs(embedding=True)
    teacher_needs = Needs(embedding=True)

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        gather: bool = False,
    ) -> None:
        super().__init__()
        check_embeddings("rkd", student=student, teacher=teacher)
        check_weights(distance_weight=distance_weight, angle_weight=angle_weight)
        self.distance_weight, self.angle_weight, self.gather = distance_weight, angle_weight, gather
        self._traffic: tuple[Gathered, ...] = ()

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of both parts' means over images, of this process or of all; and both parts, unweighted."""
        mine, theirs = embedding_of(student), embedding_of(teacher_of(teacher, "rkd"))
        self._traffic = tuple(Gathered(len(each), each.shape[1], self.gather) for each in (mine, theirs))
        if self.gather:
            mine, theirs = joined_batch(mine), joined_batch(theirs.detach())
        distance, angle = rkd_distance_loss(mine, theirs).mean(), rkd_angle_loss(mine, theirs).mean()
        parts = {"distance": distance.detach(), "angle": angle.detach()}
        return self.distance_weight * distance + self.angle_weight * angle, parts

    def advice(self) -> str:
        """Distances alone."""
        return "--loss.rkd.angle_weight 0 --loss.rkd.gather false compare no triples of all processes' images"

    def traffic(self) -> tuple[Gathered, ...]:
        """Both models' embeddings."""
        return self._traffic
