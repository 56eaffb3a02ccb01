"""What goes to trackers and to the hub."""

from pathlib import Path

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker

from pipelines.reporting.publish import hub_name, publish, sheet, show


def test_a_sheet_has_its_images_in_rows():
    images = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
    found = sheet(images, columns=3)
    assert found.shape == (4, 9, 3)
    assert found[::2, ::3, 0].tolist() == [[1, 2, 3], [4, 5, 0]]


def test_a_tracker_that_takes_no_images_is_left_alone():
    class Numbers(GeneralTracker):
        """As Accelerate's for MLflow and Comet: it has no `log_images`."""

        name, requires_logging_directory, tracker = "numbers", False, None

    show([Numbers(_blank=True)], {"x": np.zeros((1, 1, 3), np.uint8)}, 1)


def test_a_reason_that_begins_with_an_empty_line_is_said():
    said = list[str]()
    publish(Path("\nno where"), [], said.append)
    assert said == [
        "\nno where: no report: no where: no manifest.json, so no run began here; give the --out of a run;"
        " `python pipelines/report.py '\nno where'` draws it"
    ]


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("resnet34.tv_in1k", "timm/resnet34.tv_in1k"),
        ("hf-hub:someone/model", "someone/model"),
        ("local-dir:somewhere", None),
        ("cifar_resnet8", None),
    ],
)
def test_a_published_model_has_a_repository(name: str, repository: str | None):
    assert hub_name(name) == repository
