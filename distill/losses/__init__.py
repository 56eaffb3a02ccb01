"""The losses: what a recipe names on the left, the criterion that computes it on the right."""

from distill.losses.ab import AB
from distill.losses.at import AT
from distill.losses.cat_kd import CATKD
from distill.losses.cc import CC
from distill.losses.crd import CRD
from distill.losses.cross_entropy import CrossEntropy
from distill.losses.ctkd import CTKD
from distill.losses.dist_kd import Dist
from distill.losses.fitnet import FitNet
from distill.losses.fsp import FSP
from distill.losses.ft import FT
from distill.losses.logits import DKD, KD, NKD
from distill.losses.mgd import MGD
from distill.losses.mlkd import MLKD
from distill.losses.msdcrd import MSDCRD
from distill.losses.nst import NST
from distill.losses.ofd import OFD
from distill.losses.pkt import PKT
from distill.losses.reviewkd import ReviewKD
from distill.losses.rkd import RKD
from distill.losses.sdd import SDD
from distill.losses.semckd import SemCKD
from distill.losses.simkd import SimKD
from distill.losses.sp import SP
from distill.losses.srrl import SRRL
from distill.losses.vid import VID
from distill.losses.wcord import WCoRD
from distill.losses.wkd_feature import WKDFeature
from distill.losses.wkd_logit import WKDLogit
from distill.protocols import Criterion

LOSSES: dict[str, type[Criterion]] = {
    "cross_entropy": CrossEntropy,
    "kd": KD,
    "dkd": DKD,
    "nkd": NKD,
    "sdd": SDD,
    "msdcrd": MSDCRD,
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "pkt": PKT,
    "rkd": RKD,
    "dist": Dist,
    "crd": CRD,
    "wcord": WCoRD,
    "wkd_logit": WKDLogit,
    "wkd_feature": WKDFeature,
    "cat_kd": CATKD,
    "ctkd": CTKD,
    "mgd": MGD,
    "mlkd": MLKD,
    "reviewkd": ReviewKD,
    "ofd": OFD,
    "simkd": SimKD,
    "semckd": SemCKD,
    "vid": VID,
    "cc": CC,
    "nst": NST,
    "srrl": SRRL,
    "ab": AB,
    "ft": FT,
    "fsp": FSP,
}
