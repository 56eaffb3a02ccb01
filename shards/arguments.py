"""The command line of `shards/prepare.py`: its sources, its subcommands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from distill.command_line import Parser, percent, whole_number
from distill.data.remote.urls import is_url
from shards.archives import cifar_source, cub200_source, imagenet_source
from shards.folders import folder_source, kaggle_source
from shards.items import Source
from shards.preparation import Options
from shards.refusals import MAX_REFUSED
from shards.sources import digits_source

EPILOG = """examples:
  python shards/prepare.py digits --out data/digits
  python shards/prepare.py folder --source images --out data/mine --shards 16 --workers 4
  python shards/prepare.py imagenet --source archives --out data/imagenet --workers 16
  python shards/prepare.py wds --source imagenet-1k-wds --out data/imagenet
  python shards/prepare.py wds --source hf://datasets/timm/imagenet-1k-wds --out data/imagenet --workers 8
  python shards/prepare.py verify data/mine --full
A source with several splits gives DIR/train and DIR/val, one with a single split gives it in DIR.
Started again after a stop, it makes only what is missing. Exit code: 0 done, 1 failed (or defects found), 2 bad request."""


class SourceCommand(NamedTuple):
    """A command that prepares a source."""

    make: Callable[..., Source]
    """Lists the source that --source names."""
    help: str
    metavar: str = ""
    """Kind of thing that --source takes; empty where there is no --source."""


SOURCES = {
    "folder": SourceCommand(
        folder_source, "a folder of images, CLASS/NAME.jpg, or train/ and val/ (or test/) of these", "IMAGES"
    ),
    "imagenet": SourceCommand(imagenet_source, "the official ILSVRC2012 archives, read without unpacking", "FOLDER"),
    "kaggle": SourceCommand(
        kaggle_source, "ImageNet-1k as unpacked from Kaggle's archive, with LOC_val_solution.csv", "FOLDER"
    ),
    "cifar10": SourceCommand(partial(cifar_source, classes=10), "the official python archive of CIFAR-10", "ARCHIVE"),
    "cifar100": SourceCommand(partial(cifar_source, classes=100), "the official python archive of CIFAR-100", "ARCHIVE"),
    "cub200": SourceCommand(cub200_source, "the official archive of CUB-200-2011", "ARCHIVE"),
    "digits": SourceCommand(digits_source, "the 1,797 scans that scikit-learn embeds, as 32x32 JPEG files"),
}
NAMES_HELP = "one class name a line: the class numbers are those of the lines, from 0 on"


def parser_of(description: str | None) -> Parser:
    """The parser of the command line, with a subcommand for each source and each thing to do with a split."""
    parser = Parser(prog="prepare.py", description=description, epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text, metavar) in SOURCES.items():
        _add_options(source := _add_source(commands, name, text, metavar))
        if name == "folder":
            _add_folder_options(source)
    told = "existing WebDataset shards: indexed and verified, not changed"
    wds = _add_source(commands, "wds", told, "PLACE", kind=place, where="folder or URL where they lie; a URL is read once")
    wds.add_argument(
        "--split",
        action="append",
        default=[],
        metavar="NAME=PATTERN",
        help="shards of train or val, as train=*train*.tar; default: by _info.json or the names",
    )
    wds.add_argument("--image", metavar="FIELD", help="field of the image, as left.jpg; default: the one that is an image")
    wds.add_argument("--label", metavar="FIELD", help="field of the label, as txt; default: cls, or another usual name")
    wds.add_argument("--json-label", metavar="FIELD", help="place of the label in .json, as meta.label")
    wds.add_argument("--class-names", type=Path, metavar="FILE", help=NAMES_HELP)
    wds.add_argument("--one-class", action="store_true", help="prepare shards with a single class")
    wds.add_argument("--renumber", action="store_true", help="number the labels that occur from 0 on, in their order")
    verify = commands.add_parser("verify", help="compare shards with index and manifest; exit code 1 if there is a defect")
    verify.add_argument("folder", type=local_folder, metavar="DIR", help="a split, or the folder of splits")
    verify.add_argument("--full", action="store_true", help="decode every image")
    verify.add_argument(
        "--decodes", type=whole_number(1), default=200, metavar="N", help="or N random ones a split (%(default)s)"
    )
    renew = commands.add_parser("renew", help="bring the index of an earlier version to the present format; shards are kept")
    renew.add_argument("folder", type=local_folder, metavar="DIR", help="a split, or the folder of splits")
    show = commands.add_parser("show", help="classes, counts, sizes, and a sheet of images")
    show.add_argument("folder", type=local_folder, metavar="DIR", help="a split, or the folder of splits")
    show.add_argument("--images", type=whole_number(1), default=24, metavar="N", help="images of each split (%(default)s)")
    show.add_argument("--sheet", type=Path, metavar="FILE", help="default: DIR/sheet.png")
    return parser


def local_folder(text: str) -> Path:
    """A folder of this machine: a type for `add_argument`."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"{text} is a URL; give a folder, as `wds --source URL --out DIR` makes one")
    return Path(text)


def place(text: str) -> Path | str:
    """A folder, or the text of a URL: a type for `add_argument`."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path")
    return text if is_url(text) else Path(text)


def _add_source(
    commands: Any, name: str, text: str, metavar: str, kind: Callable[[str], Any] = Path, where: str = "where it lies"
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    if metavar:
        parser.add_argument("--source", type=kind, required=True, metavar=metavar, help=where)
    parser.add_argument(
        "--out", type=place, required=True, metavar="DIR", help="where the splits go; s3://, gs:// or az:// too"
    )
    parser.add_argument("--workers", type=whole_number(1), default=1, metavar="N", help="processes (%(default)s)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="where shards are made (%(default)s)")
    parser.add_argument(
        "--max-refused",
        type=percent,
        default=100 * MAX_REFUSED,
        metavar="P",
        help="fail where more than P per cent of a split's images are refused (%(default)g)",
    )
    parser.add_argument("--address", metavar="A", help="a running Ray cluster; default: one on this machine")
    return parser


def _add_folder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--val-name", metavar="NAME", help="folder that becomes val, where several could")
    parser.add_argument(
        "--class-order", choices=("plain", "natural"), help="order of the class numbers: torchvision's (default) or timm's"
    )
    parser.add_argument("--class-names", type=Path, metavar="FILE", help=NAMES_HELP)
    parser.add_argument("--one-class", action="store_true", help="prepare a folder with a single class")


def _add_options(parser: argparse.ArgumentParser) -> None:
    count = parser.add_mutually_exclusive_group()
    count.add_argument("--shards", type=whole_number(1), metavar="N", help="shards of the training split")
    count.add_argument(
        "--shard-size", type=whole_number(1), default=Options.shard_size, metavar="N", help="or images a shard (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the shuffle (%(default)s)")
    parser.add_argument(
        "--resize-short", type=whole_number(1), metavar="N", help="shrink larger training images; default: bytes are kept"
    )
    parser.add_argument(
        "--quality", type=whole_number(1, 100), metavar="Q", help=f"JPEG quality of shrunk images ({Options.quality})"
    )
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="at most N images a split")
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, write nothing")
