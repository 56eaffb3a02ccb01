"""What is said when a step does not fit into the device: estimates of real models, and changes that would fit."""

import copy
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from distill.agreement import Control
from distill.models.recompute import activation_bytes
from pipelines.setup.build import build
from pipelines.setup.data import build_splits
from pipelines.setup.machine import build_accelerator
from pipelines.setup.out_of_memory import MemoryEstimate, OutOfMemory, advise, estimate_memory, memory_explained
from tests.runs import recipe_of

GIB = 2**30


@pytest.fixture
def built(digits: Path, tmp_path: Path, fresh_accelerate: None):
    recipe = recipe_of(digits, tmp_path)
    accelerator = build_accelerator(recipe)
    run, models = build(recipe, accelerator, build_splits(recipe, accelerator), Control())
    yield recipe, run, models
    run.checkpoints.close()
    for loader in (run.train_loader, run.eval_loader):
        loader.close()


def test_the_estimate_is_made_without_memory_and_counts_what_the_device_would_hold(built):
    _, run, models = built
    found = estimate_memory(run, models)
    assert found.image == activation_bytes(models.student)
    assert found.checkpointed is not None
    assert found.checkpointed < found.image
    trained = sum(p.numel() for p in run.distiller.parameters() if p.requires_grad)
    teacher = sum(p.numel() for p in models.teacher.parameters())
    assert found.fixed == 4 * (3 * trained + teacher), "weights, gradients and momentum, and the teacher's weights"
    assert models.student.mean.device.type == "cpu"
    assert next(models.student.parameters()).device.type == "cpu"


def test_an_out_of_memory_error_names_the_rank_and_what_it_knows(built):
    recipe, run, models = built
    text = r"rank 0: CUDA out of memory. Tried to allocate 2.00 GiB; a micro-batch of 24 is estimated at .* which would fit"
    with pytest.raises(OutOfMemory, match=text), memory_explained(recipe, run, models):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore of it")


def test_each_advice_fits(built):
    recipe, _, _ = built
    found = MemoryEstimate(fixed=GIB, image=GIB, checkpointed=GIB // 4)
    text = advise(recipe, 1, found, 14 * GIB, "no")
    assert "a micro-batch of 24 is estimated at 25.00 of 14.00 GiB (1024.0 MiB an image)" in text
    [accumulate, micro_batch] = map(int, re.search(r"--train.accumulate (\d+) \(micro-batch (\d+)\)", text).groups())
    assert accumulate * micro_batch == 24
    assert found.fixed + micro_batch * found.image <= 0.9 * 14 * GIB < found.fixed + 2 * micro_batch * found.image
    assert "bf16" not in text, "12 GiB of halved activations and 1 GiB of weights are more than 12.6 GiB"
    assert "--student.checkpoint_activations true" in text
    assert "--train.mixed_precision bf16" in advise(recipe, 1, found, 15 * GIB, "no")
    assert "alone fill it" in advise(recipe, 1, found, GIB, "no")


def test_the_estimate_is_made_for_a_gpu_too_without_asking_it_for_anything(built):
    """The device's memory is full when somebody asks: not even its generator's state may be read."""
    student = built[2].student
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        memo: dict[int, object] = {id(b): fake.from_tensor(b).to("cuda") for b in student.buffers()}
        memo |= {id(p): torch.nn.Parameter(fake.from_tensor(p.detach()).to("cuda")) for p in student.parameters()}
        found = activation_bytes(copy.deepcopy(student, memo))
    assert found == pytest.approx(activation_bytes(student), rel=0.01)  # cuDNN keeps a little more
