"""`pipelines/evaluate.py --dump`: what the file holds is what the model says, for any number of processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from distill.data.index import ShardIndex
from distill.data.pixels import decode
from distill.data.reference import read_sample
from distill.models.export import export_student
from distill.models.input_spec import input_spec_of
from pipelines.reporting.collect import choose_sample
from pipelines.reporting.dump import Dump
from tests.conftest import VAL_IMAGES

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student's folder, as a run exports it."""
    torch.manual_seed(3)
    model = timm.create_model("cifar_resnet8", num_classes=10)
    export_student(model, tmp_path_factory.mktemp("student"), input_spec=input_spec_of(model))
    return next(tmp_path_factory.getbasetemp().glob("student*"))


@pytest.fixture(scope="module")
def options(digits: Path, weights: Path) -> list[str]:
    return ["--model", "cifar_resnet8", "--weights", str(weights), "--val", str(digits / "val"), "--batch-size", "10"]


@pytest.fixture(scope="module")
def dumps(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[Dump]:
    """The dump of one process, and that of two."""
    folder, found = tmp_path_factory.mktemp("dumps"), []
    for processes in ("1", "2"):
        file = folder / f"{processes}.npz"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        more = ["--dump", str(file), "--dump-sample", "20", "--mixed-precision", "no"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        command = [*launch, "pipelines/evaluate.py", *options, *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
        found.append(Dump.load(file))
    return found


def test_two_processes_write_the_dump_of_one(dumps: list[Dump]):
    one, two = dumps
    assert one.arrays.keys() == two.arrays.keys()
    assert one["sample_ids"].tolist() == two["sample_ids"].tolist() == list(range(VAL_IMAGES))
    for name, values in one.arrays.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(two[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
        else:
            assert np.array_equal(two[name], values), name


def test_the_dump_is_what_timm_says_of_the_same_images(dumps: list[Dump], weights: Path, digits: Path):
    dump, index = dumps[0], ShardIndex.open(digits / "val")
    model = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(decode(read_sample(index, row))) for row in range(VAL_IMAGES)])
    with torch.no_grad():
        logits = model(images)
        features = model.forward_features(images)
    order = logits.argsort(1, descending=True)
    assert dump["top_classes"].tolist() == order.tolist()
    np.testing.assert_allclose(dump["top_logits"], logits.gather(1, order), atol=1e-4)
    np.testing.assert_allclose(dump["log_sum_exp"], logits.logsumexp(1), atol=1e-4)
    assert dump["labels"].tolist() == index.labels.tolist()
    assert dump["keys"].tolist() == [index.key(row) for row in range(VAL_IMAGES)]
    means = torch.stack([logits[torch.from_numpy(index.labels == k)].sum(0) for k in range(10)])
    np.testing.assert_allclose(dump["class_logit_sums"], means, atol=1e-3)
    np.testing.assert_allclose(dump["logit_products"], (logits.T @ logits), atol=1e-3)
    rows = dump["sampled_ids"]
    assert len(rows) <= 20
    np.testing.assert_allclose(dump["logits"], logits[rows], atol=1e-4)
    np.testing.assert_allclose(dump["embeddings"], features.mean((2, 3))[rows], atol=1e-4)
    pictured = dump["pictured_ids"]
    np.testing.assert_allclose(dump["heat-1"], features.norm(dim=1)[pictured], atol=1e-4)
    np.testing.assert_allclose(dump["region_logits"][:, 0], logits[pictured], atol=1e-4)
    head = model.get_classifier()
    with torch.no_grad():
        activation = torch.einsum("bchw,kc->bkhw", features, head.weight) + head.bias[:, None, None]
    named = activation[torch.arange(len(logits)), logits.argmax(1)]
    np.testing.assert_allclose(dump["activation"], named[pictured], atol=1e-4)


def test_a_sample_is_a_function_of_the_labels_and_has_groups_of_a_few_classes():
    labels = np.arange(50_000) % 1000
    sample = choose_sample(labels, 2000)
    assert np.array_equal(sample, choose_sample(labels, 2000))
    assert len(set(sample.tolist())) == len(sample) <= 2000
    counts = np.sort(np.bincount(labels[sample]))[::-1]
    assert (counts[:20] >= 50).all()
    assert counts[20] < 10
    assert choose_sample(labels[:30], 2000).tolist() == list(range(30))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--dump", "nowhere/x.npz"], "nowhere is no folder; make it first"),
        (["--dump-sample", "0"], "0 is no whole number of at least 1"),
    ],
)
def test_a_dump_that_could_not_be_written_is_refused(more: list[str], said: str, options: list[str], capsys, fresh_accelerate):
    from pipelines.evaluate import main

    assert main([*options, *more]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_is_no_dump_is_named_with_the_command_that_writes_one(tmp_path: Path):
    Image.new("RGB", (2, 2)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png: no dump .*evaluate\.py --dump"):
        Dump.load(tmp_path / "x.png")
