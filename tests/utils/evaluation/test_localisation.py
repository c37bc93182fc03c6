"""Tests of AP at several IoUs, compared with pycocotools, and of landmark errors."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
import torch

from utils.evaluation.localisation import LocalisationAP, landmark_errors, localisation_ap
from utils.evaluation.wider_eval import GroundTruth
from utils.structures import Detections, Faces

Predictions = dict[str, np.ndarray]


def truth(name: str, boxes: list[list[float]], counts: list[bool] | None = None) -> GroundTruth:
    """Return an image with faces given as x, y, width, height, which count or are ignored."""
    counted = np.ones(len(boxes), bool) if counts is None else np.array(counts, bool)
    return GroundTruth(name, np.array(boxes, np.float64).reshape(-1, 4), {"all": counted})


def random_detections(seed: int) -> tuple[Predictions, list[GroundTruth]]:
    """Return images of 0 to 150 faces, some ignored or missed, with noisy detections, some of equal scores."""
    rng = np.random.default_rng(seed)
    truths, predictions = [], {}
    for number, count in enumerate((0, 1, 7, 150, 0, 30)):
        boxes = np.concatenate([rng.uniform(0, 500, (count, 2)), rng.uniform(4, 90, (count, 2))], axis=1)
        truths.append(truth(f"{number}", boxes.tolist(), (rng.random(count) < 0.8).tolist()))
        found = boxes[rng.random(count) < 0.8]
        found = found + rng.normal(0, 0.08, found.shape) * np.tile(found[:, 2:], 2)
        others = np.concatenate([rng.uniform(0, 500, (10, 2)), rng.uniform(4, 90, (10, 2))], axis=1)
        rows = np.concatenate([found, found[: len(found) // 4] + 1, others])
        predictions[f"{number}"] = np.column_stack([rows, rng.random(len(rows)).round(2)])
    del predictions["4"]  # a missing image has no detections
    return predictions, truths


def ap_of_pycocotools(predictions: Predictions, truths: list[GroundTruth]) -> LocalisationAP:
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    annotations: list[dict[str, Any]] = []
    detections: list[dict[str, Any]] = []
    for image, each in enumerate(truths, start=1):
        for box, counts in zip(each.boxes, each.subsets["all"], strict=True):
            face = {"id": len(annotations) + 1, "image_id": image, "category_id": 1, "bbox": box.tolist()}
            annotations.append({**face, "area": float(box[2] * box[3]), "iscrowd": int(not counts)})
        for *box, score in predictions.get(each.name, np.zeros((0, 5))).tolist():
            detections.append({"image_id": image, "category_id": 1, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        faces = coco.COCO()
        faces.dataset = {
            "images": [{"id": image} for image in range(1, len(truths) + 1)],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "face"}],
        }
        faces.createIndex()
        evaluation = cocoeval.COCOeval(faces, faces.loadRes(detections), "bbox")
        evaluation.params.maxDets = [1, 10, 10_000]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, 0, 0, 2]
    return LocalisationAP(float(precision.mean()), float(precision[0].mean()), float(precision[5].mean()))


@pytest.mark.parametrize("seed", range(4))
def test_ap_equals_that_of_pycocotools(seed: int) -> None:
    predictions, truths = random_detections(seed)
    expected, found = ap_of_pycocotools(predictions, truths), localisation_ap(predictions, truths)
    assert (found.ap, found.ap50, found.ap75) == pytest.approx((expected.ap, expected.ap50, expected.ap75), abs=1e-12)
    assert 0.1 < found.ap < found.ap50


def test_ap_of_one_face_by_hand() -> None:
    """A detection of 10 x 10 in a face of 10 x 13 has an IoU of 0.77, which exceeds six of the ten thresholds."""
    found = localisation_ap({"a": np.array([[0, 0, 10, 10, 0.9]])}, [truth("a", [[0, 0, 10, 13]])])
    assert (found.ap, found.ap50, found.ap75) == pytest.approx((0.6, 1.0, 1.0))


def test_detections_of_ignored_faces_do_not_lower_the_ap() -> None:
    both = [truth("a", [[0, 0, 10, 10], [50, 50, 20, 20]], [True, False])]
    rows = np.array([[50, 50, 20, 20, 0.9], [0, 0, 10, 10, 0.8]])
    assert localisation_ap({"a": rows}, both).ap == pytest.approx(1.0)
    counted = [truth("a", [[0, 0, 10, 10], [90, 90, 20, 20]])]
    assert localisation_ap({"a": rows}, counted).ap == pytest.approx(0.25, abs=0.01)  # half found, at half precision


def test_the_faces_of_the_largest_subset_count() -> None:
    subsets = {"easy": np.array([True, False]), "hard": np.array([True, True])}
    both = GroundTruth("a", np.array([[0, 0, 10, 10], [50, 50, 20, 20]], np.float64), subsets)
    assert localisation_ap({"a": np.array([[0, 0, 10, 10, 0.9]])}, [both]).ap == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("predictions", "faces"),
    [({}, [[0, 0, 10, 10]]), ({"a": np.zeros((0, 5))}, [[0, 0, 10, 10]]), ({"a": np.array([[0, 0, 1, 1, 0.5]])}, [])],
)
def test_ap_without_faces_or_detections_is_zero(predictions: Predictions, faces: list[list[float]]) -> None:
    assert localisation_ap(predictions, [truth("a", faces)]) == LocalisationAP(0.0, 0.0, 0.0)


def test_more_than_a_hundred_faces_of_an_image_count() -> None:
    faces = [[20.0 * column, 20.0 * row, 10.0, 10.0] for row in range(20) for column in range(20)]
    rows = np.column_stack([np.array(faces), np.linspace(0.9, 0.1, len(faces))])
    assert localisation_ap({"a": rows}, [truth("a", faces)]).ap == pytest.approx(1.0)


def labelled(boxes: list[list[float]], landmarks: np.ndarray) -> Faces:
    count = len(boxes)
    known, ignored = np.ones(count, bool), np.zeros(count, bool)
    return Faces(np.array(boxes, np.float32).reshape(-1, 4), landmarks.astype(np.float32), known, ignored)


def detected(boxes: list[list[float]], landmarks: np.ndarray) -> Detections:
    scores = torch.linspace(0.9, 0.5, len(boxes))
    return Detections(torch.tensor(boxes).reshape(-1, 4), scores, torch.from_numpy(landmarks).float())


def test_landmark_error_is_the_mean_distance_divided_by_the_root_of_the_area() -> None:
    """The face of 10 x 40 has a root of 20; the most confident of its two detections is off by (3, 4), so by 5."""
    points = np.arange(20, dtype=np.float64).reshape(2, 5, 2)
    faces = labelled([[0, 0, 10, 40], [100, 100, 110, 110]], points)  # the second is not detected
    boxes = [[200.0, 200, 210, 210], [0.0, 0, 10, 39], [0.0, 0, 10, 40]]
    found = detected(boxes, np.stack([points[1], points[0] + (3, 4), points[0] + 9]))
    assert landmark_errors(found, faces).tolist() == [0.25]


@pytest.mark.parametrize("excluded", ["has_landmarks", "ignored"])
def test_faces_without_landmarks_and_ignored_ones_have_no_landmark_error(excluded: str) -> None:
    faces, points = labelled([[0, 0, 10, 10]], np.zeros((1, 5, 2))), np.zeros((1, 5, 2))
    faces = dataclasses.replace(faces, **{excluded: np.array([excluded == "ignored"])})
    assert len(landmark_errors(detected([[0.0, 0, 10, 10]], points), faces)) == 0


@pytest.mark.parametrize(("detections", "faces"), [(0, 1), (1, 0), (0, 0)])
def test_landmark_error_without_detections_or_faces_is_empty(detections: int, faces: int) -> None:
    found = detected([[0.0, 0, 1, 1]] * detections, np.zeros((detections, 5, 2)))
    assert len(landmark_errors(found, labelled([[0.0, 0, 1, 1]] * faces, np.zeros((faces, 5, 2))))) == 0
