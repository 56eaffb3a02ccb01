"""Files from somewhere else cannot run code, write outside their folder, or take the memory."""

import io
import json
import resource
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from distill.data.index import ShardIndex
from distill.files import file_sha256

ROOT = Path(__file__).parents[2]


def jpeg(side: int = 32) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)).save(content, "JPEG")
    return content.getvalue()


def bomb() -> bytes:
    """A small JPEG whose header claims 65,000 x 65,000 pixels."""
    content = bytearray(jpeg())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (65_000).to_bytes(2, "big") * 2
    return bytes(content)


def member(name: str, content: bytes, kind: bytes = tarfile.REGTYPE, link: str = "", pax: dict | None = None) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    if pax:
        info.pax_headers = pax
    return info.tobuf(tarfile.PAX_FORMAT if pax else tarfile.USTAR_FORMAT) + content + b"\0" * (-len(content) % 512)


def sample(key: str, image: bytes) -> bytes:
    return member(f"{key}.cls", b"0") + member(f"{key}.jpg", image)


def index_shards(folder: Path, *tars: bytes) -> subprocess.CompletedProcess:
    """`prepare.py wds` over shards of these bytes, in 4 GiB of memory."""
    folder.mkdir()
    for number, content in enumerate(tars):
        (folder / f"train-{number:04d}.tar").write_bytes(content + b"\0" * 1024)
    limit = 4 << 30
    return subprocess.run(
        [sys.executable, "shards/prepare.py", "wds", "--source", str(folder), "--out", str(folder / "index"), "--one-class"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )


def everything_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def test_path_tricks_in_a_shard_write_nothing_anywhere_else(tmp_path: Path):
    tricks = b"".join(
        [
            sample("good", jpeg()),
            sample("../../escaped", jpeg()),
            sample("/tmp/escaped_absolute_distill_test", jpeg()),
            member("link.jpg", b"", tarfile.SYMTYPE, "/etc/passwd"),
            member("hard.jpg", b"", tarfile.LNKTYPE, "../../../etc/passwd"),
            member("pipe.jpg", b"", tarfile.FIFOTYPE),
        ]
    )
    before = everything_below(tmp_path)
    index_shards(tmp_path / "shards", tricks)
    new = everything_below(tmp_path) - before
    assert {name.split("/")[0] for name in new} == {"shards"}
    assert not Path("/tmp/escaped_absolute_distill_test.jpg").exists()
    assert not any((tmp_path / "shards").rglob("*escaped*"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (member("a.jpg", b"")[:124] + b"77777777777\0" + member("a.jpg", b"")[136:], "tar header|checksum|truncated"),
        (sample("a", jpeg()) + member("b.jpg", b"x", pax={"size": "-1024"}), "size"),
        (sample("a", jpeg()) + member("b.jpg", b"x", pax={"size": str(1 << 60)}), "truncated"),
        (sample("a", jpeg()) + member("b.jpg", b"x", pax={"size": "many"}), "size"),
        (sample("a", jpeg()) + member("b" * 200 + ".jpg", b"x", pax={"comment": "x" * (2 << 20)}), "extended header"),
    ],
    ids=["octal", "negative", "exabyte", "word", "large header"],
)
def test_absurd_sizes_in_headers_are_refused_by_name(content: bytes, expected: str, tmp_path: Path):
    import re

    done = index_shards(tmp_path / "shards", content)
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert re.search(expected, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "shards" / "index").rglob("manifest.json"))


def test_a_decompression_bomb_is_never_decoded(tmp_path: Path):
    """By its header it wants 12.7 GB; preparation runs in 4."""
    done = index_shards(tmp_path / "shards", sample("good", jpeg()) + sample("bomb", bomb()))
    assert "MemoryError" not in done.stderr
    said = done.stdout + done.stderr
    found = list((tmp_path / "shards" / "index").rglob("quarantine.jsonl"))
    assert "bomb" in said or any("bomb" in path.read_text() for path in found), said


def test_an_index_with_pickled_objects_in_it_is_not_unpickled(digits: Path, tmp_path: Path):
    import shutil

    split, marker = tmp_path / "train", tmp_path / "executed"
    shutil.copytree(digits / "train", split)

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    np.save(split / "index.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    manifest = json.loads((split / "manifest.json").read_text())
    manifest["index_sha256"] = file_sha256(split / "index.npy")
    (split / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"[Pp]ickle|[Oo]bject"):
        ShardIndex.open(split)
    assert not marker.exists()
