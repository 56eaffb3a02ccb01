"""What brings a student's feature map to the teacher's channels while training; dropped with the criterion afterwards."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

Projector = Literal["attention", "1x1", "1x1-1x1", "1x1-3x3-1x1", "none"]
PROJECTORS = get_args(Projector)
MIDDLE_LIMIT = 512


class AttentionProjector(nn.Module):
    """MSDCRD's attention-based projector: [B, C_s, H, W] -> [B, C_t, H, W].

    conv1x1(s -> m) - BN - conv kxk(m -> t) - BN - times sigmoid(conv1x1(t -> 1)), m = min(512, s), biases only in the gate.
    With k = 3 its parameters are the five counts of Table 7 of arXiv 2502.05835v1 exactly; the paper's text says 1x1
    (`kernel_size=1`). It is ReviewKD's ABF with the attention on the output. The gate is one positive factor per cell: it
    weighs cells within a region and cancels in the L2 norm of a region of one cell.
    Unlike the losses, it computes in the precision that autocast asks for: it is a network.
    """

    def __init__(self, student_channels: int, teacher_channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {kernel_size} must be odd, so that the map keeps its size")
        middle = min(MIDDLE_LIMIT, student_channels)
        self.reduce = convolution(student_channels, middle, 1)
        self.expand = convolution(middle, teacher_channels, kernel_size)
        self.gate = nn.Conv2d(teacher_channels, 1, 1)

    def forward(self, feature_map: Tensor) -> Tensor:
        """The projected map, gated cell by cell."""
        projected = self.expand(self.reduce(feature_map))
        return projected * self.gate(projected).sigmoid()


def build_projector(kind: Projector, student_channels: int, teacher_channels: int, kernel_size: int = 3) -> nn.Module:
    """The projectors that Table 5 of arXiv 2502.05835v1 compares; `none` only where both have the same channels.

    The table names the convolutions and nothing else; as in the attention projector, each is followed by BN, has no bias and
    no ReLU, and the inner width is min(512, student's). `kernel_size` is the attention projector's.
    """
    if kind not in PROJECTORS:
        raise ValueError(f"projector {kind!r} is unknown; choose one of {', '.join(PROJECTORS)}")
    if kind == "attention":
        return AttentionProjector(student_channels, teacher_channels, kernel_size)
    if kind == "none":
        if student_channels != teacher_channels:
            raise ValueError(
                f"projector 'none' leaves {student_channels} channels, the teacher has {teacher_channels}; choose 'attention'"
            )
        return nn.Identity()
    sizes = [int(size[0]) for size in kind.split("-")]
    middle = min(MIDDLE_LIMIT, student_channels)
    widths = [student_channels, *[middle] * (len(sizes) - 1), teacher_channels]
    return nn.Sequential(*map(convolution, widths, widths[1:], sizes))


def convolution(channels_in: int, channels_out: int, kernel_size: int) -> nn.Sequential:
    """Convolution without bias, initialised as ReviewKD's code does (kaiming_uniform, a = 1), then BN."""
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out))
