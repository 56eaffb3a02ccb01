"""Top-1, top-5, loss and images/s of a model on a prepared split; exact counts for any number of processes.

accelerate launch pipelines/evaluate.py --model resnet18 --weights runs/x/student --val data/imagenet/val
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the checkout need not be installed

from pipelines.setup.launcher import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()

from accelerate import Accelerator

from distill.config import RecipeError
from distill.data.index import ShardIndex
from distill.engine import evaluate
from distill.models.build import import_models
from distill.recipe import Data, Recipe, Teacher, Train
from pipelines.setup.arguments import requests
from pipelines.setup.data import build_eval_loader
from pipelines.setup.models import build_teacher

EPILOG = """
examples:
  accelerate launch pipelines/evaluate.py --model cifar_resnet8 --weights runs/digits/distilled/student --val data/digits/val
  accelerate launch --config_file accelerate_config.yaml pipelines/evaluate.py --model resnet34.tv_in1k \\
      --val data/imagenet/val
exit codes: 0 done, 1 failed, 2 the request was wrong.
"""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="pipelines/evaluate.py",
        description=(__doc__ or "").split("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="NAME", help="timm name")
    parser.add_argument(
        "--weights", default="pretrained", metavar="PATH", help="a file, a run's student/ folder, or `pretrained`"
    )
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="Python file that registers models",
    )
    parser.add_argument("--val", required=True, metavar="DIR", help="folder of a prepared split")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images per process (default 128)")
    parser.add_argument("--image-size", type=int, default=0, metavar="N", help="side of the input (default: the model's own)")
    parser.add_argument("--crop-fraction", type=float, default=0.0, metavar="F", help="default: the model's own")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="default no")
    parser.add_argument(
        "--loader", choices=("auto", "dali", "reference"), default="auto", help="default auto: DALI if installed"
    )
    parser.add_argument("--num-threads", type=int, default=0, metavar="N", help="decoding threads per process")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser.parse_args(argv)


def check_ranges(arguments: argparse.Namespace) -> None:
    """Raises RecipeError for a number that cannot be, or a file that could not be written when the work is done."""
    if arguments.batch_size < 1:
        raise RecipeError(f"--batch-size: {arguments.batch_size} is less than 1; give the images per process")
    if arguments.image_size < 0 or arguments.num_threads < 0:
        raise RecipeError(
            f"--image-size {arguments.image_size}, --num-threads {arguments.num_threads}: neither may be negative"
        )
    if not 0 <= arguments.crop_fraction <= 1:
        raise RecipeError(f"--crop-fraction: {arguments.crop_fraction} is no share; give one above 0 and up to 1")
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise RecipeError(f"--json: {arguments.json.parent} is no folder; make it first")


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """The figures that were asked for. Raises RecipeError for a request that cannot be served."""
    recipe = Recipe(
        out="",
        teacher=Teacher(name=arguments.model, weights=arguments.weights),
        train=Train(evaluate_batch_size=arguments.batch_size),
        data=Data(loader=arguments.loader, num_threads=arguments.num_threads),
    )
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    with requests():
        check_ranges(arguments)
        for file in arguments.imports:
            import_models(file)
        index = ShardIndex.open(arguments.val)
        model = build_teacher(recipe, index.num_classes).to(accelerator.device)
        spec, side = model.input_spec, arguments.image_size
        spec = dataclasses.replace(
            spec,
            height=side or spec.height,
            width=side or spec.width,
            crop_fraction=arguments.crop_fraction or spec.crop_fraction,
        )
        model.input_spec = spec
        loader = build_eval_loader(recipe, index, spec, accelerator)
    figures = evaluate(model, loader, accelerator)
    loader.close()
    accelerator.print(
        f"{arguments.model}: {figures['images']} images, top-1 {figures['top1']:.3f}, top-5 {figures['top5']:.3f},"
        f" loss {figures['loss']:.5f}, {figures['images_per_second']:.0f} images/s"
    )
    if arguments.json and accelerator.is_main_process:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def main(argv: list[str] | None = None) -> int:
    """0 done, 2 a wrong request; a failure raises."""
    try:
        measure(parse(sys.argv[1:] if argv is None else argv))
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
