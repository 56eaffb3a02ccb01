"""The second call of a head leaves BatchNorm as it was, and sees the statistics it should."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.models.region_logits.head_batchnorm import (
    FEW_ROWS,
    normalised_by,
    region_statistics,
    snapshot,
    training_batchnorms,
)
from distill.models.region_logits.probe import perturbed


@pytest.mark.parametrize("momentum", [0.1, 0.01])
def test_the_statistics_of_the_batch_are_read_off_the_running_ones(momentum: float) -> None:
    norm = nn.BatchNorm1d(5, momentum=momentum)
    batch = torch.randn(FEW_ROWS, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    before = snapshot([norm])
    norm(batch)
    [(mean, variance)] = region_statistics([norm], before, len(batch))
    torch.testing.assert_close(mean, batch.mean(0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(variance, batch.var(0, unbiased=False), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("momentum", "rows"), [(0.1, FEW_ROWS - 1), (None, FEW_ROWS)])
def test_few_rows_or_no_momentum_take_the_running_statistics(momentum: float | None, rows: int) -> None:
    norm = nn.BatchNorm1d(5, momentum=momentum)
    before = snapshot([norm])
    norm(torch.randn(rows, 5))
    [(mean, variance)] = region_statistics([norm], before, rows)
    assert torch.equal(mean, norm.running_mean)
    assert torch.equal(variance, norm.running_var)


def test_inside_the_block_the_statistics_are_used_and_none_are_kept() -> None:
    norm = nn.BatchNorm1d(2).train()
    own = (norm.running_mean, norm.running_var)
    rows = torch.randn(7, 2)
    with normalised_by([norm], [(torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0]))]):
        seen = norm(rows)
    torch.testing.assert_close(seen, (rows - torch.tensor([1.0, 2.0])) / torch.tensor([2.0, 3.0]), rtol=1e-4, atol=1e-4)
    assert (norm.running_mean, norm.running_var) == own  # the very same tensors
    assert norm.training
    assert norm.num_batches_tracked == 0


def test_frozen_and_untracked_norms_need_no_care() -> None:
    assert training_batchnorms([nn.BatchNorm1d(2).eval(), nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2)]) == []


def test_noise_is_gone_after_the_block_and_variances_stay_positive_in_it() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    nn.init.zeros_(model[0].weight)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with perturbed(list(model.modules()), torch.Generator().manual_seed(0)):
        assert model[0].weight.abs().min() > 0
        assert model[1].running_var.min() > 0
        assert not torch.equal(model[1].running_var, before["1.running_var"])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("shape", [(64,), (64, 1, 1), (1, 64, 1, 1)])
def test_a_scale_gets_small_noise_whatever_its_shape(shape: tuple[int, ...]) -> None:
    """Noise of 1 on LayerScales of shape [C, 1, 1] used to blow fastvit_mci2 up to infinity, and it was refused for that."""
    scale = nn.Module()
    scale.gamma = nn.Parameter(torch.full(shape, 1e-5))
    with perturbed([scale], torch.Generator().manual_seed(0)):
        assert 0 < float(scale.gamma.detach().abs().max()) < 0.5
