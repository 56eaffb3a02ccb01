"""Folders as people have them: every spelling of a split is one, what is no class is none, and every file is accounted for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from distill.data.index import ShardIndex
from shards.prepare import main
from tests.shards.preparing import answer, image_bytes

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"

Prepare = Callable[..., tuple[int, str]]


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """`prepare.py folder` (or `kind`) from images/ to out/: its exit code and what it says."""

    def run(*more: str, kind: str = "folder") -> tuple[int, str]:
        return answer([kind, "--source", str(tmp_path / "images"), "--out", str(tmp_path / "out"), *more], capsys)

    return run


def write(root: Path, *places: str, images: int = 2) -> None:
    """So many images in each folder."""
    for place in places:
        (root / place).mkdir(parents=True, exist_ok=True)
        for number in range(images):
            (root / place / f"{number}.jpg").write_bytes(image_bytes(number, (8, 8)))


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("Train", "Val"),
        ("TRAIN", "validation"),
        ("training", "Test"),
        ("train2017", "val2017"),
        ("train", "dev"),
        ("train", "eval"),
    ],
)
def test_any_spelling_of_the_split_words_is_a_split(train: str, val: str, tmp_path: Path, prepare: Prepare):
    """`Train` and `Val` used to become two classes."""
    write(tmp_path / "images", *(f"{split}/{name}" for split in (train, val) for name in ("cat", "dog")))
    code, said = prepare()
    assert code == 0, said
    assert "2 classes; 0 refused" in said
    assert f"val is {val}" in said
    for split in ("train", "val"):
        index = ShardIndex.open(tmp_path / "out" / split)
        assert (index.class_names, index.num_samples) == (("cat", "dog"), 4)


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (("mine/train/a", "mine/train/b", "mine/val/a"), "its folder mine holds train and val; give --source {root}/mine"),
        (("a/train", "a/val", "b/train", "b/val"), "2 of its folders, such as a, hold train and val"),
        (
            ("train/a", "train/b", "val/a", "test/a"),
            "has test and val, any of which could become val; choose one with --val-name",
        ),
        (("train/a", "Training/a", "val/a"), "has Training and train, any of which could become train"),
        (("validation/a", "validation/b"), "has validation, but no train"),
        (
            ("images/a", "images/b"),
            "one class, images; give --source {root}/images if the classes are in there, or --one-class",
        ),
        (("train/a", "train/b", "val/c"), "1 classes that the training split lacks: c"),
        (("train/a", "train/b", "val"), "seen: 2 images beside the class folders; ImageNet's flat val/"),
    ],
)
def test_a_folder_that_can_be_understood_in_several_ways_is_refused_with_what_to_give(
    places: tuple[str, ...], expected: str, tmp_path: Path, prepare: Prepare
):
    write(tmp_path / "images", *places)
    code, said = prepare()
    assert code == 2
    assert len(said.splitlines()) == 1
    assert expected.format(root=tmp_path / "images") in said
    assert not (tmp_path / "out").exists()


def test_options_decide_what_the_folder_leaves_open(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "images", "train/a", "train/b", "val/a", "test/a", "test/b")
    code, said = prepare("--val-name", "test")
    assert (code, "val is test" in said, "not read: val" in said) == (0, True, True)
    assert ShardIndex.open(tmp_path / "out/val").num_samples == 4
    assert prepare("--val-name", "dev")[0] == 2
    one = tmp_path / "one"
    write(one, "train/a")
    assert main(["folder", "--source", str(one), "--out", str(tmp_path / "single"), "--one-class"]) == 0
    cars = tmp_path / "cars"  # classes with names of splits
    write(cars, "train", "plane")
    (tmp_path / "names").write_text("plane\ntrain\nship\n")
    arguments = ["folder", "--source", str(cars), "--out", str(tmp_path / "named"), "--class-names", str(tmp_path / "names")]
    assert main(arguments) == 0
    index = ShardIndex.open(tmp_path / "named")
    assert index.class_names == ("plane", "train", "ship")
    assert np.bincount(index.labels, minlength=3).tolist() == [2, 2, 0]


def test_what_programs_leave_is_no_class_and_everything_is_counted(tmp_path: Path, prepare: Prepare):
    root = tmp_path / "images"
    write(root, "cat", "dog", "__MACOSX/cat", "cat/@eaDir", ".cache", "cat/more")
    for name in ("lost+found", "logs", "owl"):
        (root / name).mkdir()
    (root / "beside.jpg").write_bytes(image_bytes(1))
    (root / "labels.txt").touch()
    (root / "cat/Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (root / "cat/._0.jpg").write_bytes(b"\0\5\x16\7")
    for name in ("a.jfif", "b.jpe", "noextension", "c.jpg~"):
        (root / "dog" / name).write_bytes(image_bytes(9))
    code, said = prepare()
    assert code == 0
    assert "train: 10 images" in said
    assert "3 classes; 0 refused" in said
    assert "classes without images: owl" in said
    told = "5 folders of other programs, 1 images beside the class folders, 1 files beside the class folders, 1 hidden files"
    assert sorted(said.split("passed over: ")[1].splitlines()[0].split(", ")) == sorted(
        [*told.split(", "), "1 files that are no images"]
    )
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["source_files_ignored"] == sum(manifest["ignored"].values()) == 9


def test_links_to_nothing_are_refused_by_name(tmp_path: Path, prepare: Prepare):
    """A link to a class that is gone used to vanish, one to an image to end the preparation."""
    write(tmp_path / "images", "cat", "dog")
    (tmp_path / "images/owl").symlink_to(tmp_path / "nowhere")
    (tmp_path / "images/cat/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    code, said = prepare("--max-refused", "40")
    assert code == 0
    assert "2 refused" in said
    assert f"2 x a link to nothing (such as {tmp_path}/images/owl)" in said
    entries = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").open()]
    assert {Path(entry["source"]).name for entry in entries} == {"owl", "gone.jpg"}


def test_a_split_of_which_nothing_is_left_is_an_error_with_the_commonest_reasons(tmp_path: Path, prepare: Prepare):
    """It used to be `done`, and exit code 0."""
    root = tmp_path / "images"
    write(root, "train/a", "train/b", images=3)
    for path in root.rglob("*.jpg"):
        path.write_bytes(POINTER)
    (root / "train/b/2.jpg").write_bytes(b"")
    code, said = prepare()
    first, *reasons = said.splitlines()
    assert (code, "train: 6 of 6 images are refused, nothing is left; they are listed in" in first) == (1, True)
    assert [reason.split(" (")[0] for reason in reasons] == [
        "  5 x not an image: a pointer of Git LFS, whose file `git lfs pull` fetches",
        "  1 x zero bytes",
    ]
    assert not list((tmp_path / "out").rglob("manifest.json"))
    for number, path in enumerate(sorted(root.rglob("*.jpg"))):  # mended, the same command makes it
        path.write_bytes(image_bytes(number, (8, 8)))
    assert prepare()[0] == 0


def test_more_refused_images_than_the_share_that_is_allowed_fail_the_preparation(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "images", "a", "b", images=10)
    (tmp_path / "images/a/0.jpg").write_bytes(POINTER)
    code, said = prepare()
    assert code == 1
    assert "1 of 20 images are refused, more than --max-refused 1 (per cent) allows" in said
    assert not list((tmp_path / "out").rglob("manifest.json"))
    code, said = prepare("--max-refused", "5")
    assert code == 0
    assert "1 x not an image" in said
    assert prepare("--max-refused", "101") == (2, "error: --max-refused: 101 is no share from 0 to 100 per cent; see --help")


def test_the_order_of_class_numbers_is_chosen_and_never_silent(tmp_path: Path, prepare: Prepare):
    """timm numbers 0, 1, 2, ..., 10 where plain order has 0, 1, 10, 2: a student of the one scores nothing on the other."""
    names = [str(number) for number in range(11)]
    write(tmp_path / "images", *names, images=1)
    code, said = prepare()
    assert code == 0
    assert "2 is '10'; timm orders them naturally and without case: 2 is '2'; for weights trained so give --class-order" in said
    assert ShardIndex.open(tmp_path / "out").class_names == tuple(sorted(names))
    code, said = prepare("--class-order", "natural")
    assert (code, "other settings" in said, "class_order None there, natural now" in said) == (2, True, True)
    for order, expected in (("natural", names), ("plain", sorted(names))):
        out = tmp_path / order
        arguments = ["folder", "--source", str(tmp_path / "images"), "--out", str(out), "--class-order", order]
        assert main(arguments) == 0
        assert ShardIndex.open(out).class_names == tuple(expected)


def test_natural_order_is_that_of_timms_reader(tmp_path: Path):
    from timm.data.readers.reader_image_folder import find_images_and_targets

    names = ["Zebra", "ant", "a10", "A2", "a", "10", "9", "2b"]
    write(tmp_path / "images", *names, images=1)
    _, theirs = find_images_and_targets(str(tmp_path / "images"))
    arguments = ["folder", "--source", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--class-order", "natural"]
    assert main(arguments) == 0
    assert {name: number for number, name in enumerate(ShardIndex.open(tmp_path / "out").class_names)} == theirs


def test_class_names_must_have_every_folder_once(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "images", "a", "b")
    names = tmp_path / "names"
    for content, expected in (("a\n", "1 classes that --class-names lacks: b"), ("a\nb\na\n", "a is there twice")):
        names.write_text(content)
        code, said = prepare("--class-names", str(names))
        assert (code, expected in said) == (2, True), said


def test_kaggles_imagenet_is_read_as_it_is_unpacked(tmp_path: Path, prepare: Prepare):
    root = tmp_path / "images/ILSVRC/Data/CLS-LOC"
    write(root, "train/n02", "train/n01")
    (root / "val").mkdir()
    for number in range(1, 4):
        (root / f"val/ILSVRC2012_val_{number:08d}.JPEG").write_bytes(image_bytes(10 + number, (8, 8)))
    code, said = prepare(kind="kaggle")
    assert (code, "no LOC_val_solution.csv in it" in said) == (2, True)
    rows = ["ImageId,PredictionString", *(f"ILSVRC2012_val_{n:08d},{wnid} 1 2 3 4 " for n, wnid in ((1, "n02"), (2, "n01")))]
    (tmp_path / "images/LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    code, said = prepare("--max-refused", "40", kind="kaggle")
    assert code == 0, said
    assert "1 x not in LOC_val_solution.csv" in said
    val = ShardIndex.open(tmp_path / "out/val")
    assert val.class_names == ("n01", "n02")
    assert {val.key(row): int(val.labels[row]) for row in range(2)} == {
        "n02_ILSVRC2012_val_00000001": 1,
        "n01_ILSVRC2012_val_00000002": 0,
    }
