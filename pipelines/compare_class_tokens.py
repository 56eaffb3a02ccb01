"""Compares the definitions of a class-token model's region logits on real images.

python pipelines/compare_class_tokens.py --images FOLDER   (FOLDER/{train,test}/CLASS/*.jpg at 32 px, such as CIFAR-10)

A small ViT is trained on them. Prints one JSON object per line: for each definition the top-1 of its regions and how often they
agree with the whole image; then the top-1 of a student after a short distillation with SDD over each definition, and by
cross-entropy alone, seed by seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
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
from distill.protocols import Needs, Regions

REGIONS = Regions(scales=(1, 2, 4))
Data = tuple[Tensor, Tensor]
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}  # 4 x 4 tokens: one per smallest region


def main(argv: list[str] | None = None) -> None:
    """Trains, reads, distils; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--student-epochs", type=int, default=4)
    parser.add_argument("--per-class", type=int, default=5000, help="training images of each class, at most")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args(argv)
    train, test = (load(arguments.images / split, n) for split, n in (("train", arguments.per_class), ("test", None)))
    torch.manual_seed(0)
    model = teacher_model(int(train[1].max()) + 1)
    plain = reading(model, "repeat")
    fit(plain.train(), train, arguments.teacher_epochs, 1e-3, lambda out, _, labels: F.cross_entropy(out.logits, labels))
    for mode in CLASS_TOKEN_MODES:
        report(definition=mode, **measure(reading(model, mode).eval(), test))
    for seed in range(arguments.seeds):
        for mode in CLASS_TOKEN_MODES:
            report(definition=mode, seed=seed, student_top1=distil(reading(model, mode).eval(), train, test, arguments, seed))
        alone = distil(plain.eval(), train, test, arguments, seed, share=0.0)
        report(definition="no teacher", seed=seed, student_top1=alone)


def teacher_model(classes: int) -> nn.Module:
    """A class-token ViT with a stem of three convolutions, which lets it learn from tens of thousands of images."""
    model: Any = create_model("vit_tiny_patch16_224", num_classes=classes, **VIT)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, 48, 96, VIT["embed_dim"])):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
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
    """AdamW with a cosine; flips and shifted crops."""
    images, labels = data
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        if step % (len(images) // 64) == 0:
            order = torch.randperm(len(images))
        chosen = order[(step * 64) % (len(images) // 64 * 64) :][:64]
        batch = augmented(images[chosen])
        with torch.no_grad():
            theirs = None if teacher is None else teacher(batch)
        optimiser.zero_grad()
        loss(model(batch), theirs, labels[chosen]).backward()
        optimiser.step()
        schedule.step()


def augmented(images: Tensor) -> Tensor:
    """Pixels in [0, 1]; the batch is flipped half of the time per image, and shifted as a whole by up to 4."""
    flip = torch.rand(len(images)) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    top, left = torch.randint(0, 9, (2,)).tolist()
    return F.pad(images.float() / 255, (4, 4, 4, 4))[:, :, top : top + 32, left : left + 32]


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


def distil(teacher: Backbone, train: Any, test: Any, arguments: argparse.Namespace, seed: int, share: float = 0.9) -> float:
    """Top-1 of a CIFAR ResNet-8 distilled by cross-entropy and, with this share, SDD-KD from these regions."""
    torch.manual_seed(seed)
    sdd = LOSSES["sdd"](base="kd", scales=REGIONS.scales)
    student = create_student(
        "cifar_resnet8", num_classes=teacher.num_classes, needs=sdd.student_needs | Needs((REGIONS,)), pooling=region_matrix
    )

    def loss(mine: Any, theirs: Any, labels: Tensor) -> Tensor:
        return (1 - share) * F.cross_entropy(mine.logits, labels) + share * sdd(mine, theirs, labels)[0]

    fit(student, train, arguments.student_epochs, 3e-3, loss, teacher)
    return measure(student.eval(), test)["top1_whole"]


def report(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
