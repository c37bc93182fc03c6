"""Tests of the HTML page of an evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import Browser
from utils.evaluation.ground_truth import open_evaluation_set
from utils.evaluation.localisation import localisation_ap
from utils.evaluation.page import image_faces, write_evaluation_page
from utils.evaluation.prediction_set import PredictionSet
from utils.evaluation.report import DetectionStats, Measurement, write_report
from utils.evaluation.wider_eval import GroundTruth, evaluate

# Three labelled faces, of which the last does not count.
TRUTH = GroundTruth(
    "e/a", np.array([[10.0, 10, 20, 20], [50, 10, 20, 20], [10, 50, 20, 20]]), {"all": np.array([True, True, False])}
)
# A hit, a second detection of the face, a false positive, an ignored face, and a score too low to be shown.
ROWS = np.array(
    [[10.0, 10, 20, 20, 0.9], [11, 10, 20, 20, 0.8], [80, 80, 9, 9, 0.7], [10, 50, 20, 20, 0.6], [5, 80, 9, 9, 0.05]]
)


def test_every_prediction_and_face_has_its_kind() -> None:
    (matches,) = evaluate({"e/a": ROWS}, [TRUTH]).matches
    found = list(image_faces(TRUTH, matches, ROWS, "all"))
    assert [(face["kind"], face.get("score"), face.get("found")) for face in found] == [
        ("hit", 0.9, None),
        ("false", 0.8, None),
        ("false", 0.7, None),
        ("ignored", 0.6, None),
        ("missed", None, 0.9),  # shown above that threshold
        ("missed", None, None),
        ("ignored", None, 0.6),
    ]
    assert found[0]["box"] == [10, 10, 30, 30]


def test_without_predictions_all_faces_are_missed() -> None:
    (matches,) = evaluate({}, [TRUTH]).matches
    found = list(image_faces(TRUTH, matches, np.zeros((0, 5)), "all"))
    assert [face["kind"] for face in found] == ["missed", "missed", "ignored"]


@pytest.fixture
def measured(tmp_path: Path) -> tuple[Measurement, dict[str, np.ndarray]]:
    """Three images, of which one is missing and one has no faces; scores range from -1 to 3."""
    images = tmp_path / "mine/images"
    images.mkdir(parents=True)
    (tmp_path / "mine/label.txt").write_text("# a.jpg\n10 10 20 20\n50 10 20 20\n# gone.jpg\n1 1 9 9\n# <b>.jpg\n")
    for name in ("a.jpg", "<b>.jpg"):
        Image.new("RGB", (100, 80)).save(images / name)
    faces = open_evaluation_set(tmp_path / "mine", None, need_images=False)
    predictions = {"a": np.array([[10.0, 10, 20, 20, 3.0], [80, 60, 9, 9, -1.0]])}
    predicted = PredictionSet("exp", tmp_path / "predictions", None, "original", {})
    localisation, evaluation = localisation_ap(predictions, faces.truths), faces.evaluate(predictions)
    return Measurement(predicted, faces, evaluation, DetectionStats(), {"a"}, localisation), predictions


def test_page_has_the_figures_and_all_images(
    measured: tuple[Measurement, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    write_report(tmp_path, measured[0])
    page = write_evaluation_page(tmp_path, *measured)
    assert page is not None
    text = page.read_text()
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data
    entries = json.loads(data[1])
    assert [entry["name"] for entry in entries] == ["a", "gone", "<b>"]
    assert entries[0]["source"] == "./mine/images/a.jpg"
    # Scores are scaled to [0, 1]; the lowest is too low to be shown.
    assert [(face["kind"], face.get("score")) for face in entries[0]["faces"]] == [
        ("hit", 1.0),
        ("missed", None),
        ("missed", None),
    ]
    assert entries[1] == {"name": "gone", "skipped": "the image cannot be read"}
    assert "<dt>AP all</dt><dd>0.3333</dd>" in text
    assert "<td>16 to 32 px</td><td>2</td><td>0.500</td>" in text
    assert "not the official figure" in text


def test_browser_shows_misses_by_threshold(measured: tuple[Measurement, dict[str, np.ndarray]], tmp_path: Path) -> None:
    write_report(tmp_path, measured[0])
    page = write_evaluation_page(tmp_path, *measured)
    assert page is not None
    with Browser() as browser:
        browser.emulate(1280, 800)
        browser.open(page)
        browser.settle()
        kinds = "[...document.querySelectorAll('#grid rect')].map(box => box.getAttribute('class'))"
        assert browser.evaluate(kinds) == ["hit", "missed"]
        caption = "document.querySelector('.card span').textContent"
        assert browser.evaluate(caption) == "1 found, 1 missed, 100x80"
        browser.evaluate("document.querySelector('input[value=hit]').click()")
        assert browser.evaluate(kinds) == ["missed"]
        assert browser.evaluate("document.querySelector('.report img').naturalWidth") == 700
        assert browser.problems() == []
