"""Exports a finished student to ONNX, checked against PyTorch on real images, and pushes it to the Hugging Face hub when asked.

python pipelines/export.py runs/mine --out student.onnx
python pipelines/export.py runs/mine/student --out student.onnx --images PHOTOGRAPHS --push NAME/REPOSITORY
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

import torch
from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from distill.command_line import Parser, command, new_file, requests
from distill.data.index import ShardIndex
from distill.data.manifest import MANIFEST
from distill.data.pixels import decode
from distill.data.reference import read_sample
from distill.files import RUN_MANIFEST
from distill.models.build import create_model
from distill.models.card import CARD, hub_card
from distill.models.input_spec import input_spec_of
from distill.models.onnx_file import export_onnx
from distill.models.weights import CONFIG
from pipelines.setup.arguments import add_import_option, import_files

CHECKED_IMAGES = 64


@command
def main(argv: Sequence[str]) -> None:
    """The ONNX file, pushed where that is asked. Raises RecipeError where the student cannot be exported."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a run's folder, or its student/")
    parser.add_argument("--out", type=new_file, required=True, metavar="FILE", help="the ONNX file")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="to check on: shards or image files (default: the run's data.val)"
    )
    parser.add_argument("--push", metavar="REPO", help="NAME/REPOSITORY on the hub, made private if it is not there")
    parser.add_argument("--license", metavar="ID", help="of the pushed weights, as the hub names it: apache-2.0, ...")
    parser.add_argument("--dataset", metavar="ID", help="that the student learned from, as the hub names it: imagenet-1k, ...")
    add_import_option(parser)
    arguments = parser.parse_args(argv)
    import_files(arguments.imports)
    with requests():
        export(arguments)


def export(arguments: argparse.Namespace) -> None:
    """Writes the ONNX file, and pushes it where that is asked. ValueError where it cannot be done."""
    if arguments.push and get_token() is None:
        raise ValueError(f"--push {arguments.push}: no token for the hub; run `hf auth login`, or set HF_TOKEN")
    student = student_of(arguments.folder)
    source = arguments.images or validation_of(student)
    model = create_model(f"local-dir:{student}", pretrained=True)
    input_spec_of(model)  # raises for a model that is not fed RGB images
    found = export_onnx(model, batch_of(source, model), arguments.out)
    print(
        f"{arguments.out}: checked on {found.images} images of {source}, largest difference {found.largest_difference:.1e}"
        f" (largest logit {found.largest_logit:.1f}), same top-1 for {found.same_top1}"
    )
    if arguments.push:
        fields = {"license": arguments.license, "datasets": arguments.dataset}
        said = {name: value for name, value in fields.items() if value}
        push(student, arguments.out, arguments.push, said)
        print(f"pushed to {arguments.push}" + ("" if arguments.license else "; its card names no licence: give --license"))


def student_of(folder: Path) -> Path:
    """The student's folder of a run, or `folder` itself where it is one."""
    found = next((f for f in (folder / "student", folder) if (f / CONFIG).is_file()), None)
    if found is None:
        raise ValueError(f"{folder}: neither a finished run nor a student's folder; there is no {CONFIG}")
    return found


def validation_of(student: Path) -> Path:
    """The validation shards that the student's run was evaluated on."""
    manifest = student.parent / RUN_MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{student}: no run's {RUN_MANIFEST} beside it to name its images; give --images")
    try:
        return Path(json.loads(manifest.read_text())["recipe"]["data"]["val"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{manifest}: names no validation shards, as an earlier version's; give --images") from error


def batch_of(source: Path, model: nn.Module) -> Tensor:
    """Up to `CHECKED_IMAGES` images of `source`, spread over it, as timm feeds them to this model: float32 [B, 3, H, W]."""
    transform = create_transform(**resolve_model_data_config(model))
    images = [transform(image) for image in images_of(source)]
    if len(images) < 2:
        raise ValueError(f"{source}: {len(images)} images; give --images, shards or a folder with at least 2 image files")
    return torch.stack(images)


def images_of(source: Path) -> Iterator[Image.Image]:
    """RGB images of a prepared split, or of the image files anywhere below a folder."""
    if (source / MANIFEST).is_file():
        index = ShardIndex.open(source)
        for sample in spread(index.num_samples):
            yield decode(read_sample(index, sample))
        return
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; give --images, shards or a folder of image files")
    known = Image.registered_extensions()
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in known)
    for number in spread(len(files)):
        yield decode(files[number].read_bytes())


def spread(total: int) -> list[int]:
    """Numbers below `total`, at most `CHECKED_IMAGES`, evenly from the first on."""
    count = min(total, CHECKED_IMAGES)
    return [i * total // count for i in range(count)]


def push(student: Path, file: Path, repository: str, fields: Mapping[str, str]) -> None:
    """Uploads the student's folder and the ONNX file. timm loads it as `hf-hub:NAME/REPOSITORY`, and the uploaded card says so.

    fields: as in `hub_card`.
    """
    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(shutil.copytree(student, folder, dirs_exist_ok=True))
            (copy / CARD).write_text(str(hub_card(student, repository, fields)))
            shutil.copy(file, copy / file.name)
            api.upload_folder(repo_id=repository, folder_path=copy)
    except (HTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"--push {repository}: {str(error).splitlines()[0]}; {file} is written") from error


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    sys.exit(main())
