"""The losses: what a recipe names on the left, the criterion that computes it on the right."""

from distill.losses.logits import DKD, KD, NKD, CrossEntropy
from distill.losses.msdcrd import MSDCRD
from distill.losses.sdd import SDD
from distill.protocols import Criterion

LOSSES: dict[str, type[Criterion]] = {
    "cross_entropy": CrossEntropy,
    "kd": KD,
    "dkd": DKD,
    "nkd": NKD,
    "sdd": SDD,
    "msdcrd": MSDCRD,
}
