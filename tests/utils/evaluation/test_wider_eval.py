"""Tests of the WIDER FACE evaluation: examples by hand, reference loops, and the official figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.ground_truth import save_ground_truth
from utils.errors import UserError
from utils.evaluation.predictions import read_predictions
from utils.evaluation.wider_eval import SUBSETS, GroundTruth, bootstrap, evaluate, load_ground_truth


def truth(name: str, boxes: list[list[float]], counted: list[bool]) -> GroundTruth:
    return GroundTruth(name, np.array(boxes, float).reshape(-1, 4), {s: np.array(counted, bool) for s in SUBSETS})


def ap(predictions: dict[str, list[list[float]]], truths: list[GroundTruth]) -> float:
    rows = {name: np.array(boxes, float).reshape(-1, 5) for name, boxes in predictions.items()}
    result = evaluate(rows, truths).average_precisions
    assert set(result.values()) == {result["easy"]}
    return result["easy"]


TWO_FACES = truth("event/a", [[0, 0, 10, 10], [50, 0, 10, 10]], [True, True])


def test_perfect_detections_have_an_ap_of_one() -> None:
    found = {"event/a": [[0, 0, 10, 10, 0.9], [50, 0, 10, 10, 0.8], [90, 90, 5, 5, 0.1]]}
    assert ap(found, [TWO_FACES]) == pytest.approx(1)


def test_half_the_faces_at_half_the_precision() -> None:
    """By score: a false positive, then one of two faces. The precision is 1/2 up to a recall of 1/2."""
    found = {"event/a": [[90, 90, 5, 5, 0.9], [0, 0, 10, 10, 0.8]]}
    assert ap(found, [TWO_FACES]) == pytest.approx(0.25)


def test_second_detection_of_a_face_is_a_false_positive() -> None:
    """A face, the same face again, the other face: precision 1 up to a recall of 1/2, then 2/3."""
    found = {"event/a": [[0, 0, 10, 10, 0.9], [0, 0, 10, 11, 0.8], [50, 0, 10, 10, 0.7]]}
    assert ap(found, [TWO_FACES]) == pytest.approx(0.5 + 0.5 * 2 / 3)


def test_face_outside_the_subset_is_ignored() -> None:
    one_counts = truth("event/a", [[0, 0, 10, 10], [50, 0, 10, 10]], [True, False])
    found = {"event/a": [[50, 0, 10, 10, 0.9], [0, 0, 10, 10, 0.8]]}
    assert ap(found, [one_counts]) == pytest.approx(1)


@pytest.mark.parametrize("predictions", [{}, {"event/a": []}, {"event/other": [[0, 0, 10, 10, 0.9]]}])
def test_missing_and_empty_predictions_find_nothing(predictions: dict[str, list[list[float]]]) -> None:
    assert ap(predictions, [TWO_FACES]) == 0


def test_equal_scores_pass_every_threshold() -> None:
    """One of two faces at a precision of one half: the image without faces is not evaluated."""
    empty = truth("event/b", [], [])
    found = {
        "event/a": [[0, 0, 10, 10, 0.5], [90, 90, 5, 5, 0.5]],
        "event/b": [[0, 0, 1, 1, 0.5]],
    }
    assert ap(found, [TWO_FACES, empty]) == pytest.approx(0.25)


def test_images_without_faces_count_with_count_negatives() -> None:
    """Three false boxes in the empty image score higher than the two true ones: precision 1/4, then 2/5."""
    empty = truth("event/b", [], [])
    rows = {
        "event/a": np.array([[0, 0, 10, 10, 0.5], [50, 0, 10, 10, 0.4]]),
        "event/b": np.array([[0, 0, 5, 5, 0.9]] * 3),
    }
    assert evaluate(rows, [TWO_FACES, empty]).curves["hard"].average_precision == pytest.approx(1)
    counted = evaluate(rows, [TWO_FACES, empty], count_negatives=True)
    assert counted.curves["hard"].average_precision == pytest.approx(2 / 5)


def test_set_without_faces_has_no_average_precision() -> None:
    empty = truth("event/b", [], [])
    assert ap({"event/b": [[0, 0, 1, 1, 0.5]]}, [empty]) == 0
    assert ap({}, [empty]) == 0


def test_ties_keep_the_order_of_the_file() -> None:
    """A false box and a true one of equal score pass together: precision one half wherever a face is found."""
    for order in ([0, 1], [1, 0]):
        boxes = [[0, 0, 10, 10, 0.5], [90, 90, 5, 5, 0.5]]
        found = {"event/a": [*(boxes[i] for i in order), [99, 0, 5, 5, 0.1]]}
        assert ap(found, [TWO_FACES]) == pytest.approx(0.25)


@pytest.mark.parametrize("low", [-7.0, 0.0, 250.0])
def test_scores_of_any_range_are_scaled(low: float) -> None:
    found = {"event/a": [[0, 0, 10, 10, low + 9], [50, 0, 10, 10, low + 8], [90, 90, 5, 5, low]]}
    assert ap(found, [TWO_FACES]) == pytest.approx(1)


def test_order_of_the_predictions_does_not_matter() -> None:
    boxes = [[90.0, 90, 5, 5, 0.9], [0, 0, 10, 10, 0.8], [50, 0, 10, 10, 0.7]]
    assert ap({"event/a": boxes}, [TWO_FACES]) == ap({"event/a": boxes[::-1]}, [TWO_FACES]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("box", [[5, 5, 0, 0], [5, 5, -1, -1], [5, 5, -9, -9], [5, 5, -9, 20], [5, 5, 0, 1e300]])
def test_boxes_without_size_are_false_positives(box: list[float]) -> None:
    assert ap({"event/a": [[*box, 0.9], [0, 0, 10, 10, 0.8], [50, 0, 10, 10, 0.7]]}, [TWO_FACES]) == pytest.approx(
        2 / 3
    )


def test_box_of_one_pixel_overlaps_a_face_of_one_pixel() -> None:
    """The official boxes count pixels: from 3 to 3 is one of them."""
    assert ap({"event/a": [[3, 3, 0, 0, 0.9]]}, [truth("event/a", [[3, 3, 0, 0]], [True])]) == pytest.approx(1)


@pytest.mark.parametrize(("width", "expected"), [(4, 1.0), (3.99, 0.0)])
def test_overlap_of_one_half_is_enough(width: float, expected: float) -> None:
    """5 by 1 pixels of 10 by 1."""
    one = truth("event/a", [[0, 0, 9, 0]], [True])
    assert ap({"event/a": [[0, 0, width, 0, 0.9]]}, [one]) == pytest.approx(expected)


def test_matches_describe_every_box_and_face() -> None:
    rows = {"event/a": np.array([[0, 0, 10, 11, 0.6], [90, 90, 5, 5, 0.9], [0, 0, 10, 10, 0.8]])}
    (matches,) = evaluate(rows, [TWO_FACES]).matches
    assert matches.matched_face.tolist() == [0, -1, 0]
    assert matches.is_best_match.tolist() == [False, False, True]
    assert matches.face_scores.tolist() == pytest.approx([0.8, np.nan], nan_ok=True)


def test_matching_in_chunks_gives_the_same_ap(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    crowd = truth("event/a", generator.uniform(5, 50, (30, 4)).tolist(), [True] * 30)
    rows = {"event/a": np.concatenate([np.tile(crowd.boxes, (5, 1)), generator.random((150, 1))], axis=1)}
    rows["event/a"][:, :4] += generator.normal(0, 3, (150, 4))
    whole = evaluate(rows, [crowd]).average_precisions
    monkeypatch.setattr("utils.evaluation.wider_eval._OVERLAPS_AT_ONCE", 31)
    assert evaluate(rows, [crowd]).average_precisions == whole


def test_bootstrap_draws_images_with_replacement() -> None:
    """One of two images is found: a sample has it zero, one or two times, with probabilities 1/4, 1/2, 1/4."""
    found, missed = truth("event/a", [[0, 0, 10, 10]], [True]), truth("event/b", [[0, 0, 10, 10]], [True])
    values = bootstrap({"event/a": np.array([[0, 0, 10, 10, 0.9]])}, [found, missed], samples=4000)["hard"]
    parts = [np.mean(np.isclose(values, expected)) for expected in (0, 0.5, 1)]
    assert parts == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert values.mean() == pytest.approx(0.5, abs=0.03)


def test_bootstrap_of_equal_images_has_no_spread() -> None:
    alike = [truth(f"event/{number}", [[0, 0, 10, 10]], [True]) for number in range(5)]
    rows = {image.name: np.array([[0, 0, 10, 10, 0.9], [50, 50, 9, 9, 0.1]]) for image in alike}
    assert bootstrap(rows, alike, samples=20)["easy"].tolist() == pytest.approx([1] * 20)


def reference_evaluation(predictions: dict[str, np.ndarray], truths: list[GroundTruth], subset: str) -> float:
    """Reference implementation of the official procedure in loops over boxes and thresholds."""
    scores = np.concatenate([rows[:, 4] for rows in predictions.values()])
    proposals, found, faces = np.zeros(1000), np.zeros(1000), 0
    for image in truths:
        counted = image.subsets[subset]
        faces += counted.sum()
        rows = predictions.get(image.name, np.zeros((0, 5)))
        if len(rows) == 0 or len(image.boxes) == 0:
            continue
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        is_proposal, recalled, taken = [], [], set()
        for x, y, width, height, _ in rows:
            overlaps = []
            for left, top, face_width, face_height in image.boxes:
                across = min(x + width, left + face_width) - max(x, left) + 1
                down = min(y + height, top + face_height) - max(y, top) + 1
                overlap = across * down if across > 0 and down > 0 else 0
                area, face_area = (x + width - x + 1) * (y + height - y + 1), (face_width + 1) * (face_height + 1)
                overlaps.append(overlap / (area + face_area - overlap))
            face = int(np.argmax(overlaps))
            hit = overlaps[face] >= 0.5
            is_proposal.append(not hit or counted[face])
            if hit and counted[face]:
                taken.add(face)
            recalled.append(len(taken))
        scaled = (rows[:, 4] - scores.min()) / (scores.max() - scores.min())
        for number in range(1000):
            passing = int((scaled >= 1 - (number + 1) / 1000).sum())
            if passing:
                proposals[number] += sum(is_proposal[:passing])
                found[number] += recalled[passing - 1]
    precision = [f / p if p else 0.0 for f, p in zip(found, proposals, strict=True)]
    area, before = 0.0, 0.0
    for number, recall in enumerate(found / faces):
        area += (recall - before) * max(precision[number:])
        before = recall
    return area


def test_ap_equals_the_reference_loops() -> None:
    generator = np.random.default_rng(3)
    truths, predictions = [], {}
    for number in range(12):
        faces = generator.integers(0, 90, (int(generator.integers(0, 8)), 4)).astype(float)
        faces[:, 2:] = faces[:, 2:] % 30 + 2
        easy = generator.random(len(faces)) < 0.4
        subsets = {
            "easy": easy,
            "medium": easy | (generator.random(len(faces)) < 0.5),
            "hard": np.ones(len(faces), bool),
        }
        truths.append(GroundTruth(f"event/{number}", faces, subsets))
        boxes = np.concatenate([np.repeat(faces, 3, axis=0), generator.uniform(0, 90, (4, 4))])
        boxes += generator.normal(0, 2, boxes.shape)
        rows = np.concatenate([boxes, generator.random((len(boxes), 1)).round(1)], axis=1)
        if number % 5:
            predictions[f"event/{number}"] = rows
    result = evaluate(predictions, truths).average_precisions
    for subset in SUBSETS:
        assert result[subset] == pytest.approx(reference_evaluation(predictions, truths, subset), abs=1e-12)
        assert 0 < result[subset] < 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", [0.5801502760248893, 0.5935880784018734, 0.5818059814648244]),
        ("degenerate", [0.44592961023655225, 0.4639742827931588, 0.441630680474841]),
    ],
)
def test_ap_equals_the_official_figures_on_the_whole_validation_set(
    synthetic_predictions: Path, shared: Path, name: str, expected: list[float]
) -> None:
    truths = load_ground_truth(shared / "data/widerface/gt_full")
    assert len(truths) == 3226
    predictions = read_predictions(synthetic_predictions / name, [image.name for image in truths])
    assert list(evaluate(predictions, truths).average_precisions.values()) == pytest.approx(expected, abs=1e-9)


@pytest.fixture(scope="module")
def synthetic_predictions(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictions")
    script = shared / "reference/make_synthetic_predictions.py"
    subprocess.run([sys.executable, script, shared / "data/widerface/gt_full", folder], check=True)
    return folder


def test_official_files_define_which_faces_count(tmp_path: Path) -> None:
    faces = [[1, 2, 3, 4, 1, 1, 1], [5, 6, 7, 8, 0, 0, 1]]
    save_ground_truth(tmp_path, {"0--Parade": {"one": faces, "none": []}, "1--Other": {"two": faces[:1]}})
    one, none, two = load_ground_truth(tmp_path)
    assert (one.name, none.name, two.name) == ("0--Parade/one", "0--Parade/none", "1--Other/two")
    assert one.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert {subset: counts.tolist() for subset, counts in one.subsets.items()} == {
        "easy": [True, False],
        "medium": [True, False],
        "hard": [True, True],
    }
    assert none.boxes.shape == (0, 4)
    assert two.subsets["hard"].tolist() == [True]


def test_invalid_ground_truth_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the official ground truth of WIDER FACE val"):
        load_ground_truth(tmp_path)
    save_ground_truth(tmp_path, {"0--Parade": {"one": [[1, 2, 3, 4, 1, 1, 1]]}})
    assert len(load_ground_truth(tmp_path)) == 1
    (tmp_path / "wider_hard_val.mat").write_text("this is text")
    with pytest.raises(UserError, match="not the official ground truth") as exc_info:
        load_ground_truth(tmp_path)
    assert "\n" not in str(exc_info.value)
