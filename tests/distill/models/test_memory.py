"""Activation checkpointing: the same step in less memory."""

import copy

import pytest
import torch

from distill.models.anatomy import evaluating
from distill.models.recompute import activation_bytes, set_activation_checkpointing, unchanged_statistics
from distill.protocols import Needs, Regions
from tests.distill.models.model_support import backbone

PYRAMID = Regions(scales=(1, 2, 4))
LAST = Needs(region_logits=(PYRAMID,), region_features=(PYRAMID,), stages=(-1,))


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small_035", "vit_tiny_patch16_224", "cifar_resnet8"])
def test_a_checkpointed_step_is_the_plain_one_in_less_memory(name: str) -> None:
    """Gradients and every statistic, also those of BatchNorms inside a head."""
    kwargs = {"img_size": 64, "depth": 3} if name.startswith("vit") else {}
    plain = backbone(name, 64, LAST, **kwargs).train()
    checkpointed = copy.deepcopy(plain)
    before, after = set_activation_checkpointing(checkpointed)
    assert after < 0.8 * before
    images = torch.rand(16, 3, 64, 64)
    for module in (plain, checkpointed):
        torch.manual_seed(0)
        loss = module(images).region_logits[PYRAMID].square().mean()
        with unchanged_statistics(module.model):
            loss.backward()
    for (key, mine), theirs in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs[1].grad, msg=key)
    for key, value in plain.state_dict().items():
        assert torch.equal(checkpointed.state_dict()[key], value), key


def test_measuring_leaves_statistics_and_generators_alone() -> None:
    student = backbone("resnet18", 64, LAST).train()
    before = copy.deepcopy(student.state_dict())
    state = torch.get_rng_state()
    assert activation_bytes(student) > 3 * 64 * 64 * 4
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_with_stages_it_saves_memory_too() -> None:
    before, after = set_activation_checkpointing(backbone("resnet18", 64, Needs(stages=(-2, -1))).train())
    assert after < before


def test_an_architecture_that_cannot_do_it_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="dla46_c cannot do it in timm"):
        set_activation_checkpointing(backbone("dla46_c", 64, LAST).train())


def test_an_architecture_that_takes_the_request_and_ignores_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    student = backbone("cifar_resnet8", 32, LAST).train()
    monkeypatch.setattr(student.model, "set_grad_checkpointing", lambda enable: None, raising=False)
    with pytest.raises(ValueError, match="saves nothing for cifar_resnet8 here"):
        set_activation_checkpointing(student)


def test_a_model_on_a_cpu_is_examined_without_a_look_at_any_gpu(monkeypatch: pytest.MonkeyPatch):
    """The random states of all visible GPUs were saved, for each model, with a warning where there are several."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with evaluating(torch.nn.Linear(2, 2)):
        assert not torch.is_grad_enabled()
