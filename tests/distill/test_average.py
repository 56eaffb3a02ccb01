"""The average of the weights is timm's, number by number, and looks for its tensors once."""

import copy

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn

from distill.average import Average


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_timms_after_steps_and_a_restored_state(warmup: bool, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10)
    ours, theirs = Average(model, 0.9, warmup), ModelEmaV3(model, decay=0.9, use_warmup=warmup)
    first = copy.deepcopy(model.state_dict())
    walks: list[nn.Module] = []
    state_dict = nn.Module.state_dict

    def step(number: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model.train()(torch.rand(4, 3, 32, 32))  # moves BatchNorm's statistics, and counts, which are whole numbers
        theirs.update(model, step=number)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "state_dict", lambda self, *a, **k: (walks.append(self), state_dict(self, *a, **k))[1])
            ours.update(model, step=number)

    for number in range(1, 4):
        step(number)
    seen = len(walks)
    assert seen > 0
    model.load_state_dict(first)
    ours.module.load_state_dict(first)
    theirs.module.load_state_dict(first)
    step(4)
    assert len(walks) == seen
    mine = ours.module.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.module.state_dict().items())
