#!/usr/bin/env python
"""Images to WebDataset shards with an index and a manifest: `python shards/prepare.py SOURCE ... --out DIR`."""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the repository root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill.children import end_at_interrupt

if __name__ == "__main__":
    end_at_interrupt()

from distill.command_line import command, requests
from distill.data.index import ShardIndex
from distill.data.remote.fetch import retried
from distill.data.remote.urls import remote_of
from shards.arguments import SOURCES, parser_of
from shards.folders import folder_source
from shards.indexing import Reading, index_existing
from shards.items import Source, SourceChanged
from shards.preparation import Options, prepare, split_jobs
from shards.refusals import TooManyRefused, reasons_of
from shards.renew import renew_split
from shards.show import describe, write_sheet
from shards.sources import digits_source
from shards.split_work import SplitSummary, split_folders
from shards.splits import parse_assignments, split_of, split_word
from shards.tarwalk import BrokenTar
from shards.upload import stage_of
from shards.verify import find_split_folders, unfinished_splits, verify_split
from shards.workers import Runner, WorkersLost, run_jobs, run_jobs_on_ray
from shards.writer import QUARANTINE

DIGITS_SHARDS = 4
SHOWN = 8
"""Classes that are named where more have no image."""


def prepare_digits(out: Path, *, progress: bool = False) -> list[SplitSummary]:
    """The embedded digits as `out/train` and `out/val`; a quick no-op where they are finished."""
    return prepare(digits_source(), out, Options(shards=DIGITS_SHARDS), progress=progress)


@command
def main(argv: Sequence[str]) -> int:
    """1 where the disk, a worker or an archive fails, and where a split has defects."""
    parsed = parser_of(__doc__).parse_args(argv)
    commands = {"verify": _verify, "show": _show, "renew": _renew, "wds": _index}
    with requests():
        try:
            _check_files(parsed)
            return commands.get(parsed.command, _prepare)(parsed)
        except (BrokenTar, OSError, SourceChanged, TooManyRefused, WorkersLost) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1


def _check_files(parsed: argparse.Namespace) -> None:
    """ValueError where an option names a file that cannot be read, or a place where nothing can be written."""
    given = vars(parsed)
    out = given.get("out")
    if isinstance(out, Path) and (file := next((p for p in (out, *out.parents) if p.is_file()), None)):
        raise ValueError(f"--out {out}: {file} is a file; give a folder, which is made where there is none")
    if (sheet := given.get("sheet")) is not None and (sheet.is_dir() or not sheet.resolve().parent.is_dir()):
        raise ValueError(f"--sheet {sheet}: no file can be written there; give a file in a folder that exists")
    if (names := given.get("class_names")) is not None and not names.is_file():
        raise ValueError(f"--class-names {names}: no such file; give one with a class name a line, in order")


def _prepare(parsed: argparse.Namespace) -> int:
    if parsed.command == "digits" and parsed.shards is None:
        parsed.shards = DIGITS_SHARDS
    if parsed.quality is not None and parsed.resize_short is None:
        raise ValueError(f"--quality {parsed.quality}: only with --resize-short; the bytes of images are kept without it")
    started = time.monotonic()
    source = _source(parsed)
    _refuse_empty(source, parsed)
    given = {name: getattr(parsed, name) for name in Options.__dataclass_fields__}
    options = Options(**{name: value for name, value in given.items() if value is not None})
    url = parsed.out.rstrip("/") if isinstance(parsed.out, str) else ""
    out = stage_of(url) if url else parsed.out
    if parsed.dry_run:
        _print_plan(source, out, options)
        return 0
    summaries = prepare(source, out, options, _runner(parsed), max_refused=parsed.max_refused / 100, upload=url)
    uploaded = [f"uploaded to {url}; index and reports stay in {out}"] if url else []
    _print_summaries(summaries, [*source.remarks, *uploaded], time.monotonic() - started)
    return 0


def _source(parsed: argparse.Namespace) -> Source:
    kind = SOURCES[parsed.command]
    if parsed.command == "folder":
        _refuse_inside(parsed.source, parsed.out)
        return folder_source(
            parsed.source,
            val_name=parsed.val_name,
            class_order=parsed.class_order,
            class_names=_read_names(parsed.class_names),
            one_class=parsed.one_class,
        )
    return kind.make(parsed.source) if kind.metavar else kind.make()


def _read_names(file: Path | None) -> list[str] | None:
    """The lines of a file of class names; None without a file."""
    if file is None:
        return None
    names = file.read_text(errors="surrogateescape").split("\n")
    return names[:-1] if names[-1] == "" else names


def _refuse_empty(source: Source, parsed: argparse.Namespace) -> None:
    for name, split in source.splits.items():
        if not split.items and not split.refused:
            other = ", ".join(f"{len(there.items):,} for {key}" for key, there in source.splits.items() if key != name)
            raise ValueError(
                f"{parsed.source}: 0 images for the split {name} ({other}); a split needs at least one: fetch the archive again"
            )


def _refuse_inside(source: Path, out: Path | str) -> None:
    """Output among the classes would be a class when the preparation is started again."""
    names = os.listdir(source) if source.is_dir() else []
    if isinstance(out, str):
        return
    words = [name for name in names if split_word(name)]
    roots = [source / name for name in words] if any(split_of(name.lower()) == "train" for name in words) else [source]
    if any(out.resolve().is_relative_to(root.resolve()) for root in roots):
        raise ValueError(f"--out {out}: lies among the classes of --source {source}; give a folder outside of them")


def _runner(parsed: argparse.Namespace) -> Runner:
    if parsed.engine == "ray":
        return partial(run_jobs_on_ray, address=parsed.address)
    if parsed.address is not None:
        raise ValueError(f"--address {parsed.address}: only with --engine ray")
    return partial(run_jobs, workers=parsed.workers)


def _index(parsed: argparse.Namespace) -> int:
    started = time.monotonic()
    if isinstance(parsed.out, str):
        raise ValueError(
            f"--out {parsed.out}: index and manifest of existing shards go into a folder; copy that where you want it"
        )
    reading = Reading(
        splits=parse_assignments(parsed.split),
        image=parsed.image,
        label=parsed.label,
        json_label=parsed.json_label,
        class_names=_read_names(parsed.class_names),
        one_class=parsed.one_class,
        renumber=parsed.renumber,
    )
    found = index_existing(parsed.source, parsed.out, reading, run=_runner(parsed), max_refused=parsed.max_refused / 100)
    shards = [f"{each.name} is {each.shard_names[0]} to {each.shard_names[-1]}" for each in found]
    _print_summaries(found, [*shards, *_left_out(parsed.source, found)], time.monotonic() - started)
    return 0


def _left_out(source: Path | str, found: Sequence[SplitSummary]) -> list[str]:
    """A remark where shards are in no split: those that no pattern takes, or that `_info.json` does not name."""
    taken = {name for each in found for name in each.shard_names}
    if isinstance(source, str):
        names = retried(remote_of(source).listing) or {}
        left = sorted(name for name in names if name.endswith(".tar") and name not in taken)
    else:
        left = sorted(name for path in source.rglob("*.tar") if (name := path.relative_to(source).as_posix()) not in taken)
    return [f"in no split: {len(left):,} shards, such as {left[0]}; --split takes more"] if left else []


def _verify(parsed: argparse.Namespace) -> int:
    defects = 0
    for folder in find_split_folders(parsed.folder):
        for defect in verify_split(folder, None if parsed.full else parsed.decodes):
            defects += 1
            print(defect)
    for folder in unfinished_splits(parsed.folder):
        defects += 1
        print(f"{folder}: its preparation was not finished; start it again")
    print(f"{parsed.folder}: {defects} defects" if defects else f"{parsed.folder}: no defects")
    return 1 if defects else 0


def _renew(parsed: argparse.Namespace) -> int:
    for folder in find_split_folders(parsed.folder):
        done = renew_split(folder)
        print(f"{folder}: {'its index was renewed' if done else 'its index has the present format already'}")
    return 0


def _show(parsed: argparse.Namespace) -> int:
    indices = [ShardIndex.open(folder) for folder in find_split_folders(parsed.folder)]
    for index in indices:
        print(describe(index))
    sheet = parsed.sheet or parsed.folder / "sheet.png"
    write_sheet(indices, parsed.images, sheet)
    print(f"{parsed.images} images of each split: {sheet}")
    return 0


def _print_plan(source: Source, out: Path, options: Options) -> None:
    for name, folder in split_folders(source.splits, out).items():
        jobs = split_jobs(source, name, folder, options)
        samples = sum(len(job.items) for job in jobs)
        classes = len(source.splits[name].class_names)
        print(
            f"{name}: {samples:,} images of {classes} classes would go into {len(jobs)} shards in {folder}; nothing was written"
        )


def _print_summaries(summaries: Sequence[SplitSummary], remarks: Sequence[str], seconds: float) -> None:
    for summary in summaries:
        state = "was finished already" if summary.made == 0 else f"{summary.made} of {len(summary.shard_names)} shards made now"
        print(
            f"{summary.name}: {summary.samples:,} images, {len(summary.shard_names)} shards, {summary.bytes / 1e6:,.1f} MB in "
            f"{summary.folder} ({state}); {len(summary.class_names):,} classes; {len(summary.refused)} refused, "
            f"{summary.noted} notes"
        )
        if empty := summary.empty_classes:
            more = f" and {len(empty) - SHOWN:,} more" if len(empty) > SHOWN else ""
            print(f"  classes without images: {', '.join(empty[:SHOWN])}{more}")
        if summary.ignored:
            print("  passed over: " + ", ".join(f"{count:,} {what}" for what, count in summary.ignored.items()))
        if summary.refused:
            print(f"  refused, all listed in {summary.folder / QUARANTINE}:")
            print("".join(f"    {line}\n" for line in reasons_of(summary.refused)), end="")
    for remark in (*remarks, *_unused_numbers(summaries)):
        print(remark)
    print(f"done in {seconds:.1f} s")


def _unused_numbers(summaries: Sequence[SplitSummary]) -> list[str]:
    """A remark where classes are nothing but numbers and some of these occur in no split: labels from 1 on, or with gaps."""
    names = summaries[0].class_names
    unused = set(names).intersection(*(summary.empty_classes for summary in summaries))
    if not unused or list(names) != [str(number) for number in range(len(names))]:
        return []
    return [
        f"labels: {len(unused):,} of the numbers 0 to {len(names) - 1:,} occur nowhere, such as {min(unused, key=int)};"
        " --renumber numbers those that occur from 0 on"
    ]


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file and class names may be no UTF-8
    sys.exit(main())
