"""What an evaluation passes by, collected into a dump: every image's best logits, and a sample of the images in full."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor

from distill.batch_transform import to_pixels
from distill.data.index import ShardIndex
from distill.data.remote.urls import is_url
from distill.files import written_aside
from distill.models.build import ProbedModel
from distill.protocols import Batch, ModelOutput, Needs, Regions
from distill.regions import usable_scales
from distill.seeds import derive_seed
from pipelines.reporting.dump import FORMAT, Array

TOP = 10
"""Classes whose logits are kept for every image: 50,000 images of ten are 3 MB, of all thousand 200 MB."""
SCALES = (1, 2, 4)
PICTURED = 32
"""Images of the sample whose region logits and heat maps are kept whole."""
CLOSE_CLASSES, CLOSE_IMAGES = 20, 50
"""Classes that the sample holds more images of, so that a map of embeddings shows them as groups."""
LARGEST_MATRIX = 2000
"""Classes up to which the K x K sums are kept: at 21,843 classes each would take 4 GB."""


def choose_sample(labels: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """The images of a split that a dump describes in full: about `size` rows of the index, sorted, a function of the labels.

    Half are drawn from all images, half from a few classes (`CLOSE_CLASSES` of them, up to `CLOSE_IMAGES` each). A split of
    not more than `size` images is its own sample.
    """
    if len(labels) <= size:
        return np.arange(len(labels))
    generator = np.random.default_rng(derive_seed(0, "dump"))
    spread = generator.permutation(len(labels))[: size - size // 2]
    classes = generator.permutation(np.unique(labels))[:CLOSE_CLASSES]
    each = min(CLOSE_IMAGES, size // 2 // len(classes))
    close = [generator.permutation(np.flatnonzero(labels == label))[:each] for label in classes]
    return np.unique(np.concatenate([spread, *close]))


def regions_of(probed: ProbedModel) -> tuple[Regions, Regions]:
    """The regions whose logits a dump keeps, and the single cells of the feature map, whose logits are a class's activation."""
    grid = (probed.anatomy.layout.height, probed.anatomy.layout.width)
    return Regions(usable_scales(SCALES, grid)), Regions((min(grid),))


def full_needs(probed: ProbedModel) -> tuple[Needs, dict[str, str]]:
    """All that a dump keeps of this model, and for each thing that it cannot give the reason."""
    wanted = {
        "embedding": Needs(embedding=True),
        "stages": Needs(stages=tuple(range(-len(probed.facts.stages), 0))),
        "regions": Needs(region_logits=regions_of(probed)),
    }
    needs, absent = Needs(logits=True), {}
    for name, more in wanted.items():
        try:
            probed.backbone(needs | more)
            needs |= more
        except ValueError as error:
            absent[name] = str(error)
    return needs, absent


class Collector:
    """The dump of one model while its evaluation passes by: every image's best logits, the sample in full.

    It is called on every process with each batch and the model's output, inside the evaluation's autocast. The sample goes
    through the model a second time, for what plain evaluation does not compute.
    """

    def __init__(self, probed: ProbedModel, index: ShardIndex, size: int, device: torch.device) -> None:
        self.index = index
        self.sample = choose_sample(index.labels, size)
        # spread over the sample, which is sorted: shards are often in the order of classes
        self.pictured = self.sample[np.linspace(0, len(self.sample) - 1, min(PICTURED, len(self.sample))).astype(int)]
        self.needs, self.absent = full_needs(probed)
        self.regions, self.cells = regions_of(probed)
        self.full = probed.backbone(self.needs).to(device).eval()
        self.parts: list[dict[str, Array]] = []
        self.sample_parts: list[dict[str, Array]] = []
        self.picture_parts: list[dict[str, Array]] = []
        classes = index.num_classes if index.num_classes <= LARGEST_MATRIX else 0
        zeros = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in ((classes, classes),) * 2]
        self.class_sums, self.products = zeros
        """Sum of the logits of each class's images, and of the outer product of every image's logits with themselves."""

    def __call__(self, batch: Batch, output: ModelOutput) -> None:
        """Keeps what this batch adds."""
        logits = output.logits.float()
        best = logits.topk(min(TOP, logits.shape[1]), dim=1)
        self.parts.append(
            {
                "sample_ids": _host(batch.sample_ids),
                "labels": _host(batch.labels),
                "top_classes": _host(best.indices.int()),
                "top_logits": _host(best.values),
                "log_sum_exp": _host(logits.logsumexp(1)),
                "label_logits": _host(logits.gather(1, batch.labels[:, None])[:, 0]),
            }
        )
        if len(self.products):
            exact = logits.double()
            self.class_sums.index_add_(0, batch.labels, exact)
            self.products += exact.T @ exact
        chosen = np.flatnonzero(np.isin(_host(batch.sample_ids), self.sample))
        if len(chosen):
            rows = torch.from_numpy(chosen)
            self._describe(batch.images[rows.to(batch.images.device)], _host(batch.sample_ids)[chosen])

    def _describe(self, images: Tensor, ids: Array) -> None:
        """Keeps all that the dump holds of the sample's images."""
        output = self.full(to_pixels(images))
        kept = {"sampled_ids": ids, "logits": _host(output.logits)}
        if output.embedding is not None:
            kept["embeddings"] = _host(output.embedding)
        for stage, maps in output.stages.items():
            kept[f"stage{stage}"] = _host(maps.float().mean((2, 3)))
        if output.region_logits:
            kept["region_classes"] = _host(output.region_logits[self.regions].argmax(-1).int())
        self.sample_parts.append(kept)
        rows = np.flatnonzero(np.isin(ids, self.pictured))
        if len(rows):
            pictures = {f"heat{stage}": maps.float().norm(dim=1) for stage, maps in output.stages.items()}
            if output.region_logits:
                pictures["region_logits"] = output.region_logits[self.regions]
                pictures["activation"] = class_activation(output.region_logits[self.cells], output.logits.argmax(1))
            self.picture_parts.append({"pictured_ids": ids[rows], **{k: _host(each)[rows] for k, each in pictures.items()}})

    def write(self, path: Path, accelerator: Accelerator, facts: dict[str, Any]) -> None:
        """Writes the dump of all processes, whole or not at all; a collective, the main process writes."""
        sums = {"class_logit_sums": self.class_sums, "logit_products": self.products}
        reduced = {name: _host(accelerator.reduce(value, reduction="sum")) for name, value in sums.items()}
        gathered = gather_object([(self.parts, self.sample_parts, self.picture_parts)])
        if not accelerator.is_main_process:
            return
        arrays: dict[str, Array] = {name: value for name, value in reduced.items() if value.size}
        for number, key in enumerate(("sample_ids", "sampled_ids", "pictured_ids")):
            arrays |= _joined([part for each in gathered for part in each[number]], key)
        scales = list(self.regions.scales) if self.needs.region_logits else []
        about = {
            "format": FORMAT,
            **facts,
            "split": self.index.place if is_url(self.index.place) else str(Path(self.index.place).resolve()),
            "split_digest": self.index.digest,
            "class_names": list(self.index.class_names),
            "scales": scales,
            "stages": len(self.needs.stages),
            "absent": self.absent,
        }
        arrays["keys"] = np.array([self.index.key(int(row)) for row in arrays["sample_ids"]])
        arrays["facts"] = np.array(json.dumps(about))
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]  # no array is named allow_pickle


def class_activation(cells: Tensor, classes: Tensor) -> Tensor:
    """The logit of an image's class in every cell of its map: cells [B, side * side, K], classes [B] -> [B, side, side].

    Of a head that pools and is linear: the class activation map of Zhou et al. 2016, and the bias.
    """
    side = math.isqrt(cells.shape[1])
    return cells.gather(2, classes[:, None, None].expand(-1, cells.shape[1], 1)).reshape(-1, side, side)


def _host(values: Tensor) -> Array:
    """The values on the host; NumPy has no bfloat16."""
    values = values.detach()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).cpu().numpy()


def _joined(parts: list[dict[str, Array]], key: str) -> dict[str, Array]:
    """The parts in one, in the order of `key`, so that neither batches nor processes show."""
    if not parts:
        return {}
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.argsort(joined[key])
    return {name: values[order] for name, values in joined.items()}
