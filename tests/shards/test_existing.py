"""Existing shards as other tools write them: what plainly can be read is read, everything else is refused with what to give."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from distill.data.index import ShardIndex
from shards.prepare import main
from tests.shards.preparing import answer, image_bytes

Member = tuple[str, bytes]
Prepare = Callable[..., tuple[int, str]]


@pytest.fixture
def prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    """`prepare.py wds` from hub/ to out/: its exit code and what it says."""

    def run(*more: str) -> tuple[int, str]:
        return answer(["wds", "--source", str(tmp_path / "hub"), "--out", str(tmp_path / "out"), *more], capsys)

    return run


def packed(members: Iterable[Member]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def samples(label: Callable[[int], Member], image: str = "jpg", kind: str = "JPEG", count: int = 6) -> list[Member]:
    """`label` gives a number's field and content."""
    found = []
    for number in range(count):
        field, content = label(number)
        found += [(f"{number:03d}.{image}", image_bytes(number, (8, 8), kind)), (f"{number:03d}.{field}", content)]
    return found


def numbered(number: int) -> Member:
    return "cls", str(number % 3).encode()


def write(root: Path, *names: str, members: Iterable[Member] | None = None) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(packed(samples(numbered) if members is None else members))


def labels(folder: Path) -> list[int]:
    return [int(label) for label in ShardIndex.open(folder).labels]


@pytest.mark.parametrize(
    ("field", "content", "options"),
    [
        ("txt", "{}", []),
        ("label", "{}\n", []),
        ("index", "{}", []),
        ("cls.txt", "{}", []),
        ("cls", "000{}", []),
        ("json", '{{"label": "{}"}}', []),
        ("json", '{{"label": {}.0}}', []),
        ("json", '{{"label": [{}]}}', []),
        ("cls", "{:c}" + 7 * "\0", []),  # int64, as numpy's tobytes gives it
        ("json", '{{"meta": {{"label": {}}}}}', ["--json-label", "meta.label"]),
        ("who.txt", "{}", ["--label", "who.txt"]),
    ],
)
def test_labels_are_read_from_any_usual_field_and_from_the_one_that_is_named(
    field: str, content: str, options: list[str], tmp_path: Path, prepare: Prepare, capsys: pytest.CaptureFixture[str]
):
    """All of these used to be refused one by one, and the empty result to be `done`."""
    write(tmp_path / "hub", "train-0.tar", members=samples(lambda n: (field, content.format(n % 3).encode())))
    code, said = prepare(*options)
    assert code == 0, said
    assert "3 classes; 0 refused" in said
    assert labels(tmp_path / "out") == [0, 1, 2, 0, 1, 2]
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    ("image", "kind"),
    [("img", "JPEG"), ("image.jpg", "JPEG"), ("JPEG", "JPEG"), ("bmp", "BMP"), ("tif", "TIFF"), ("gif", "GIF")],
)
def test_images_are_found_by_any_usual_extension(image: str, kind: str, tmp_path: Path, prepare: Prepare):
    write(tmp_path / "hub", "train-0.tar", members=samples(numbered, image, kind))
    code, said = prepare()
    assert (code, labels(tmp_path / "out")) == (0, [0, 1, 2, 0, 1, 2]), said


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (lambda n: ("cls", b"cat"), "label 'cat' is no class number; where it is a name, give the names with --class-names"),
        (lambda n: ("cls", n.to_bytes(4, "little")), r"label '\x00"),
        (lambda n: ("cls", (2**30 + n).to_bytes(8, "little")), "label 1073741824: there are 1000000 classes at most"),
        (lambda n: ("cls", str(n % 3 - 1).encode()), "label '-1' is no class number"),
        (lambda n: ("json", b'{"meta": {"label": 1}}'), "no label in its .json at label"),
        (lambda n: ("json", b"{"), "no label in its .json"),
        (lambda n: ("caption", b"a cat"), "no label: the sample has caption, jpg; give its field with --label or --json-label"),
    ],
)
def test_labels_that_are_no_class_number_end_the_preparation_with_reason_and_remedy(
    label: Callable[[int], Member], reason: str, tmp_path: Path, prepare: Prepare
):
    write(tmp_path / "hub", "train-0.tar", members=samples(label))
    code, said = prepare()
    assert code == 1
    assert reason in said
    assert f"(such as 000 in {tmp_path}/hub/train-0.tar)" in said
    assert (tmp_path / "out/quarantine.jsonl").read_text()
    assert not (tmp_path / "out/manifest.json").exists()


def test_booleans_are_the_classes_0_and_1(tmp_path: Path, prepare: Prepare):
    write(
        tmp_path / "hub",
        "train-0.tar",
        members=samples(lambda n: ("json", json.dumps({"label": bool(n % 2)}).encode())),
    )
    code, said = prepare()
    assert (code, labels(tmp_path / "out")) == (0, [0, 1, 0, 1, 0, 1]), said
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_one_class_is_refused_unless_it_is_asked_for(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "hub", "train-0.tar", "val-0.tar", members=samples(lambda n: ("cls", b"0")))
    code, said = prepare()
    assert code == 2
    assert "one class, all labels are 0; give their field with --label or --json-label" in said
    assert not list((tmp_path / "out").rglob("manifest.json"))
    code, said = prepare("--one-class")
    assert (code, labels(tmp_path / "out/val")) == (0, [0] * 6), said


def test_shards_that_no_split_takes_are_counted(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "hub", "a-0.tar", "a-1.tar", "b-0.tar", "c/d-0.tar", "c/d-1.tar")
    code, said = prepare("--split", "train=a-*.tar", "--split", "val=b-*.tar")
    assert code == 0
    assert "in no split: 2 shards, such as c/d-0.tar; --split takes more" in said
    (tmp_path / "hub/_info.json").write_text(json.dumps({"splits": {"train": {"filenames": ["a-0.tar"]}}}))
    assert "in no split: 4 shards, such as a-1.tar" in prepare("--out", str(tmp_path / "other"))[1]


def test_names_become_numbers_by_the_file_of_class_names(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "hub", "train-0.tar", members=samples(lambda n: ("cls", ["eel", "cat", "dog"][n % 3].encode())))
    (tmp_path / "names").write_text("cat\ndog\neel\n")
    assert prepare()[0] == 1
    code, said = prepare("--class-names", str(tmp_path / "names"))  # into the same folder: nothing was kept there
    assert (code, labels(tmp_path / "out")) == (0, [2, 0, 1, 2, 0, 1]), said
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_one_of_several_images_is_taken_by_its_field(tmp_path: Path, prepare: Prepare):
    pairs = [
        (f"{n:03d}.{field}", data)
        for n in range(6)
        for field, data in (
            ("left.jpg", image_bytes(n, (8, 8))),
            ("right.jpg", image_bytes(9, (8, 9))),
            ("cls", str(n % 3).encode()),
        )
    ]
    write(tmp_path / "hub", "train-0.tar", members=pairs)
    code, said = prepare()
    assert (code, "2 images: the sample has cls, left.jpg, right.jpg; name one with --image" in said) == (1, True)
    assert prepare("--image", "right.jpg")[0] == 0
    assert ShardIndex.open(tmp_path / "out").sizes(0).tolist() == [8, 9]


def test_keys_that_end_at_a_dot_are_told(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "hub", "train-0.tar", members=[(f"photo.{name}", data) for name, data in samples(numbered)])
    code, said = prepare()
    assert (code, "6 images: the sample has" in said, "where a key has a dot" in said) == (1, True, True)
    dotted = [(f"{n}.5.{field}", data) for n in range(6) for field, data in (("jpg", image_bytes(n, (8, 8))), numbered(n))]
    write(tmp_path / "hub", "train-0.tar", members=dotted)
    code, said = prepare()
    assert (code, "no label: the sample has 5.cls, 5.jpg; give its field" in said, "where a key has a dot" in said) == (
        1,
        True,
        True,
    )
    assert not (tmp_path / "out/manifest.json").exists()


def test_hidden_files_are_counted_and_a_mask_is_no_image(tmp_path: Path, prepare: Prepare):
    masks = [(f"{n:03d}.seg.png", image_bytes(7, (4, 4), "PNG")) for n in range(6)]
    junk = [("._000.jpg", b"\0\5"), (".DS_Store", b"x"), ("__MACOSX/0.jpg", b"\0")]
    write(tmp_path / "hub", "train-0.tar", members=[*junk, *masks, *samples(numbered)])
    code, said = prepare()
    assert code == 0
    assert "0 refused, 6 notes" in said
    assert "passed over: 3 hidden files" in said
    assert ShardIndex.open(tmp_path / "out").sizes(0).tolist() == [8, 8]


@pytest.mark.parametrize(
    ("names", "groups"), [(("tr-0", "te-0"), "te-#.tar (1), tr-#.tar (1)"), (("myset-0", "val-0"), "myset")]
)
def test_names_of_which_not_all_say_a_split_are_refused_with_their_groups(
    names: tuple[str, str], groups: str, tmp_path: Path, prepare: Prepare
):
    """The validation shards used to land in train."""
    write(tmp_path / "hub", *(f"{name}.tar" for name in names))
    code, said = prepare()
    assert (code, len(said.splitlines()), groups in said) == (2, 1, True)
    assert "assign them with --split train=PATTERN --split val=PATTERN" in said
    code, said = prepare("--split", f"train={names[0]}*", "--split", f"val={names[1]}*")
    assert (code, f"train is {names[0]}.tar to {names[0]}.tar" in said) == (0, True)
    assert ShardIndex.open(tmp_path / "out/val").shards[0].name == f"{names[1]}.tar"


def test_shards_are_assigned_by_pattern_each_once(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "hub", *(f"set-{number:04d}.tar" for number in range(3)))
    code, said = prepare("--split", "train=set-{0000..0001}.tar")
    assert code == 0, said
    assert [shard.name for shard in ShardIndex.open(tmp_path / "out").shards] == ["set-0000.tar", "set-0001.tar"]
    for texts, expected in (
        (["train=*.tar", "val=set-0002.tar"], "set-0002.tar would be in train and val"),
        (["train=x*"], "--split train=x*: none of the 3 shards in"),
        (["test=*"], "--split test=*: give train=PATTERN, val=PATTERN or both"),
        (["train"], "--split train: give train=PATTERN"),
    ):
        code, said = prepare(*(word for text in texts for word in ("--split", text)))
        assert (code, expected in said) == (2, True), said


def test_training_and_testing_are_splits(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "hub", "training-0.tar", "testing-0.tar")
    assert prepare()[0] == 0
    assert [len(labels(tmp_path / "out" / split)) for split in ("train", "val")] == [6, 6]


@pytest.mark.parametrize(
    "filenames", ["s-{0000..0001}.tar", ["s-{0000..0001}.tar"], ["/data/elsewhere/s-0000.tar", "/data/elsewhere/s-0001.tar"]]
)
def test_an_info_file_may_have_brace_strings_and_absolute_names(filenames: object, tmp_path: Path, prepare: Prepare):
    write(tmp_path / "hub", "s-0000.tar", "s-0001.tar", "s-0002.tar")
    info = {"splits": {"train": {"filenames": filenames}, "validation": {"filenames": "s-0002.tar"}}}
    (tmp_path / "hub/_info.json").write_text(json.dumps(info))
    code, said = prepare()
    assert code == 0, said
    assert [len(labels(tmp_path / "out" / split)) for split in ("train", "val")] == [12, 6]
    (tmp_path / "hub/s-0001.tar").unlink()
    code, said = prepare()
    assert (code, "s-0001.tar, which is not there; fetch that shard, or mend the file" in said) == (2, True)


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz", "train-0.tar"])
def test_compressed_shards_are_refused_by_their_first_bytes_with_the_command_that_helps(
    name: str, tmp_path: Path, prepare: Prepare
):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / name).write_bytes(gzip.compress(packed(samples(numbered))))
    code, said = prepare()
    assert (code, len(said.splitlines())) == (2, 1)
    assert f"{name}: compressed" in said
    assert f"`gunzip < {name} > {'unpacked/' if name.endswith('r') else ''}train-0.tar`" in said
    assert "fetch" not in said


def test_a_tar_without_end_blocks_is_read_and_a_cut_one_is_not(tmp_path: Path, prepare: Prepare):
    write(tmp_path / "hub", "train-0.tar")
    path = tmp_path / "hub/train-0.tar"
    whole = path.read_bytes()
    bare = whole.rstrip(b"\0")
    bare += bytes(-len(bare) % 512)
    for content, expected in ((b"", "train-0.tar: an empty file"), (bare[:-600], "truncated")):
        path.write_bytes(content)
        code, said = prepare()
        assert (code, expected in said) == (1, True), said
    path.write_bytes(bare)
    assert prepare()[0] == 0  # into the folder of the failed ones
    assert labels(tmp_path / "out") == [0, 1, 2, 0, 1, 2]
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_labels_from_one_or_with_gaps_say_so_and_can_be_renumbered(tmp_path: Path, prepare: Prepare):
    members = samples(lambda n: ("cls", str([5, 900, 1][n % 3]).encode()))
    write(tmp_path / "hub", "train-0.tar", members=members)
    write(tmp_path / "hub", "val-0.tar", members=members[:4])
    code, said = prepare()
    assert code == 0
    assert "901 classes" in said
    assert "labels: 898 of the numbers 0 to 900 occur nowhere, such as 0; --renumber numbers those that occur" in said
    out = tmp_path / "renumbered"
    assert main(["wds", "--source", str(tmp_path / "hub"), "--out", str(out), "--renumber"]) == 0
    for split, expected in (("train", [1, 2, 0, 1, 2, 0]), ("val", [1, 2])):
        assert ShardIndex.open(out / split).class_names == ("1", "5", "900")
        assert labels(out / split) == expected
    assert main(["verify", str(out)]) == 0
    (tmp_path / "names").write_text("a\nb\n")
    assert prepare("--renumber", "--class-names", str(tmp_path / "names"))[0] == 2


def test_both_splits_have_the_classes_of_all_labels(tmp_path: Path, prepare: Prepare):
    """A validation split with another largest label used to get another number of classes, which training then refused."""
    write(tmp_path / "hub", "train-0.tar")
    write(tmp_path / "hub", "val-0.tar", members=samples(lambda n: ("cls", str(n % 5).encode())))
    code, said = prepare()
    assert code == 0
    assert "classes without images: 3, 4" in said
    assert [ShardIndex.open(tmp_path / "out" / split).num_classes for split in ("train", "val")] == [5, 5]
