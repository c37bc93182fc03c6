"""Average precision of sets that are small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from utils.average_precision import average_precision

Image = tuple[np.ndarray, np.ndarray]


def square(left: float, side: float = 10) -> list[float]:
    return [left, 0, left + side, side]


def predicted(*boxes_and_scores: tuple[list[float], float]) -> Image:
    boxes = [box for box, _ in boxes_and_scores]
    scores = [score for _, score in boxes_and_scores]
    return np.array(boxes, np.float32).reshape(-1, 4), np.array(scores, np.float32)


def labelled(*boxes: list[float]) -> np.ndarray:
    return np.array(boxes, np.float32).reshape(-1, 4)


def test_all_faces_found_and_nothing_else_is_one() -> None:
    predictions = [predicted((square(0), 0.3), (square(50), 0.9)), predicted((square(20), 0.5))]
    assert average_precision(predictions, [labelled(square(0), square(50)), labelled(square(20))]) == 1


@pytest.mark.parametrize(
    ("predictions", "truths"),
    [
        ([], []),
        ([predicted()], [labelled()]),
        ([predicted()], [labelled(square(0))]),
        ([predicted((square(0), 0.9))], [labelled()]),
        ([predicted((square(30), 0.9))], [labelled(square(0))]),
    ],
    ids=["no image", "nothing", "nothing predicted", "nothing labelled", "elsewhere"],
)
def test_nothing_found_is_zero(predictions: list[Image], truths: list[np.ndarray]) -> None:
    assert average_precision(predictions, truths) == 0


def test_worked_example() -> None:
    """Hit, miss, hit of three faces: recall 1/3 at precision 1, then 2/3 at precision 2/3; the third is never found."""
    predictions = [predicted((square(0), 0.9), (square(90), 0.8), (square(20), 0.7))]
    expected = 1 / 3 * 1 + 1 / 3 * 2 / 3
    assert average_precision(predictions, [labelled(square(0), square(20), square(40))]) == pytest.approx(expected)


def test_precision_is_the_best_at_this_recall_or_a_higher_one() -> None:
    """Miss, hit, hit: precision 1/2 and 2/3, and the first is raised to the second."""
    predictions = [predicted((square(90), 0.9), (square(0), 0.8), (square(20), 0.7))]
    assert average_precision(predictions, [labelled(square(0), square(20))]) == pytest.approx(2 / 3)


def test_scores_are_compared_across_images() -> None:
    """The false box of the second image is surer than the true one of the first."""
    truths = [labelled(square(0)), labelled()]
    for false_score, expected in ((0.4, 1.0), (0.6, 0.5)):
        predictions = [predicted((square(0), 0.5)), predicted((square(0), false_score))]
        assert average_precision(predictions, truths) == pytest.approx(expected)


def test_face_is_found_once_by_the_best_score() -> None:
    """A second box on one face is a miss: hit, miss, hit."""
    predictions = [predicted((square(0), 0.7), (square(1), 0.9), (square(20), 0.5))]
    expected = 1 / 2 * 1 + 1 / 2 * 2 / 3
    assert average_precision(predictions, [labelled(square(0), square(20))]) == pytest.approx(expected)


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, 1.0), (0.51, 0.0)])
def test_overlap_must_reach_the_threshold(threshold: float, expected: float) -> None:
    half = [0.0, 0.0, 10.0, 5.0]  # IoU 0.5 with the square of side 10
    assert average_precision([predicted((half, 0.9))], [labelled(square(0))], threshold) == expected


def test_order_of_the_predictions_does_not_matter() -> None:
    parts = [(square(0), 0.7), (square(90), 0.8), (square(20), 0.9)]
    truths = [labelled(square(0), square(20))]
    for order in (parts, parts[::-1]):
        assert average_precision([predicted(*order)], truths) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_sets_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        average_precision([predicted()], [])
