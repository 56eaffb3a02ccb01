"""FT: factor transfer (Kim et al., NeurIPS 2018): the student translates its map into the teacher's paraphrase of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.losses.at import attention_vector
from distill.losses.inputs import check_rows, check_weights, teacher_of
from distill.losses.maps import Maps, Source, smaller_grid, to_grid
from distill.precision import full_precision, no_autocast
from distill.protocols import Criterion, ModelFacts, ModelOutput, Target

SLOPE = 0.1
"""Of the leaky ReLUs below 0."""


def ft_loss(student_factor: Tensor, teacher_factor: Tensor) -> Tensor:
    """The mean over cells of |Q_s - Q_t| for each image: [B, C_s, H, W], [B, C_t, H', W'] -> [B].

    Q is the mean over channels of the factor's squares, of norm 1 over the cells, as in AT. The larger factor is pooled
    (adaptive average) to the smaller's grid first. Source: RepDistiller b84f547, `FactorTransfer`, whose scalar is our batch
    mean; the paper (eq. 3) normalises the whole factor and needs equal shapes. Computed in float32 (float64 stays); no gradient
    to the teacher.
    """
    check_rows(student_factor, teacher_factor, "ft", dimensions=(4,))
    grid = smaller_grid(student_factor, teacher_factor)
    with no_autocast(student_factor):
        mine, theirs = (attention_vector(to_grid(each, *grid), 2) for each in (student_factor, teacher_factor.detach()))
        return (mine - theirs).abs().mean(1)


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's map: [B, C, H, W] to the factor [B, rate C, H, W] and back."""

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            *_layer(nn.Conv2d(channels, channels, 3, padding=1)),
            *_layer(nn.Conv2d(channels, factors, 3, padding=1)),
            *_layer(nn.Conv2d(factors, factors, 3, padding=1)),
        )
        self.decode = nn.Sequential(
            *_layer(nn.ConvTranspose2d(factors, factors, 3, padding=1)),
            *_layer(nn.ConvTranspose2d(factors, channels, 3, padding=1)),
            *_layer(nn.ConvTranspose2d(channels, channels, 3, padding=1)),
        )

    def reconstruction(self, feature_map: Tensor) -> Tensor:
        """The mean squared error of the map that comes back, a scalar."""
        returned = full_precision(self.decode(self.encode(feature_map)))
        return (returned - full_precision(feature_map)).square().mean()


class FT(Criterion):
    """Factor transfer (FT; Kim et al., NeurIPS 2018): first a paraphraser of the teacher's last map, then `ft_loss` to it.

    In the first `paraphraser_epochs` epochs the value is the paraphraser's mean squared error times `paraphraser_weight`, and
    nothing reaches the student; afterwards the paraphraser stays as it is, and the value is the batch mean of `ft_loss` of the
    student's map behind a translator. So the other losses start then too (`cross_entropy.start_epoch`), and `train.epochs`
    counts both. The papers' weight is 200; 0.005 of it is 1 for the paraphraser.

    Args:
        student: facts of the student: its last map's channels.
        teacher: facts of the teacher: the same.
        source: stages (the map that the head reads) or blocks (the network's last own map, which released code reads).
        rate: the factor's channels as a share of the teacher's.
        paraphraser_epochs: epochs that train the paraphraser alone.
        paraphraser_weight: of its error in the value; with SGD it is a factor of its learning rate.
    """

    rests = True

    def __init__(
        self,
        student: ModelFacts,
        teacher: ModelFacts,
        *,
        source: Source = "stages",
        rate: float = 0.5,
        paraphraser_epochs: int = 30,
        paraphraser_weight: float = 0.005,
    ) -> None:
        super().__init__()
        self.student_maps, self.teacher_maps = (Maps(facts, source, (-1,)) for facts in (student, teacher))
        self.student_needs, self.teacher_needs = self.student_maps.needs, self.teacher_maps.needs
        own, other = self.student_maps.shapes[0].channels, self.teacher_maps.shapes[0].channels
        if not int(other * rate) >= 1:
            raise ValueError(f"rate {rate} leaves none of the teacher's {other} channels; take a larger one, such as 0.5")
        if paraphraser_epochs < 1:
            raise ValueError(f"paraphraser_epochs {paraphraser_epochs} must be at least 1: nothing else trains the paraphraser")
        check_weights(paraphraser_weight=paraphraser_weight)
        self.paraphraser_epochs, self.paraphraser_weight = paraphraser_epochs, paraphraser_weight
        factors = int(other * rate)
        self.paraphraser = Paraphraser(other, factors)
        self.translate = nn.Sequential(
            *_layer(nn.Conv2d(own, own, 3, padding=1), nn.BatchNorm2d(own)),
            *_layer(nn.Conv2d(own, factors, 3, padding=1), nn.BatchNorm2d(factors)),
            *_layer(nn.Conv2d(factors, factors, 3, padding=1), nn.BatchNorm2d(factors)),
        )

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, target: Target) -> tuple[Tensor, dict[str, Tensor]]:
        """The value of the present epoch; and the error or the loss that it is of."""
        (mine,), (theirs,) = self.student_maps.of(student), self.teacher_maps.of(teacher_of(teacher, "ft"))
        theirs = theirs.detach()
        if target.progress.epoch < self.paraphraser_epochs:
            error = self.paraphraser.reconstruction(theirs)
            return self.paraphraser_weight * error, {"reconstruction": error.detach()}
        with torch.no_grad():
            factor = self.paraphraser.encode(theirs)
        loss = ft_loss(self.translate(mine), factor).mean()
        return loss, {"factor": loss.detach()}


def _layer(convolution: nn.Module, *norm: nn.Module) -> tuple[nn.Module, ...]:
    return convolution, *norm, nn.LeakyReLU(SLOPE, inplace=True)
