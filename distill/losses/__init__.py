"""The losses: what a recipe names on the left, the criterion that computes it on the right."""

from distill.losses.cat_kd import CATKD
from distill.losses.ctkd import CTKD
from distill.losses.logits import DKD, KD, NKD, CrossEntropy
from distill.losses.mgd import MGD
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
    "cat_kd": CATKD,
    "ctkd": CTKD,
    "mgd": MGD,
}
