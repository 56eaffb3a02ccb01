"""Top-1, top-5, loss and images/s of a model on a prepared split; exact counts for any number of processes.

accelerate launch pipelines/evaluate.py --model resnet18 --weights runs/x/student --val data/mine/val
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from distill.children import end_at_interrupt
from pipelines.setup.launcher import end_with_launcher, exit_with

if __name__ == "__main__":
    end_at_interrupt()
    end_with_launcher()

from distill.command_line import Parser, command, new_file, requests, whole_number
from distill.data.decoding import DecodeName
from distill.data.index import ShardIndex
from distill.data.remote.cache import cache_folder
from distill.errors import RequestError
from distill.evaluation import evaluate
from distill.files import write_atomically
from distill.models.build import ProbedModel, create_teacher
from distill.protocols import Needs
from distill.recipe import MixedPrecision
from distill.report import say
from pipelines.reporting.collect import Collector
from pipelines.setup.arguments import add_import_option, import_files
from pipelines.setup.data import LOADERS, create_eval_loader
from pipelines.setup.machine import create_accelerator, leave_together, meet
from pipelines.setup.remote import follow, schedule_evaluation
from pipelines.setup.switches import set_switches

EPILOG = """
examples:
  accelerate launch pipelines/evaluate.py --model cifar_resnet8 --weights runs/digits/distilled/student --val data/digits/val
  accelerate launch --config_file accelerate_config.yaml pipelines/evaluate.py --model resnet34.tv_in1k \\
      --val data/imagenet/val --dump runs/r34_r18/teacher.npz
exit codes: 0 done, 1 failed, 2 the request was wrong.
"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. Raises RequestError for a number that cannot be, or a file that could not be written in the end."""
    parser = Parser(description=__doc__, epilog=EPILOG)
    parser.add_argument("--model", required=True, metavar="NAME", help="timm name")
    parser.add_argument(
        "--weights", default="pretrained", metavar="PATH", help="a file, a run's student/ folder, or `pretrained`"
    )
    parser.add_argument(
        "--class-map",
        metavar="FILE",
        help="one line per class of the data: its number among the model's; `by_number`: names are not compared",
    )
    add_import_option(parser)
    parser.add_argument("--val", required=True, metavar="PLACE", help="folder or URL of a prepared split")
    parser.add_argument("--cache-dir", default="", metavar="DIR", help="data.cache_dir of a recipe, for shards of a URL")
    parser.add_argument("--cache-limit", type=float, default=0.0, metavar="GB", help="data.cache_limit of a recipe")
    parser.add_argument("--batch-size", type=whole_number(1), default=128, metavar="N", help="images per process (%(default)s)")
    parser.add_argument(
        "--image-size", type=whole_number(0), default=0, metavar="N", help="side of the input; 0: the model's own"
    )
    parser.add_argument("--crop-fraction", type=float, default=0.0, metavar="F", help="0: the model's own")
    parser.add_argument(
        "--mixed-precision", choices=get_args(MixedPrecision), default="auto", help="auto (default): the launcher's"
    )
    parser.add_argument("--loader", choices=("auto", *LOADERS), default="auto", help="auto (default): DALI if installed")
    parser.add_argument(
        "--decode", choices=get_args(DecodeName), default="auto", help="data.decode of a recipe; auto (default): tried first"
    )
    parser.add_argument("--num-threads", type=whole_number(0), default=0, metavar="N", help="decoding threads per process")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write the figures there too")
    parser.add_argument(
        "--dump", type=new_file, metavar="FILE", help="write what it says of each image, for pipelines/report.py (.npz)"
    )
    parser.add_argument(
        "--dump-sample",
        type=whole_number(1),
        default=2000,
        metavar="N",
        help="images of the dump described in full (%(default)s)",
    )
    asked = parser.parse_args(argv)
    if not 0 <= asked.crop_fraction <= 1:
        raise RequestError(f"--crop-fraction: {asked.crop_fraction} is no share; give one above 0 and up to 1")
    return asked


def build_model(asked: argparse.Namespace, index: ShardIndex) -> ProbedModel:
    """The model with its weights, at the size that was asked for."""
    return create_teacher(
        asked.model,
        weights=asked.weights,
        num_classes=index.num_classes,
        image_size=asked.image_size or None,
        class_map=asked.class_map,
        class_names=index.class_names,
    )


@command
def main(argv: Sequence[str]) -> None:
    """Prints the figures, and writes them where that is asked."""
    asked = parse(argv)
    import_files(asked.imports)
    with requests():
        accelerator = create_accelerator(asked.mixed_precision)
        set_switches(accelerator.device)
        index = ShardIndex.open(asked.val, cache_folder(asked.cache_dir))
        line = follow(schedule_evaluation(index, asked.batch_size, asked.cache_limit, accelerator))
        probed = build_model(asked, index)
        model = probed.backbone(Needs(logits=True)).to(accelerator.device)
        collector = Collector(probed, index, asked.dump_sample, accelerator.device) if asked.dump else None
        crop = asked.crop_fraction or model.input_spec.crop_fraction
        spec = dataclasses.replace(model.input_spec, crop_fraction=crop)
        how = {"loader": asked.loader, "decode": asked.decode, "threads": asked.num_threads}
        loader = create_eval_loader(index, spec, asked.batch_size, accelerator, **how)
    for remark in filter(None, (probed.remark, line)):
        say(accelerator, remark)
    figures = evaluate(model, loader, accelerator, observe=collector)
    loader.close()
    index.store.close()
    say(
        accelerator,
        f"{asked.model}: {figures['images']} images, top-1 {figures['top1']:.3f}, top-5 {figures['top5']:.3f},"
        f" loss {figures['loss']:.5f}, {figures['images_per_second']:.0f} images/s;"
        f" {spec.height}x{spec.width} px, crop {crop:g}, precision {accelerator.mixed_precision}",
    )
    facts = {"precision": accelerator.mixed_precision, "image_size": [spec.height, spec.width], "crop_fraction": crop}
    if collector is not None:
        collector.write(asked.dump, accelerator, {"model": asked.model, "weights": asked.weights, **figures, **facts})
        say(accelerator, f"{asked.dump}: {len(collector.sample)} of {index.num_samples} images in full")
    if asked.json and accelerator.is_main_process:
        write_atomically(asked.json, json.dumps({**figures, **facts}, indent=2) + "\n")
    leave_together(meet)


if __name__ == "__main__":
    exit_with(main)
