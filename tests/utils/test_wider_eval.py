from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from models.detector import FaceDetector
from utils.wider_eval import SUBSETS, GroundTruth, evaluate, load_ground_truth


def truth(name: str, boxes: list[list[float]], counted: list[bool]) -> GroundTruth:
    return GroundTruth(name, np.array(boxes, float).reshape(-1, 4), {s: np.array(counted, bool) for s in SUBSETS})


def ap(predictions: dict[str, list[list[float]]], truths: list[GroundTruth]) -> float:
    rows = {name: np.array(boxes, float).reshape(-1, 5) for name, boxes in predictions.items()}
    result = evaluate(rows, truths)
    assert set(result.values()) == {result["easy"]}
    return result["easy"]


TWO_FACES = truth("event/a", [[0, 0, 10, 10], [50, 0, 10, 10]], [True, True])


def test_finding_every_face_first_is_perfect() -> None:
    found = {"event/a": [[0, 0, 10, 10, 0.9], [50, 0, 10, 10, 0.8], [90, 90, 5, 5, 0.1]]}
    assert ap(found, [TWO_FACES]) == pytest.approx(1)


def test_half_the_faces_at_half_the_precision() -> None:
    """Best first: a miss, then one of two faces. Precision 1/2 up to a recall of 1/2."""
    found = {"event/a": [[90, 90, 5, 5, 0.9], [0, 0, 10, 10, 0.8]]}
    assert ap(found, [TWO_FACES]) == pytest.approx(0.25)


def test_the_second_hit_on_a_face_is_a_false_positive() -> None:
    """Hit, hit again, other face: precision 1 up to recall 1/2, then 2/3."""
    found = {"event/a": [[0, 0, 10, 10, 0.9], [0, 0, 10, 11, 0.8], [50, 0, 10, 10, 0.7]]}
    assert ap(found, [TWO_FACES]) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_a_face_outside_the_subset_is_neither_right_nor_wrong() -> None:
    one_counts = truth("event/a", [[0, 0, 10, 10], [50, 0, 10, 10]], [True, False])
    found = {"event/a": [[50, 0, 10, 10, 0.9], [0, 0, 10, 10, 0.8]]}
    assert ap(found, [one_counts]) == pytest.approx(1)


@pytest.mark.parametrize("predictions", [{}, {"event/a": []}, {"event/other": [[0, 0, 10, 10, 0.9]]}])
def test_missing_and_empty_predictions_find_nothing(predictions: dict[str, list[list[float]]]) -> None:
    assert ap(predictions, [TWO_FACES]) == 0


def test_equal_scores_and_no_faces_are_defined() -> None:
    empty = truth("event/b", [], [])
    assert ap({"event/a": [[0, 0, 10, 10, 0.5]], "event/b": [[0, 0, 1, 1, 0.5]]}, [TWO_FACES, empty]) == pytest.approx(
        0.5
    )
    assert ap({"event/b": [[0, 0, 1, 1, 0.5]]}, [empty]) == 0


def test_biubug6_reaches_the_figures_of_its_own_evaluation(shared: Path) -> None:
    """On the 400 development images, with integer boxes as its program writes them."""
    folder = shared / "data/widerface/val"
    detector = FaceDetector.from_checkpoint(
        shared / "weights/mobilenet0.25_Final.pth", confidence_threshold=0.02, nms_threshold=0.4, clip_boxes=False
    )
    truths = load_ground_truth(folder / "gt")
    predictions = {}
    for image in truths:
        found = detector.detect(cv2.imread(str(folder / "images" / f"{image.name}.jpg")))
        boxes = found.boxes.int().double().numpy()
        sizes = boxes[:, 2:] - boxes[:, :2]
        predictions[image.name] = np.concatenate([boxes[:, :2], sizes, found.scores.double().numpy()[:, None]], axis=1)
    result = evaluate(predictions, truths)
    assert list(result.values()) == pytest.approx([0.92036, 0.90573, 0.73636], abs=5e-4)
