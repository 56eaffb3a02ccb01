"""`pipelines/report.py` and `pipelines/compare.py` on real runs, whole and with parts missing; the page in a real browser."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from huggingface_hub import ModelCard
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distill.data.faults import Quarantine
from distill.data.index import ShardIndex
from distill.data.order import TrainOrder
from distill.data.pixels import decode
from distill.data.reference import read_sample
from distill.data.stream import Position
from pipelines.compare import main as compare
from pipelines.evaluate import main as evaluate
from pipelines.report import main as report
from pipelines.reporting.classes import class_facts, confusions
from pipelines.reporting.curves import marks
from pipelines.reporting.dump import Dump
from pipelines.reporting.evaluations import write_dumps
from pipelines.reporting.first_batch import FirstBatch
from pipelines.reporting.reproduce import block
from pipelines.reporting.runs import Comparison, RunRecord
from tests.conftest import VAL_IMAGES
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
    """A folder with the runs `teacher`, `baseline` and `distilled`, the last one stopped and resumed, and their dumps; `log` is
    what `distilled` said, which writes its own report and could not at first."""
    folder = tmp_path_factory.mktemp("runs")
    log, said = folder / "others", folder / "log"
    finished([*arguments(digits, folder / "teacher"), *ALONE, "--student", "cifar_resnet14"], log)
    finished([*arguments(digits, folder / "baseline"), *ALONE], log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        for name in ("teacher", "baseline"):
            of = ["--model", f"local-dir:{folder / name / 'student'}", "--val", str(digits / "val")]
            assert evaluate([*of, "--dump", str(folder / name / "student.npz")]) == 0
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    weights = ["--teacher-weights", str(folder / "teacher" / "student"), "--teacher.evaluate", "true"]
    distilled = [*arguments(digits, folder / "distilled"), *weights, "--report.gradient_shares", "true"]
    distilled += ["--report.page", "true", "--train.checkpoint_every", "4"]
    in_the_way = folder / "distilled" / "report.html"
    in_the_way.mkdir(parents=True)
    finished([*distilled, "--train.max_steps", "4"], said)
    (folder / "distilled" / "summary.json").unlink()
    in_the_way.rmdir()
    finished([*distilled, "--train.max_steps", "8", "--resume"], said)
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


def test_a_run_draws_its_own_report_with_the_words_of_what_is_not_known(runs: Path):
    folder = runs / "distilled"
    sections = Sections((folder / "report.html").read_text())
    assert list(sections.found) == PANELS
    said = (folder / "report.md").read_text()
    assert "student alone not run" in said
    assert f"{folder / 'report.html'}: what the student learned" in (runs / "log").read_text()
    summary = json.loads((folder / "summary.json").read_text())
    assert Dump.load(folder / "student.npz").facts["top1"] == summary["top1"]  # of the student that went on after step 4


def test_a_report_that_cannot_be_drawn_is_one_line_of_a_run_that_stays_finished(runs: Path):
    first = (runs / "log").read_text().split("going on from step 4")[0]
    (line,) = (line for line in first.splitlines() if "no report" in line)
    assert f"{runs / 'distilled'}: no report: " in line
    assert f"`python pipelines/report.py {runs / 'distilled'}` draws it" in line


def test_tensorboard_has_the_figures(runs: Path):
    events = EventAccumulator(str(runs / "distilled" / "trackers"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    for title in ("Top-1 of distilled over training", "Linear CKA with the teacher, stage by stage", "Augmented batch"):
        (image,) = events.Images(f"report/{title}")
        assert image.step == 8
        assert len(Image.open(io.BytesIO(image.encoded_image_string)).convert("RGB").getcolors(2**24)) > 20
    drawn = Sections((runs / "distilled" / "report.html").read_text()).alts
    assert {f"report/{title}" for title in drawn} >= set(tags) - {"report/Augmented batch"}
    assert len(tags) > 12


def test_the_model_card_has_the_evaluation_the_verdict_and_the_curve(runs: Path):
    folder = runs / "distilled" / "student"
    card, summary = ModelCard.load(folder / "README.md"), json.loads((runs / "distilled" / "summary.json").read_text())
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"top-1 (%)": summary["top1"], "top-5 (%)": summary["top5"]}
    assert card.data.eval_results[0].dataset_args["images"] == VAL_IMAGES
    assert card.data.tags == ["image-classification", "timm", "knowledge-distillation"]
    assert f"- distilled: top-1 {summary['top1']:.2f} %; against student alone not run" in card.text
    (curve,) = re.findall(r"!\[Top-1 over training\]\((.*)\)", card.text)
    assert Image.open(folder / curve).width > 300
    assert card.text.index("## What it learned") < card.text.index("## How it was trained")


def test_dumps_that_are_missing_are_written_where_that_is_asked(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (copied / "baseline" / "student.npz").unlink()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")  # of the launcher that started the run: the evaluation is no process of its
    monkeypatch.setenv("RANK", "0")
    said = said_by([copied / "baseline", copied / "distilled"], tmp_path / "x.html", "--evaluate")
    assert "is missing" not in said
    assert "is right about" in said
    top1 = json.loads((copied / "baseline" / "summary.json").read_text())["top1"]
    assert Dump.load(copied / "baseline" / "student.npz").facts["top1"] == top1


def test_a_dump_that_takes_too_long_is_given_up(copied: Path):
    file = copied / "baseline" / "student.npz"
    file.unlink()
    assert write_dumps(Comparison.read([copied / "baseline"]), 0.0) == [f"{file} is not written: it takes more than 0 s"]
    assert not file.exists()


def test_the_evaluation_of_a_teacher_is_that_of_the_run(copied: Path):
    folder = copied / "distilled"
    (folder / "teacher.npz").unlink()
    manifest = json.loads((folder / "manifest.json").read_text())

    def options(weights: str, **changes: str) -> str:
        teacher = {**manifest["recipe"]["teacher"], "weights": weights, **changes}
        command = ["pipelines/imagenet.py", "--import", "mine.py", "--import=yours.py"]
        changed = {**manifest, "command": command, "recipe": {**manifest["recipe"], "teacher": teacher}}
        (folder / "manifest.json").write_text(json.dumps(changed))
        return " ".join(Comparison.read([folder]).missing_dumps().get(folder / "teacher.npz", []))

    assert f"--weights {folder / 'teacher' / 'student'} " in options("train")
    assert "--weights pretrained --class-map map.txt" in options("pretrained", class_map="map.txt")
    assert "--import mine.py --import yours.py" in options("pretrained")
    assert options("random") == ""  # nobody has those weights any more


def test_weights_that_are_no_path_do_not_make_a_file_of_the_working_folder_the_teachers(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (copied / "distilled" / "teacher.npz").unlink()
    shutil.copy(copied / "teacher" / "student.npz", tmp_path / "student.npz")
    monkeypatch.chdir(tmp_path)
    manifest = copied / "distilled" / "manifest.json"
    manifest.write_text(re.sub(r'"weights": "[^"]*"', '"weights": "pretrained"', manifest.read_text()))
    assert RunRecord.read(copied / "distilled").teacher_dump is None


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
    for file, model in (
        (copied / "distilled" / "student.npz", f"local-dir:{copied / 'distilled' / 'student'}"),
        (copied / "distilled" / "teacher.npz", "cifar_resnet14"),
        (copied / "baseline" / "student.npz", f"local-dir:{copied / 'baseline' / 'student'}"),
    ):
        assert f"{file} is missing; `python pipelines/evaluate.py --model {model} " in said
    assert "student alone" in said
    assert said.count("Not shown") >= 8


def test_a_name_with_html_is_text_in_markdown_too(copied: Path, tmp_path: Path):
    folder = (copied / "distilled").rename(copied / "<b>run")
    said = said_by([folder], tmp_path / "x.html")
    assert r"* \<b>run: top-1 " in said
    assert f"--json {folder / 'ledger.json'}`" in said, "inside `code` nothing is escaped"
    plain = re.sub(r"```.*?```|`[^`]*`", "", said, flags=re.DOTALL)
    assert re.findall(r"(?<!\\)<", plain) == []


def test_a_student_alone_has_a_report_of_its_own(copied: Path, tmp_path: Path):
    said = said_by([copied / "baseline"], tmp_path / "x.html")
    assert "no teacher -> cifar_resnet8" in said
    assert re.search(r"top-1 [\d.]+ %; against published not given$", said, re.MULTILINE)  # itself is the student alone
    assert "not run" not in said
    assert "Not shown: it needs the dumps of a teacher and a student" in said


def test_a_run_that_stopped_early_says_where(copied: Path, tmp_path: Path):
    folder = copied / "distilled"
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # killed while it wrote
    said = said_by([copied / "baseline", folder], tmp_path / "x.html")
    assert "at step 3 of 12, not finished" in said
    assert "* distilled: no evaluation yet\n" in said
    card = (tmp_path / "x.html").read_text().split("<article")[1].split("</article>")[0]
    assert [re.sub("<[^>]*>", " ", each).split() for each in re.findall("<div class='delta none'>.*?</div>", card)] == [
        ["no", "evaluation", "yet", "student", "alone"],
        ["not", "given", "published"],
        ["no", "evaluation", "yet", "teacher"],
    ]
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


def test_runs_of_other_data_have_their_own_pictures_and_are_not_compared(copied: Path, digits: Path, tmp_path: Path):
    other = shutil.copytree(copied / "distilled", copied / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["recipe"]["data"]["val"] = str(digits / "train")
    manifest["val_shards"] = ShardIndex.open(digits / "train").digest
    manifest["recipe"]["teacher"]["weights"] = str(tmp_path / "gone" / "student")
    (other / "manifest.json").write_text(json.dumps(manifest))
    (other / "teacher.npz").unlink()
    of = ["--model", f"local-dir:{other / 'student'}", "--val", str(digits / "train"), "--dump-sample", "40"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert evaluate([*of, "--dump", str(other / "student.npz")]) == 0
    said = said_by([copied / "baseline", other, copied / "distilled"], tmp_path / "x.html")
    assert "* other: evaluated on other images than distilled; calibration" in said
    assert "Not shown: other's images right now and wrong alone; this needs dumps of both, of the same images" in said
    classes = (tmp_path / "x.html").read_text().split("<h2>Classes</h2>")[1].split("<h2>")[0]
    shown = classes.split("<h3>other</h3>")[1].split("<h3>distilled</h3>")[0]
    data = re.findall(r"src='data:image/png;base64,([^']*)'", shown)
    dump, index = Dump.load(other / "student.npz"), ShardIndex.open(digits / "train")
    rows = [int(dump["sample_ids"][pair.example]) for pair in confusions(dump)]
    assert len(data) == len(rows) > 0
    for each, row in zip(data, rows, strict=True):
        expected = np.asarray(decode(read_sample(index, row)))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))), expected)


def test_what_one_model_cannot_give_is_missing_for_it_alone_and_samples_of_two_sizes_are_cut_to_both(
    copied: Path, tmp_path: Path
):
    path = copied / "distilled" / "teacher.npz"
    dump = Dump.load(path)
    kept = {name: values for name, values in dump.arrays.items() if not re.match("embeddings|stage|heat", name)}
    absent = {"embedding": "it has no head", "stages": "it has no stages"}
    np.savez(path, facts=np.array(json.dumps({**dump.facts, "absent": absent, "stages": 0})), **kept)
    path = copied / "baseline" / "student.npz"
    dump = Dump.load(path)
    for name in ("sampled_ids", "embeddings", "logits", "region_classes", *(f"stage-{i}" for i in (1, 2, 3))):
        dump.arrays[name] = dump.arrays[name][:20]
    np.savez(path, facts=np.array(json.dumps(dump.facts)), **dump.arrays)
    said = said_by([copied / "baseline", copied / "distilled"], tmp_path / "x.html")
    assert "t-SNE (after PCA to 50, one seed) of 20 images" in said
    assert "* Not shown: teacher cifar_resnet14; it has no head" in said
    assert said.count("* Not shown: teacher cifar_resnet14; it has no stages") == 1
    assert "* Not shown: it needs the dumps of a teacher and a student, both with stages" in said


def test_a_baseline_evaluated_on_other_images_is_not_compared(copied: Path, tmp_path: Path):
    path = copied / "baseline" / "student.npz"
    dump = Dump.load(path)
    np.savez(path, facts=np.array(json.dumps({**dump.facts, "split_digest": "of other shards"})), **dump.arrays)
    said = said_by([copied / "baseline", copied / "distilled"], tmp_path / "x.html")
    assert "gained and lost by class; the dump of baseline is of other images" in said
    assert "* baseline: evaluated on other images than distilled; calibration" in said


def test_the_block_to_copy_starts_what_ran(copied: Path):
    run = RunRecord.read(copied / "distilled")

    def started(**changes: object) -> tuple[str, dict]:
        changed = block(dataclasses.replace(run, manifest={**run.manifest, **changes}))
        return changed.splitlines()[-1], yaml.safe_load(changed.split("RECIPE'\n")[1].split("\nRECIPE")[0])

    said, recipe = started(mixed_precision="bf16", command=["pipelines/imagenet.py", "--import=my file.py"])
    assert said == "accelerate launch --num_processes 1 pipelines/imagenet.py --recipe again.yaml --import 'my file.py'"
    assert recipe["train"]["mixed_precision"] == "bf16"  # that of the launcher, which another launcher need not have
    changed = {"train": {**run.recipe["train"], "mixed_precision": "bf16"}, "out": f"{run.recipe['out']}_again"}
    assert recipe == {**run.recipe, **changed}
    said, _ = started(distributed="MULTI_CPU", world_size=2)
    assert said.startswith("ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 pipelines/imagenet.py ")


def test_the_batch_is_the_runs_first_one_with_its_labels(page: Path, runs: Path, digits: Path):
    seen = FirstBatch.read(runs / "distilled")
    index = ShardIndex.open(digits / "train")
    recipe = json.loads((runs / "distilled" / "manifest.json").read_text())["recipe"]
    order = TrainOrder(index.num_samples, recipe["train"]["global_batch_size"], recipe["seed"], 0)
    assert seen.labels == [index.class_names[k] for k in index.labels[order.samples(0, 0)]]
    said = f"distilled: {len(seen.images)} images of the first batch as both models see them"
    changed = "augmentation: crop pad, padding 2, flip 0.0"  # all else of the section is the default
    assert f"* {said}; {changed}" in page.with_suffix(".md").read_text().splitlines()


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
    ("name", "content", "said"),
    [
        ("student.npz", "", "student.npz: no dump (No data left in file); write it with"),
        ("events.jsonl", '{"event": "resum{"event": "resumed", "step": 4}\n', "events.jsonl: line 1 is damaged ("),
    ],
    ids=["dump", "log"],
)
def test_a_damaged_file_is_named(copied: Path, name: str, content: str, said: str, capsys: pytest.CaptureFixture):
    (copied / "distilled" / name).write_text(content)
    assert report([str(copied / "distilled"), "--out", str(copied / "x.html")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {copied / 'distilled' / said}")
    assert error.count("\n") == 1


def test_a_file_that_is_no_summary_of_a_report_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture):
    mine = tmp_path / "README.md"
    mine.write_text("mine")
    assert report(["nowhere", "--out", str(tmp_path / "README.html")]) == 2
    assert f"error: --out: {mine} is there" in capsys.readouterr().err
    assert mine.read_text() == "mine"


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


def console(browser: list[str], page: Path, *look: str) -> list[str]:
    """What the browser's console says of the page; whatever a page fetches from elsewhere is refused by its own policy, and
    stands there too."""
    done = subprocess.run(
        [*browser, "--enable-logging=stderr", *look, page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_shows_the_page_without_a_complaint_or_a_request(page: Path, browser: list[str], tmp_path: Path):
    brightness = []
    for width, scheme in ((390, 1), (1280, 0)):  # light on a phone, dark on a desk
        shot = tmp_path / f"{width}.png"
        look = (f"--window-size={width},3000", f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={shot}")
        assert console(browser, page, *look) == []
        with Image.open(shot) as image:
            assert image.width == width
            assert len(image.convert("RGB").getcolors(2**24)) > 200  # not a blank page
            brightness.append(np.asarray(image.convert("L")).mean())
    assert brightness[0] > 150
    assert brightness[1] < 100
    fetching = tmp_path / "fetching.html"
    fetching.write_text(page.read_text().replace("<nav>", "<img alt='' src='http://elsewhere.invalid/x.png'><nav>"))
    assert "elsewhere.invalid" in "".join(console(browser, fetching, f"--screenshot={tmp_path / 'x.png'}"))


MEASURE = """<script>
function say(media) {
  for (const section of document.querySelectorAll("section")) {
    const over = document.documentElement.scrollWidth - innerWidth, height = section.getBoundingClientRect().height
    console.log("PANEL", [media, section.querySelector("h2").textContent, height, over].join("|"))
  }
}
addEventListener("load", () => say("screen"))
matchMedia("print").addEventListener("change", (event) => event.matches && say("print"))
</script>"""


def test_every_panel_has_its_place_on_a_phone_and_on_paper(page: Path, browser: list[str], tmp_path: Path):
    measured, paper = tmp_path / "measured.html", tmp_path / "paper.pdf"
    text = re.sub(r"<meta http-equiv=Content-Security-Policy[^>]*>", "", page.read_text())  # it forbids scripts
    measured.write_text(text.replace("</body>", f"{MEASURE}</body>"))
    said = console(browser, measured, "--window-size=390,3000", f"--print-to-pdf={paper}")
    found = [re.search(r"PANEL (\w+)\|(.*)\|([\d.]+)\|(-?\d+)", line).groups() for line in said]
    for media in ("screen", "print"):
        assert [title for where, title, *_ in found if where == media] == PANELS
    assert [title for _, title, height, _ in found if float(height) < 80] == []
    assert {over for where, *_, over in found if where == "screen"} == {"0"}, "the page is wider than the phone"
    assert len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) > 3
