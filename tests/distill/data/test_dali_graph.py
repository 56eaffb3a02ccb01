"""DALI's graph is built for a GPU without one being there: what its Python checks is checked."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from distill.data.augment.parameters import TrainTransform
from distill.data.batch_plan import EvalPlan, Plan, TrainPlan
from distill.data.dali_graph import DecodeMode, build_pipeline
from tests.distill.data.test_loaders import input_spec, needs_dali


def train_plan(**transform) -> TrainPlan:
    options = {"global_batch_size": 8, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 0}
    return TrainPlan(64, size=(32, 32), transform=TrainTransform(**transform), **options)


PLANS = {
    "random-resized-crop": train_plan(),
    "pad-and-crop": train_plan(crop="pad"),
    "resize": train_plan(crop="resize", interpolation="bicubic"),
    "RandAugment": train_plan(rand_augment="rand-m9-mstd0.5-inc1"),
    "colour jitter": train_plan(color_jitter=0.4),
    "evaluation": EvalPlan(64, spec=input_spec(32, 32, 0.875), batch_size=8, rank=0, world_size=1),
}


@needs_dali
@pytest.mark.parametrize("decode_only", [False, True])
@pytest.mark.parametrize("mode", get_args(DecodeMode))
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_the_graph_of_every_kind_of_plan_is_built_for_a_gpu(plan: Plan, mode: DecodeMode, decode_only: bool):
    """RandAugment and colour jitter ended in a ValueError: the centre of Contrast lay on the GPU, an argument must not."""
    if torch.cuda.is_available():
        build_pipeline(plan, torch.device("cuda:0"), 1, decode_only, mode)
        return
    with pytest.raises(RuntimeError, match="create a GPU DALI pipeline while CUDA is not available"):
        build_pipeline(plan, torch.device("cuda:0"), 1, decode_only, mode)
