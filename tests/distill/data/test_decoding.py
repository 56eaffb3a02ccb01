"""How a GPU's images are decoded is tried in a child process, whose crash is a result; here the child decodes on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from typing import get_args

import numpy as np
import psutil
import pytest
import torch

from distill.data.augment.parameters import TrainTransform
from distill.data.dali import DaliLoader
from distill.data.dali_graph import DecodeMode
from distill.data.decoding import (
    Versions,
    candidates,
    choose_decoding,
    library_versions,
    proof_images,
    proved,
    result_of,
    try_decode,
)
from distill.data.index import ShardIndex
from distill.data.loaders import train_task
from shards.folders import folder_source
from shards.preparation import Options, prepare
from tests.distill.data.conftest import picture
from tests.distill.data.planting import encoded
from tests.distill.data.test_loaders import CPU, needs_dali, same

pytestmark = needs_dali
FIGURES = {
    "images_per_second": 900.0,
    "cpu_seconds_per_image": 1e-4,
    "pil_seconds_per_image": 2e-3,
    "max_error": 2,
    "mean_error": 0.2,
}
JPEG = b"\xff\xd8\xff\xe0"
NEW = Versions(nvjpeg="13.2.1", nvimgcodec="0.10.0.3")


def send_to_the_first_trial(number: signal.Signals) -> threading.Thread:
    """A thread that sends a signal to the first decoding child of this process."""

    def watch() -> None:
        while True:
            for child in psutil.Process().children():
                # not before exec: the name is that of the program that the fork became
                if "distill.data.decode_trial" in child.cmdline():
                    os.kill(child.pid, number)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("mode", get_args(DecodeMode))
def test_a_trial_decodes_all_kinds_of_images_as_pil_does_and_measures_its_speed(mode, make_split):
    trial = try_decode(mode, proof_images(make_split()), CPU, 1)
    assert trial.works, trial.error
    assert (trial.mode, trial.exit_code, trial.max_error, trial.mean_error) == (mode, 0, 0, 0.0)
    assert trial.images_per_second > 0
    assert trial.cpu_seconds_per_image > 0


def test_a_crash_of_the_trial_is_a_result(make_split):
    thread = send_to_the_first_trial(signal.SIGSEGV)
    trial = try_decode("whole", proof_images(make_split()), CPU, 1)
    thread.join()
    assert not trial.works
    assert (trial.exit_code, trial.images_per_second) == (-signal.SIGSEGV, None)
    assert trial.error.startswith("ended by SIGSEGV")


def test_a_trial_that_hangs_is_ended_and_is_a_result(make_split):
    thread = send_to_the_first_trial(signal.SIGSTOP)
    trial = try_decode("whole", proof_images(make_split()), CPU, 1, seconds=2)
    thread.join()
    assert trial.exit_code == -signal.SIGKILL
    assert "no result within 2 s" in trial.error
    assert not [child for child in psutil.Process().children() if "distill.data.decode_trial" in child.cmdline()]


def test_an_error_of_the_trial_is_told_in_one_line(make_split):
    """DALI decodes no GIF, and its messages have many lines. Few images: with many it crashes instead."""
    gif = np.frombuffer(encoded(picture(40, 50, 0), "GIF"), np.uint8)
    trial = try_decode("whole", [gif, *proof_images(make_split())[:3]], CPU, 1)
    assert (trial.exit_code, trial.works, trial.max_error) == (1, False, None)
    assert trial.error.startswith("RuntimeError: ")
    assert "decode" in trial.error
    assert "\n" not in trial.error


def test_a_child_that_prints_nothing_or_fails_after_its_figures_does_not_pass():
    assert result_of("whole", 0, "", "", 60).error == "exit code 0 without figures"
    late = result_of("whole", 1, json.dumps(FIGURES), "terminate called", 60)
    assert (late.works, late.error, late.max_error) == (False, "terminate called", 2)


@pytest.mark.parametrize(("max_error", "mean_error", "works"), [(4, 0.3, True), (31, 0.3, False), (8, 0.9, False)])
def test_wrong_pixels_are_a_result(max_error, mean_error, works):
    trial = result_of("whole", 0, json.dumps({**FIGURES, "max_error": max_error, "mean_error": mean_error}), "", 60)
    assert trial.works == works
    assert works or f"by up to {max_error} levels, {mean_error:.2f} in the mean" in trial.error


def test_after_a_crash_the_next_mode_is_tried_and_said(make_split):
    thread = send_to_the_first_trial(signal.SIGSEGV)
    decoding = proved(("whole", "host"), proof_images(make_split()), CPU, 1)
    thread.join()
    assert decoding.mode == "host"
    assert [trial.works for trial in decoding.trials] == [False, True]
    assert decoding.warning.startswith("data.decode: the CPU decodes what was meant for the GPU (host), ")
    assert "whole: ended by SIGSEGV" in decoding.warning
    assert "\n" not in decoding.warning
    facts = json.loads(json.dumps(decoding.facts()))
    assert (facts["asked"], facts["mode"], facts["trials"][0]["exit_code"]) == ("auto", "host", -signal.SIGSEGV)
    assert facts["trials"][1]["images_per_second"] == decoding.trials[1].images_per_second


def test_a_cpu_that_decodes_behind_the_mode_s_back_is_said(make_split):
    """Here the device is the CPU. nvImageCodec falls back to it in silence; photographs show it by the CPU's time. Then the
    host is tried too, as windows cost it less."""
    decoding = proved(("whole", "host"), proof_images(make_split(12, 1, ((375, 500),))), CPU, 1)
    assert [(trial.mode, trial.works) for trial in decoding.trials] == [("whole", True), ("host", True)]
    assert decoding.mode == max(decoding.trials, key=lambda trial: trial.images_per_second).mode
    assert f"the CPU decodes what was meant for the GPU ({decoding.mode})" in decoding.warning


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_any_mode_that_works_the_last_one_is_taken(make_split):
    decoding = choose_decoding("auto", make_split(), torch.device("cuda:0"), 1)
    assert decoding.mode == decoding.trials[-1].mode == "host"
    assert all("CUDA" in trial.error and trial.exit_code == 1 for trial in decoding.trials)


def test_without_a_good_image_nothing_is_tried(make_split):
    index = make_split()
    empty = ShardIndex(index.folder, index.manifest, index.records[:0])
    decoding = choose_decoding("auto", empty, torch.device("cuda:0"), 1)
    assert (decoding.mode, decoding.trials) == ("host", ())
    assert "no good image to try" in decoding.warning


@pytest.mark.parametrize("asked", ["auto", *get_args(DecodeMode)])
def test_on_a_cpu_windows_are_decoded_without_a_trial_whatever_the_recipe_says(asked, make_split):
    decoding = choose_decoding(asked, make_split(), CPU, 1)
    assert (decoding.asked, decoding.mode, decoding.trials, decoding.warning) == (asked, "window", (), "")


def test_windows_are_tried_only_with_libraries_that_decode_them_on_a_gpu_without_a_crash():
    assert candidates(NEW) == ("whole", "window", "host")
    for change in ({"nvjpeg": "12.4.0"}, {"nvjpeg": "13.1.9"}, {"nvimgcodec": "0.9.0.1859"}):
        assert candidates(Versions({**NEW, **change})) == ("whole", "host")
    assert candidates(Versions()) == ("whole", "host")


@pytest.mark.parametrize(
    ("versions", "says"),
    [
        (Versions(nvjpeg="12.4.0", nvimgcodec="0.9.0"), "the CPU decodes what was meant for the GPU: nvJPEG 12.4.0"),
        (Versions(nvjpeg="13.2.0", nvimgcodec="0.9.0"), "is known to crash"),
    ],
)
def test_asking_for_windows_by_name_is_warned_about(versions, says, monkeypatch, make_split):
    monkeypatch.setattr("distill.data.decoding.library_versions", lambda: versions)
    gpu = torch.device("cuda:0")
    decoding = choose_decoding("window", make_split(), gpu, 1)
    assert decoding.mode == "window"
    assert says in decoding.warning
    assert choose_decoding("whole", make_split(), gpu, 1).warning == ""


def test_the_versions_of_what_decodes_are_read():
    found = library_versions()
    assert set(found) == {"dali", "dali_cuda", "nvimgcodec", "nvjpeg"}
    assert found.number("nvjpeg") >= (11, 0)
    assert len(found.number("nvimgcodec")) == 2


def test_the_proof_leaves_bad_samples_out_and_gives_dali_what_it_can_decode(tmp_path):
    for number, kind in enumerate(("JPEG", "GIF", "PNG", "JPEG")):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "a" / f"{number}.{kind.lower()}").write_bytes(encoded(picture(40, 50, number), kind))
    source = folder_source(tmp_path / "images", one_class=True)
    prepare(source, tmp_path / "shards", Options(shards=1), progress=False)
    index = ShardIndex.open(tmp_path / "shards")
    kinds = {bytes(each[:4]) for each in proof_images(index)}
    assert kinds == {JPEG, b"\x89PNG"}
    assert len(proof_images(index)) == 4
    with index.shard_path(0).open("r+b") as file:
        for record in index.records:
            file.seek(int(record["offset"]))
            if file.read(4) == JPEG:
                file.write(b"damaged")
    assert [bytes(each[:4]) for each in proof_images(index)] == [b"\x89PNG", b"\x89PNG"]


@pytest.mark.parametrize("mode", get_args(DecodeMode))
@pytest.mark.parametrize("transform", [{}, {"crop": "pad"}], ids=["crops", "whole images"])
def test_every_mode_gives_the_same_pixels_on_a_cpu(mode, transform, make_split):
    options = {"global_batch_size": 12, "accumulate": 1, "rank": 0, "world_size": 1, "seed": 3, "num_threads": 1}
    task = train_task(make_split(), size=(40, 40), transform=TrainTransform(**transform), device=CPU, **options)
    loaders = [DaliLoader(dataclasses.replace(task, decode=each), decode_only=False) for each in (mode, None)]
    one, other = (list(loader.epoch(0)) for loader in loaders)
    assert same(one, other)
    for loader in loaders:
        loader.close()
