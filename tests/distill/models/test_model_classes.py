"""One architecture of each of timm's model classes, the smallest, at the smallest image it takes with a grid of 2 x 2."""

from __future__ import annotations

import logging

import pytest
import torch

from distill.models.build import create_student
from distill.protocols import Needs
from tests.distill.models.model_support import SMALL_PYRAMID

# classes whose smallest member has more than 130 M parameters are left to `pairs.py matrix`
SMALLEST = [
    ("test_convnext", 64, "pool"),
    ("test_efficientnet", 64, "pool"),
    ("test_mambaout", 64, "pool"),
    ("test_nfnet", 64, "pool"),
    ("test_vit", 64, "token:attend"),
    ("starnet_s050", 64, "pool"),
    ("test_byobnet", 64, "pool"),
    ("test_resnet", 64, "pool"),
    ("test_coatnet", 64, "pool"),
    ("test_vit_relpos", 64, "pool"),
    ("dla46x_c", 64, "pool"),
    ("edgenext_xx_small", 64, "pool"),
    ("lcnet_035", 64, "pool"),
    ("ese_vovnet19b_slim_dw", 64, "pool"),
    ("efficientvit_m0", 96, "pool"),
    ("repghostnet_050", 64, "pool"),
    ("ghostnet_050", 64, "pool"),
    ("cspnext_tiny", 64, "pool"),
    ("regnetx_002", 64, "pool"),
    ("iformer_t", 64, "pool"),
    ("xcit_nano_12_p8_224", 64, "token:shift"),
    ("cs3darknet_focus_s", 64, "pool"),
    ("efficientvit_b0", 64, "split"),
    ("swiftformer_xs", 64, "pool"),
    ("efficientformerv2_s0", 64, "pool"),
    ("pvt_v2_b0", 64, "pool"),
    ("fasternet_t0", 64, "pool"),
    ("fastvit_t8", 64, "pool"),
    ("lcnetv2_small", 64, "pool"),
    ("inception_next_atto", 64, "pool"),
    ("pit_ti_224", 128, "token:shift"),
    ("rexnet_100", 64, "pool"),
    ("coat_tiny", 64, "token:shift"),
    ("eva02_tiny_patch14_224", 64, "pool"),
    ("repvit_m0_9", 64, "pool"),
    ("convit_tiny", 64, "token:shift"),
    ("deit_tiny_distilled_patch16_224", 64, "token:attend"),
    ("gmlp_ti16_224", 64, "pool"),
    ("hgnetv2_b0", 64, "pool"),
    ("shvit_s1", 96, "pool"),
    ("cpubone_nano", 64, "split"),
    ("efficientvim_m1", 96, "pool"),
    ("crossvit_tiny_240", None, "token:shift"),
    ("efficientvim_m1_dist", 96, "pool"),
    ("levit_128s", 96, "pool"),
    ("densenet121", 64, "pool"),
    ("dpn48b", 64, "pool"),
    ("visformer_tiny", 64, "pool"),
    ("csatv2", 128, "pool"),
    ("resnetv2_18", 64, "pool"),
    ("legacy_seresnet18", 64, "pool"),
    ("poolformer_s12", 64, "pool"),
    ("cait_xxs24_224", 64, "token:shift"),
    ("gcvit_xxtiny", 64, "pool"),
    ("tiny_vit_5m_224", 64, "pool"),
    ("efficientformer_l1", 224, "pool"),
    ("hrnet_w18_small", 64, "pool"),
    ("lowformer_b0", 64, "split"),
    ("nest_tiny", 64, "pool"),
    ("convmixer_768_32", 64, "pool"),
    ("legacy_xception", 64, "pool"),
    ("inception_v3", 128, "pool"),
    ("tnt_s_legacy_patch16_224", 64, "token:shift"),
    ("rdnet_tiny", 64, "pool"),
    ("twins_pcpvt_small", 64, "pool"),
    ("mvitv2_tiny", 64, "pool"),
    ("levit_256d", 96, "pool"),
    ("volo_d1_224", 64, "crop"),
    ("sam2_hiera_tiny", 64, "pool"),
    ("xception41p", 64, "pool"),
    ("sequencer2d_s", 64, "pool"),
    ("hiera_tiny_224", 64, "pool"),
    ("swin_s3_tiny_224", 64, "pool"),
    ("swinv2_cr_tiny_224", 64, "pool"),
    ("swinv2_tiny_window8_256", 64, "pool"),
    ("davit_tiny", 64, "pool"),
    ("focalnet_tiny_srf", 64, "pool"),
    ("selecsls42", 96, "pool"),
    ("tresnet_m", 64, "pool"),
    ("nextvit_small", 64, "pool"),
    ("inception_v4", 128, "pool"),
    ("efficientvit_l1", 64, "split"),
    ("inception_resnet_v2", 128, "pool"),
    ("mobilenetv5_base", 64, "pool"),
    ("pnasnet5large", 64, "pool"),
    ("beit_base_patch16_224", 64, "pool"),
    ("naflexvit_base_patch16_parfac_gap", 64, "pool"),
    ("samvit_base_patch16_224", 64, "pool"),
    ("qwen3_vit_88m", 64, "pool"),
    ("nasnetalarge", 64, "pool"),
]


@pytest.mark.parametrize(("name", "size", "mechanism"), SMALLEST)
def test_the_class_is_served_by_its_mechanism_and_its_whole_image_is_exact(
    name: str, size: int | None, mechanism: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    needs = Needs((SMALL_PYRAMID,))
    with caplog.at_level(logging.CRITICAL):
        served = create_student(name, num_classes=10, image_size=size).backbone(needs)
    assert served.mechanism == mechanism
    assert served.whole_image_difference is not None
    assert served.whole_image_difference < 1e-4
    assert min(served.grid) >= 2
