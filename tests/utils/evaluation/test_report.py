"""Tests of the evaluation report and of the gallery of errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from config import PostprocessConfig, ProtocolConfig
from utils.evaluation.error_gallery import draw_error_gallery, false_positives, missed_faces
from utils.evaluation.ground_truth import EvaluationSet
from utils.evaluation.localisation import localisation_ap
from utils.evaluation.prediction_set import PredictionSet, describe_protocol
from utils.evaluation.report import (
    DetectionStats,
    Measurement,
    append_to_table,
    confident_false_boxes,
    describe,
    recall_by_height,
    write_report,
)
from utils.evaluation.wider_eval import GroundTruth
from utils.runtime.images import write_image

# Faces 10, 20, 40 and 200 px high, all but the second counted in hard, and one image without any.
FACES = np.array([[0, 0, 10, 10], [50, 0, 20, 20], [100, 0, 40, 40], [200, 0, 200, 200]], float)
COUNTED = np.array([True, False, True, True])
PREDICTIONS = {
    # the 10 px face with a high score, the 40 px face twice with low scores, an ignored face, and a false positive
    "a/1": np.array(
        [
            [0, 0, 10, 10, 0.9],
            [100, 0, 40, 40, 0.4],
            [101, 0, 40, 40, 0.3],
            [50, 0, 20, 20, 0.8],
            [300, 300, 9, 9, 0.7],
        ]
    )
}


def measurement(tmp_path: Path, *, official: bool = True) -> Measurement:
    subsets = {"easy": COUNTED & False, "medium": COUNTED, "hard": COUNTED} if official else {"all": COUNTED}
    nothing = {name: np.zeros(0, bool) for name in subsets}
    truths = [GroundTruth("a/1", FACES, subsets), GroundTruth("b/2", np.zeros((0, 4)), nothing)]
    images = [tmp_path / "a/1.png", tmp_path / "b/2.png"]
    for image in images:
        write_image(image, np.full((400, 500, 3), 90, np.uint8))
    faces = EvaluationSet(truths, images, tmp_path / "gt", official)
    predicted = PredictionSet("name", tmp_path, "weights.pth", "original size", {"detection": {}})
    detected = DetectionStats(4, 2.0, (("b/2", "broken"),), np.array([0.01, 0.03]))
    localisation = localisation_ap(PREDICTIONS, truths)
    return Measurement(predicted, faces, faces.evaluate(PREDICTIONS), detected, frozenset(PREDICTIONS), localisation)


def test_recall_by_height(tmp_path: Path) -> None:
    measured = measurement(tmp_path)
    rows = {row.heights: row for row in recall_by_height(measured.faces, measured.evaluation)}
    assert list(rows) == ["under 16", "16 to 32", "32 to 64", "64 to 128", "from 128"]
    assert [row.faces for row in rows.values()] == [1, 0, 1, 0, 1]
    assert [row.recall for row in rows.values()] == [1, 0, 1, 0, 0]
    assert [row.recall_confident for row in rows.values()] == [1, 0, 0, 0, 0]


def test_confident_false_boxes_are_neither_faces_nor_ignored(tmp_path: Path) -> None:
    """The second box on the face of 40 px is false as well, but its score is below 0.5."""
    measured = measurement(tmp_path)
    found = confident_false_boxes(PREDICTIONS, measured.faces, measured.evaluation)
    assert found.tolist() == [[300, 300, 9, 9]]


def test_lines_end_with_the_official_figures(tmp_path: Path) -> None:
    """Of three faces two are found: the first at precision 1, the other at 2/3."""
    lines = describe(measurement(tmp_path))
    assert lines[0].startswith("4 images in 2.0 s (2.0 images/s)")
    assert "skipped b/2: broken; no faces are detected in it" in lines
    assert "landmark error over 2 detected faces : 2.00 % of the root of the face's area" in lines
    assert lines[-2].startswith("AP over hard faces at IoU 0.5:0.95 : 0.")
    assert lines[-1] == "Easy AP : 0.0000   Medium AP : 0.5556   Hard AP : 0.5556"


def test_lines_say_when_the_figure_is_not_official(tmp_path: Path) -> None:
    line = describe(measurement(tmp_path, official=False))[-1]
    assert line == "AP over all labelled faces, not the official WIDER FACE figure : 0.5556"


def test_report_is_written_as_text_and_json(tmp_path: Path) -> None:
    measured = measurement(tmp_path)
    write_report(tmp_path, measured)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["ap"] == {"easy": 0, "medium": pytest.approx(5 / 9), "hard": pytest.approx(5 / 9)}
    assert report["faces"] == {"easy": 0, "medium": 3, "hard": 3}
    assert report["landmark_error"] == pytest.approx(0.02)
    assert report["localisation_ap"] == vars(measured.localisation)
    assert report["without_predictions"] == ["b/2"]
    assert (tmp_path / "results.txt").read_text().splitlines() == describe(measured)
    assert cv2.imread(str(tmp_path / "pr_curves.png")) is not None


def test_table_has_one_header_and_one_row_per_run(tmp_path: Path) -> None:
    table = tmp_path / "results.csv"
    for official in (True, False):
        append_to_table(table, measurement(tmp_path, official=official))
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["experiment"], row["hard"], row["all"]) for row in rows] == [
        ("name", "0.5556", ""),
        ("name", "", "0.5556"),
    ]
    assert rows[0]["images_per_second"] == "2.0"


def test_errors_are_sorted_and_captioned(tmp_path: Path) -> None:
    measured = measurement(tmp_path)
    wrong = false_positives(measured.faces, PREDICTIONS, measured.evaluation, limit=9)
    assert [error.caption for error in wrong] == ["no face, score 0.700", "again, score 0.300"]
    assert len(false_positives(measured.faces, PREDICTIONS, measured.evaluation, limit=1)) == 1
    missed = missed_faces(measured.faces, measured.evaluation, limit=9)
    assert [error.caption for error in missed] == ["missed, 200 x 200 px"]


@pytest.mark.parametrize("limit", [1, 9])
def test_gallery_marks_the_box_of_each_error(tmp_path: Path, limit: int) -> None:
    measured = measurement(tmp_path)
    page = draw_error_gallery(measured.faces, PREDICTIONS, measured.evaluation, limit)
    assert page.shape[1] == 6 * 220
    red = (page == (60, 60, 255)).all(axis=2)
    green = (page == (60, 220, 60)).all(axis=2)
    assert red[: page.shape[0] // 2].sum() > 200
    assert green[page.shape[0] // 2 :].sum() > 200


def test_gallery_without_errors_and_with_an_unreadable_image(tmp_path: Path) -> None:
    measured = measurement(tmp_path)
    assert draw_error_gallery(measured.faces, PREDICTIONS, measured.evaluation, 0).shape == (60, 1320, 3)
    (tmp_path / "a/1.png").write_bytes(b"broken")
    assert draw_error_gallery(measured.faces, PREDICTIONS, measured.evaluation, 1).shape[1] == 1320


def test_protocol_is_described_in_one_line() -> None:
    published = PostprocessConfig(confidence_threshold=0.02, nms_threshold=0.4)
    assert describe_protocol(ProtocolConfig(), published) == (
        "original size, single pass, score > 0.02, NMS 0.4, no top-k, boxes with decimals, clipped"
    )
    other = ProtocolConfig("vga", flip=True, multi_scale=True, integer_boxes=True)
    assert describe_protocol(other, PostprocessConfig(top_k=5000, keep_top_k=750, clip_boxes=False)) == (
        "VGA (640x640, padded), flip + multi-scale + box voting, score > 0.5, NMS 0.3, top-k 5000, 750 kept, "
        "integer boxes, not clipped"
    )
