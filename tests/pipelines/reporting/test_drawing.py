"""Drawings: names as they are, on any machine, and readable."""

import os
import re
import subprocess
import sys
import warnings
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageColor

from pipelines.reporting.calibration import reliability
from pipelines.reporting.drawing import COLOURS, PALE, changes, grouped, lines, matrix, rasterised, reliabilities, stacked

NAMES = ["$5 and $6", r"$\frac$", "_alone", "<b>", "猫"]


def test_names_are_drawn_as_they_are_and_without_a_warning():
    steps = ([1, 2, 3], [2.0, 3.0, 4.0])
    sure = reliability(np.linspace(0.1, 0.9, 9), np.arange(9) % 2 == 0)
    with warnings.catch_warnings(), rasterised() as pixels:
        warnings.simplefilter("error")
        drawn = {
            "lines": lines(dict.fromkeys(NAMES, steps), "loss", "lines", log=True),
            "stacked": stacked([1, 2], {name: [0.2, 0.2] for name in NAMES}, "stacked"),
            "grouped": grouped({name: [1.0] for name in NAMES}, ["a"], "y", "grouped"),
            "reliabilities": reliabilities(dict.fromkeys(NAMES, sure), "reliabilities"),
            "changes": changes(dict.fromkeys(NAMES, 1.0), "x", "changes"),
            "matrix": matrix(np.ones((5, 5)), 1.0, [name[:7] for name in NAMES], "matrix"),
        }
    assert pixels.keys() == drawn.keys()
    for title, drawing in drawn.items():
        texts = [text.removeprefix("\u200b") for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawing)]
        for name in NAMES:
            short = name[:7] if title == "matrix" else name
            assert escape(short, quote=False) in texts, (title, texts)
        assert not [text for text in texts if "mathdefault" in text], title


def test_a_backend_of_a_notebook_is_not_asked_for(tmp_path: Path):
    code = (
        "from pipelines.reporting.drawing import changes, heat; import numpy; heat(numpy.eye(2)); changes({'a': 1.0}, 'x', 'y')"
    )
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.of_nobody"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[3], timeout=120)


@pytest.mark.parametrize(("names", "turned"), [(list("0123456789"), 0), (["airplane", "automobile", "bird", "cat", "deer"], 5)])
def test_names_below_a_matrix_are_turned_where_they_would_lie_on_each_other(names: list[str], turned: int):
    drawn = matrix(np.ones((len(names),) * 2), 1.0, names, "x")
    assert len(re.findall(r"rotate\(-90", drawn)) == turned


def test_letters_on_a_colour_can_be_read():
    for colour in COLOURS:
        linear = (np.array(ImageColor.getrgb(colour)) / 255) ** 2.2
        brightness = float(linear @ [0.2126, 0.7152, 0.0722])
        contrast = (brightness + 0.05) / 0.05 if colour in PALE else 1.05 / (brightness + 0.05)  # of WCAG 2
        assert contrast > 3, colour
