"""On a device nothing waits for a value, and a compiler sees one graph."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from distill.protocols import ModelOutput, Needs, Target
from distill.regions import _made_matrix
from tests.distill.losses.outputs import made, model_output

LABELS = torch.tensor([0, 3, 5, 1])
VARIANTS = [
    ("cross_entropy", {"label_smoothing": 0.1}),
    ("kd", {}),
    ("dkd", {}),
    ("nkd", {}),
    ("sdd", {"base": "dkd", "scales": (1, 2, 4)}),
    ("sdd", {"base": "kd", "standardise": True}),
    ("sdd", {"base": "nkd", "rule": "class", "mask_target": False}),
    ("msdcrd", {"chunk_rows": 50}),
    ("msdcrd", {"precision": "tf32"}),
    ("msdcrd", {"mask_same_category": False, "windows": (3,), "temperature": 0.01}),
]
EACH_VARIANT = pytest.mark.parametrize(("name", "options"), VARIANTS)
UNCOMPILED = [
    ("cat_kd", {"normalise": True}),
    ("ctkd", {"base": "dkd"}),
    ("mlkd", {}),
    ("mlkd", {"mended": True}),
    ("mgd", {"mask": "cell"}),
    ("reviewkd", {}),
    ("ofd", {}),
    ("fitnet", {"match": "pool"}),
    ("at", {}),
    ("sp", {"scales": (1, 2)}),
    ("pkt", {}),
    ("rkd", {}),
    ("dist", {}),
    ("wkd_logit", {}),
    ("wkd_feature", {}),
    ("sdd", {"reliability": "mean"}),
]
"""Losses that nobody compiles: `train.compile` is of models, and these are a few products each."""


def build(name: str, options: dict) -> torch.nn.Module:
    """The criterion of this name."""
    return made(name, **options)


def outputs(criterion) -> tuple[ModelOutput, ModelOutput]:
    """Student and teacher outputs that serve the criterion."""
    return model_output("student", criterion.student_needs), model_output("teacher", criterion.teacher_needs or Needs())


def moved(output: ModelOutput, device: str) -> ModelOutput:
    """The output on another device."""
    return ModelOutput(
        output.logits.to(device),
        output.feature_map.to(device),
        {key: value.to(device) for key, value in output.region_logits.items()},
        {key: value.to(device) for key, value in output.region_features.items()},
        {key: value.to(device) for key, value in output.stages.items()},
        blocks={key: value.to(device) for key, value in output.blocks.items()},
        embedding=None if output.embedding is None else output.embedding.to(device),
        preactivations={key: value.to(device) for key, value in output.preactivations.items()},
        head_bias=None if output.head_bias is None else output.head_bias.to(device),
    )


@pytest.mark.parametrize(("name", "options"), [*VARIANTS, *UNCOMPILED])
def test_nothing_waits_for_a_gpu(name, options):
    """Tensors without values on a device of that name: whatever asks for a value raises instead of waiting for it."""
    _made_matrix.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            with torch.device("cuda"):
                criterion = build(name, options)
            student, teacher = (moved(output, "cuda") for output in outputs(criterion))
            labels = torch.zeros(4, dtype=torch.int64, device="cuda")
            loss, statistics = criterion(student, teacher, Target(labels, plain=labels == 0))
            assert loss.requires_grad  # gradients are made on the way forward
            assert loss.device.type == "cuda"
            assert all(value.device.type == "cuda" for value in statistics.values())
            with pytest.raises(DataDependentOutputException):
                loss.item()
    finally:
        _made_matrix.cache_clear()


@EACH_VARIANT
def test_a_compiler_sees_one_graph_with_the_same_value_and_gradient(name, options):
    criterion = build(name, options)
    student, teacher = outputs(criterion)

    def loss(feature_maps, logits, regions):
        return criterion(student._replace(stages=feature_maps, logits=logits, region_logits=regions), teacher, Target(LABELS))[
            0
        ]

    torch._dynamo.reset()
    found = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = [
            {key: value.detach().clone().requires_grad_() for key, value in each.items()}
            for each in (student.stages, {0: student.logits}, student.region_logits)
        ]
        value = function(leaves[0], leaves[1][0], leaves[2])
        value.backward()
        gradients = [leaf.grad for each in leaves for leaf in each.values() if leaf.grad is not None]
        assert gradients
        found.append((value.detach(), gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_a_compiled_cross_entropy_passes_over_no_label():
    """Values cannot be looked at while compiling, and PyTorch's own cross-entropy skips label -100 by default."""
    criterion = torch.compile(build("cross_entropy", {}), backend="aot_eager")
    student, _ = outputs(criterion)
    with pytest.raises(IndexError, match="-100 is out of bounds"):
        criterion(student, None, Target(torch.tensor([0, -100, 5, 1])))


def test_a_compiled_criterion_takes_soft_labels():
    criterion = build("sdd", {"base": "kd"})
    student, teacher = outputs(criterion)
    soft = torch.full((4, 6), 1 / 6)
    torch._dynamo.reset()
    compiled = torch.compile(criterion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(student, teacher, Target(soft))[0], criterion(student, teacher, Target(soft))[0])
