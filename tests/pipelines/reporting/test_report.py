"""`pipelines/report.py` and `pipelines/compare.py` on real runs, whole and with parts missing; the page in a real browser."""

import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from distill.data.faults import Quarantine
from distill.data.index import ShardIndex
from distill.data.order import TrainOrder
from distill.data.stream import Position
from pipelines.compare import main as compare
from pipelines.evaluate import main as evaluate
from pipelines.report import main as report
from pipelines.reporting.classes import class_facts
from pipelines.reporting.curves import marks
from pipelines.reporting.dump import Dump
from pipelines.reporting.first_batch import FirstBatch
from pipelines.reporting.runs import Comparison, RunRecord
from tests.processes import finished
from tests.runs import arguments

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PANELS = [
    *("Verdict", "Curves", "Time and memory", "Classes", "Calibration", "Flips", "Map of embeddings", "Logits of the classes"),
    *("Similarity by stage", "Regions", "Heat maps", "Augmented batch", "Doubtful labels and bad samples", "Reproduce"),
]
ALONE = ["--teacher", "none", "--loss.sdd", "null", "--loss.msdcrd", "null", "--train.epochs", "1"]


@pytest.fixture(scope="module")
def runs(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `teacher`, `baseline` and `distilled`, the last one stopped and resumed, and their dumps."""
    folder = tmp_path_factory.mktemp("runs")
    log = folder / "log"
    finished([*arguments(digits, folder / "teacher"), *ALONE, "--student", "cifar_resnet14"], log)
    finished([*arguments(digits, folder / "baseline"), *ALONE], log)
    weights = ["--teacher-weights", str(folder / "teacher" / "student"), "--teacher.evaluate", "true"]
    distilled = [*arguments(digits, folder / "distilled"), *weights, "--report.gradient_shares", "true"]
    finished([*distilled, "--train.max_steps", "4", "--train.checkpoint_every", "4"], log)
    (folder / "distilled" / "summary.json").unlink()
    finished([*distilled, "--train.max_steps", "8", "--train.checkpoint_every", "4", "--resume"], log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name, model in (("teacher", "cifar_resnet14"), ("baseline", "cifar_resnet8"), ("distilled", "cifar_resnet8")):
            of = ["--model", model, "--weights", str(folder / name / "student"), "--val", str(digits / "val")]
            assert evaluate([*of, "--dump", str(folder / name / "student.npz")]) == 0
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    return folder


@pytest.fixture(scope="module")
def page(runs: Path) -> Path:
    """The report of the three runs."""
    out = runs / "report.html"
    assert report([*(str(runs / name) for name in ("teacher", "baseline", "distilled")), "--out", str(out)]) == 0
    return out


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    """The runs, to take parts away from; the teacher's dump lies beside the distilled student's."""
    shutil.copytree(runs, tmp_path / "runs", ignore=shutil.ignore_patterns("checkpoints", "trackers", "report.*"))
    shutil.copy(runs / "teacher" / "student.npz", tmp_path / "runs" / "distilled" / "teacher.npz")
    return tmp_path / "runs"


class Sections(HTMLParser):
    """The sections of a page by title: how many pictures and drawings, how many words; and every address in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: dict[str, dict[str, int]] = {}
        self.addresses: list[str] = []
        self.alts: list[str | None] = []
        self._title, self._in_title = "", False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.addresses += [str(given[key]) for key in ("src", "href", "xlink:href") if key in given]
        self._in_title = tag == "h2"
        if self._title and tag in ("svg", "img"):
            self.found[self._title]["pictures"] += 1
            self.alts.append(given.get("alt") or given.get("aria-label"))

    def handle_data(self, data: str) -> None:
        if self._in_title:
            self._title, self._in_title = data, False
            self.found[data] = {"pictures": 0, "words": 0}
        elif self._title:
            self.found[self._title]["words"] += len(data.split())


def test_every_panel_has_content_and_nothing_comes_from_elsewhere(page: Path):
    sections = Sections(page.read_text())
    assert list(sections.found) == PANELS
    for title, held in sections.found.items():
        assert held["words"] > 5, title
        assert held["pictures"] or title == "Reproduce" or "Doubtful" in title, title
    assert all(re.match(r"data:|#", address) for address in sections.addresses)
    assert all(sections.alts)
    assert "<script" not in page.read_text()
    assert page.stat().st_size < 10 * 2**20
    assert "default-src 'none'" in page.read_text()


def test_the_summary_in_words_has_the_runs_own_numbers(page: Path, runs: Path):
    text = page.with_suffix(".md").read_text()
    top1 = {
        name: json.loads((runs / name / "summary.json").read_text())["top1"] for name in ("baseline", "distilled", "teacher")
    }
    assert f"top-1 {top1['distilled']:.2f} %" in text
    assert f"student alone {top1['distilled'] - top1['baseline']:+.2f} points" in text
    assert f"teacher {top1['distilled'] - top1['teacher']:+.2f} points" in text
    assert "published not given" in text
    dumps = {name: Dump.load(runs / name / "student.npz") for name in ("baseline", "distilled")}
    now, alone = (dumps[name].predicted == dumps[name]["labels"] for name in ("distilled", "baseline"))
    assert f"is right about {(now & ~alone).sum()} images" in text
    assert f"wrong about {(~now & alone).sum()} that" in text


def test_the_terminal_says_the_same(page: Path, runs: Path, capsys: pytest.CaptureFixture):
    assert compare([str(runs / name) for name in ("teacher", "baseline", "distilled")]) == 0
    said = capsys.readouterr().out.splitlines()
    drawn = page.with_suffix(".md").read_text()
    assert len(said) > 15
    assert [line for line in said if line and line not in drawn] == []


def test_a_resumed_run_is_marked_at_its_step(page: Path, runs: Path):
    assert marks(RunRecord.read(runs / "distilled")) == {"resumed": [4]}
    assert "resumed at step 4" in page.with_suffix(".md").read_text()


def said_by(folders: list[Path], out: Path, *more: str) -> str:
    assert report([*map(str, folders), "--out", str(out), *more]) == 0
    sections = Sections(out.read_text()).found
    assert [title for title in sections if title != "What this report lacks"] == PANELS
    return out.with_suffix(".md").read_text()


def test_without_a_baseline_the_difference_is_not_run(copied: Path, tmp_path: Path):
    said = said_by([copied / "distilled"], tmp_path / "x.html", "--published", "50")
    assert "student alone not run" in said
    assert "Not shown: what distilled gained and lost by class; no run of the student alone was given" in said
    assert "Not shown: distilled's images right now and wrong alone" in said
    top1 = json.loads((copied / "distilled" / "summary.json").read_text())["top1"]
    assert f"published {top1 - 50:+.2f} points" in said
    assert "class='delta none'" in (tmp_path / "x.html").read_text()


def test_without_dumps_the_report_names_the_commands_that_write_them(copied: Path, tmp_path: Path):
    for file in copied.rglob("*.npz"):
        file.unlink()
    shutil.rmtree(copied / "teacher")
    manifest = copied / "distilled" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("/teacher/student", "/gone/student"))
    said = said_by([copied / "baseline", copied / "distilled"], tmp_path / "x.html")
    for file in (
        copied / "distilled" / "student.npz",
        copied / "distilled" / "teacher.npz",
        copied / "baseline" / "student.npz",
    ):
        assert f"{file} is missing; `python pipelines/evaluate.py --model cifar_resnet" in said
    assert "student alone" in said
    assert said.count("Not shown") >= 8


def test_a_student_alone_has_a_report_of_its_own(copied: Path, tmp_path: Path):
    said = said_by([copied / "baseline"], tmp_path / "x.html")
    assert "no teacher -> cifar_resnet8" in said
    assert "teacher no teacher" in said
    assert "Not shown: it needs the dumps of a teacher and a student" in said


def test_a_run_that_stopped_early_says_where(copied: Path, tmp_path: Path):
    folder = copied / "distilled"
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    said = said_by([copied / "baseline", folder], tmp_path / "x.html")
    assert "stopped at step 3 of 12" in said
    assert "no evaluation yet" in said
    (folder / "metrics.jsonl").unlink()
    assert "stopped before its first line" in said_by([folder], tmp_path / "y.html")


def test_a_class_without_an_image_is_named_and_has_no_number(copied: Path):
    for name in ("baseline", "distilled"):
        path = copied / name / "student.npz"
        dump = Dump.load(path)
        keep = dump["labels"] != 4
        rows = {key: values[keep] if len(values) == len(keep) else values for key, values in dump.arrays.items()}
        logits, labels = rows["logits"], rows["labels"]  # the sample of so small a split is all of it
        rows["class_logit_sums"] = np.stack([logits[labels == k].sum(0) for k in range(10)])
        rows["logit_products"] = logits.T @ logits
        np.savez(path, facts=np.array(json.dumps(dump.facts)), **rows)
    comparison = Comparison.read([copied / "baseline", copied / "distilled"])
    said = class_facts(comparison, comparison.distilled[0])
    assert said[0] == "1 of 10 classes have no image in this split and no number: 4"
    assert report([str(copied / "baseline"), str(copied / "distilled"), "--out", str(copied / "x.html")]) == 0


def test_moved_shards_are_found_by_an_option_and_missed_in_words(copied: Path, digits: Path, tmp_path: Path):
    for name in ("distilled/student", "distilled/teacher"):
        path = copied / f"{name}.npz"
        dump = Dump.load(path)
        np.savez(path, facts=np.array(json.dumps({**dump.facts, "split": "/nowhere"})), **dump.arrays)
    manifest = copied / "distilled" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(digits), "/nowhere"))
    said = said_by([copied / "distilled"], tmp_path / "x.html")
    assert "no pictures, for the validation shards cannot be read" in said
    assert "class=nothing" in (tmp_path / "x.html").read_text()  # a place without a picture, not a broken one
    assert "no pictures" not in said_by([copied / "distilled"], tmp_path / "y.html", "--val", str(digits / "val"))
    other = said_by([copied / "distilled"], tmp_path / "z.html", "--val", str(digits / "train"))
    assert "no pictures" in other


def test_the_batch_is_the_runs_first_one_with_its_labels(page: Path, runs: Path, digits: Path):
    seen = FirstBatch.read(runs / "distilled")
    index = ShardIndex.open(digits / "train")
    recipe = json.loads((runs / "distilled" / "manifest.json").read_text())["recipe"]
    order = TrainOrder(index.num_samples, recipe["train"]["global_batch_size"], recipe["seed"], 0)
    assert seen.labels == [index.class_names[k] for k in index.labels[order.samples(0, 0)]]
    assert f"distilled: {len(seen.images)} images of the first batch" in page.with_suffix(".md").read_text()


def test_bad_samples_are_shown_as_far_as_they_decode(copied: Path, digits: Path, tmp_path: Path):
    shards, run = shutil.copytree(digits / "train", tmp_path / "train"), copied / "distilled"
    index = ShardIndex.open(shards)
    for sample, keep in ((3, 0.7), (5, 0.0)):
        offset, shard, size, *_ = index.records[sample].item()
        with index.shard_path(shard).open("r+b") as file:
            file.seek(offset + int(keep * size))
            file.write(bytes(size - int(keep * size)))
        for rank in (0, 1):  # both processes met it
            found = Quarantine(index, 1.0, rank, run / f"faults-rank{rank}.jsonl")
            found.add(sample, "truncated", Position(0, 0))
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(digits / "train"), str(shards)))
    said = said_by([run], tmp_path / "x.html")
    assert "distilled: 2 samples turned out bad while it ran" in said
    shown = (tmp_path / "x.html").read_text().split("<h2>Doubtful labels and bad samples</h2>")[1].split("<h2>")[0]
    assert shown.index(f"{index.key(3)}: truncated") < shown.index(f"{index.key(5)}: truncated")
    assert shown.count("class=nothing") == 1


def test_runs_of_one_folder_name_are_told_apart_by_their_paths(copied: Path):
    second = shutil.copytree(copied / "distilled", copied / "other" / "distilled")
    folders = [copied / "baseline", copied / "distilled", second, second]
    names = [run.name for run in Comparison.read(folders).runs]
    assert names == [f"{copied.name}/baseline", f"{copied.name}/distilled", "other/distilled"]


def test_seeds_of_one_experiment_are_one_bar_with_a_spread(copied: Path, tmp_path: Path):
    second = shutil.copytree(copied / "distilled", copied / "seed1")
    for name, change in (("manifest.json", {}), ("summary.json", {"top1": 99.0})):
        found = json.loads((second / name).read_text()) | change
        if "recipe" in found:
            found["recipe"] |= {"seed": 1, "out": str(second)}
        (second / name).write_text(json.dumps(found))
    said = said_by([copied / "baseline", copied / "distilled", second], tmp_path / "x.html")
    first = json.loads((copied / "distilled" / "summary.json").read_text())["top1"]
    assert f"distilled at 2 seeds: mean {(first + 99) / 2:.2f} %, {first:.2f} to 99.00" in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere"], "error: nowhere: no manifest.json"),
        (["nowhere", "--out", "x.pdf"], "error: --out: x.pdf is no page"),
        (["nowhere", "--out", "none/x.html"], "none is no folder; make it first"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture):
    assert report(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1


@pytest.fixture
def browser(tmp_path: Path) -> list[str]:
    """The command of a headless Chromium with a profile of its own."""
    if CHROMIUM is None:
        pytest.skip("Debian's chromium is not installed (apt-get install chromium)")
    options = ["--headless=new", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    options += ["--disable-sync", "--no-first-run", "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}"]
    return [CHROMIUM, *options, *(["--no-sandbox"] if os.getuid() == 0 else [])]


def complaints(browser: list[str], page: Path, width: int, shot: Path) -> list[str]:
    """What the browser's console says of the page, whose picture is taken; whatever a page fetches from elsewhere is refused by
    its own policy, and stands there too."""
    look = ["--enable-logging=stderr", f"--window-size={width},3000", f"--screenshot={shot}", page.as_uri()]
    done = subprocess.run([*browser, *look], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_the_page_without_a_complaint_or_a_request(page: Path, browser: list[str], tmp_path: Path):
    for width in (390, 1280):
        shot = tmp_path / f"{width}.png"
        assert complaints(browser, page, width, shot) == []
        with Image.open(shot) as image:
            assert image.width == width
            assert len(image.convert("RGB").getcolors(2**24)) > 200  # not a blank page
    fetching = tmp_path / "fetching.html"
    fetching.write_text(page.read_text().replace("<nav>", "<img alt='' src='http://elsewhere.invalid/x.png'><nav>"))
    assert "elsewhere.invalid" in "".join(complaints(browser, fetching, 390, tmp_path / "x.png"))
