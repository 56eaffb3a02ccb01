"""Compares the definitions of a class-token model's region logits on real images.

python pipelines/compare_class_tokens.py --images FOLDER   (FOLDER/{train,test}/CLASS/*.jpg at 32 px, such as CIFAR-10)

A small ViT is trained on them, or read from `--teacher`. Prints one JSON object per line: for each definition the top-1 of its
regions and how often they agree with the whole image; then the top-1 of a student after a short distillation with SDD over each
definition, and by cross-entropy alone, seed by seed; then their means and standard deviations over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses import LOSSES
from distill.losses.regions import region_matrix
from distill.models.backbone import Backbone
from distill.models.build import create_model, create_student
from distill.models.mechanisms import CLASS_TOKEN_MODES
from distill.models.spec import input_spec_of
from distill.models.weights import load_weights
from distill.protocols import Needs, Regions

REGIONS = Regions(scales=(1, 2, 4))
Data = tuple[Tensor, Tensor]
NO_TEACHER = "no teacher"
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}  # 4 x 4 tokens: one per smallest region
STEM = ((48, 2), (48, 1), (96, 2), (VIT["embed_dim"], 2))
"""Width and stride of each convolution: 8 px a token, each of which sees 19."""
BATCH = 64


def main(argv: list[str] | None = None) -> None:
    """Trains, reads, distils; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--student-epochs", type=int, default=4)
    parser.add_argument("--per-class", type=int, default=5000, help="training images of each class, at most")
    parser.add_argument("--student-per-class", type=int, default=5000, help="of these, at most, for the students")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--teacher", type=Path, metavar="FILE", help="its weights; trained and written where there are none")
    arguments = parser.parse_args(argv)
    train, test = (load(arguments.images / split, n) for split, n in (("train", arguments.per_class), ("test", None)))
    model = trained_teacher(train, arguments)
    for mode in CLASS_TOKEN_MODES:
        report(definition=mode, **measure(reading(model, mode).eval(), test))
    fewer = load(arguments.images / "train", min(arguments.per_class, arguments.student_per_class))
    found: dict[str, list[float]] = {name: [] for name in (*CLASS_TOKEN_MODES, NO_TEACHER)}
    for seed in range(arguments.seeds):
        for name, values in found.items():
            values.append(distil(model, name, fewer, test, arguments.student_epochs, seed))
            report(definition=name, seed=seed, student_top1=values[-1])
    for name, values in found.items():
        spread = round(statistics.stdev(values), 4) if len(values) > 1 else None
        report(definition=name, mean_top1=round(statistics.mean(values), 4), deviation=spread, seeds=len(values))


def trained_teacher(train: Data, arguments: argparse.Namespace) -> nn.Module:
    """The ViT, with the weights of `--teacher` where that file is there, else trained."""
    torch.manual_seed(0)
    model = teacher_model(int(train[1].max()) + 1)
    file: Path | None = arguments.teacher
    if file and file.exists():
        load_weights(model, file)
        return model
    plain = reading(model, "repeat").train()
    fit(plain, train, arguments.teacher_epochs, 1e-3, lambda out, _, labels: F.cross_entropy(out.logits, labels))
    if file:
        torch.save(model.state_dict(), file)
    return model


def teacher_model(classes: int) -> nn.Module:
    """A class-token ViT with a stem of convolutions, which lets it learn from tens of thousands of images."""
    model: Any = create_model("vit_tiny_patch16_224", num_classes=classes, **VIT)
    layers: list[nn.Module] = []
    channels = 3
    for width, stride in STEM:
        layers += [nn.Conv2d(channels, width, 3, stride=stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    model.patch_embed.proj = nn.Sequential(*layers)
    return model


def reading(model: nn.Module, mode: str) -> Backbone:
    """The ViT with this definition of its regions."""
    needs = Needs(region_logits=(REGIONS,))
    spec = replace(input_spec_of(model), height=32, width=32)
    return Backbone(model, needs, pooling=region_matrix, input_spec=spec, class_tokens=mode)


def load(folder: Path, per_class: int | None) -> Data:
    """uint8 images [N, 3, 32, 32] and labels [N]: the first images of each class, or all. ValueError where there are none."""
    images, labels = [], []
    for label, name in enumerate(sorted(path for path in folder.glob("*") if path.is_dir())):
        for file in sorted(name.iterdir())[:per_class]:
            images.append(torch.from_numpy(np.array(Image.open(file).convert("RGB"))))
            labels.append(label)
    if not images:
        raise ValueError(f"{folder}: no CLASS/IMAGE files; give the folder that holds train and test")
    return torch.stack(images).permute(0, 3, 1, 2), torch.tensor(labels)


def fit(model: Backbone, data: Data, epochs: int, rate: float, loss: Any, teacher: Backbone | None = None) -> None:
    """AdamW in bfloat16, a short warm-up and a cosine; flips and shifted crops."""
    images, labels = data
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    batches = len(images) // BATCH
    total = epochs * batches
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, 10 * (step + 1) / total) * (1 + math.cos(math.pi * step / total)) / 2
    )
    for _ in range(epochs):
        for chosen in torch.randperm(len(images))[: batches * BATCH].split(BATCH):
            batch = augmented(images[chosen])
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    theirs = None if teacher is None else teacher(batch)
                mine = model(batch)
            optimiser.zero_grad()
            loss(mine, theirs, labels[chosen]).backward()
            optimiser.step()
            schedule.step()


def augmented(images: Tensor) -> Tensor:
    """Pixels in [0, 1]; each image is flipped half of the time, and shifted by up to 4 pixels."""
    flip = torch.rand(len(images)) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    padded = F.pad(images, (4, 4, 4, 4))
    shifts = torch.randint(0, 9, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + 32, x : x + 32] for image, (y, x) in zip(padded, shifts, strict=True)]).float() / 255


def measure(model: Backbone, data: Data) -> dict[str, float]:
    """Top-1 of the whole image, of the 4 and of the 16 regions, and how often these agree with the whole image."""
    found = []
    with torch.no_grad():
        for images, labels in zip(data[0].split(250), data[1].split(250), strict=True):
            classes = model(images.float() / 255).region_logits[REGIONS].argmax(2)
            found.append(torch.stack([classes == labels[:, None], classes == classes[:, :1]]).float().mean(1))
    right, agree = torch.stack(found).mean(0)
    parts = {"whole": slice(0, 1), "2x2": slice(1, 5), "4x4": slice(5, 21)}
    values = {f"top1_{name}": right[part].mean() for name, part in parts.items()}
    values |= {f"agreement_{name}": agree[part].mean() for name, part in parts.items() if name != "whole"}
    return {name: round(float(value), 4) for name, value in values.items()}


def distil(model: nn.Module, mode: str, train: Data, test: Data, epochs: int, seed: int) -> float:
    """Top-1 of a CIFAR ResNet-8 trained by cross-entropy and SDD-KD over this definition's regions, or by the first alone."""
    torch.manual_seed(seed)
    sdd = LOSSES["sdd"](base="kd", scales=REGIONS.scales)
    needs = sdd.student_needs | Needs((REGIONS,))
    student = create_student("cifar_resnet8", num_classes=int(train[1].max()) + 1, needs=needs, pooling=region_matrix)
    teacher = None if mode == NO_TEACHER else reading(model, mode).eval()

    def loss(mine: Any, theirs: Any, labels: Tensor) -> Tensor:
        alone = F.cross_entropy(mine.logits, labels)
        return alone if theirs is None else 0.1 * alone + 0.9 * sdd(mine, theirs, labels)[0]

    fit(student, train, epochs, 3e-3, loss, teacher)
    return measure(student.eval(), test)["top1_whole"]


def report(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
