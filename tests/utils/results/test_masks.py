"""Tests of head regions, and of head and face masks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from config import ROOT
from utils.errors import UserError
from utils.results.masks import Box, HeadMask, HeadSegmenter, crop, head_region
from utils.runtime.images import read_image

SIZE_HW = (100, 200)
ASTRONAUT = np.array([180, 70, 265, 180], np.float32)  # the face in astronaut.jpg


def region(*face: float, size_hw: tuple[int, int] = SIZE_HW) -> tuple[Box, Box]:
    return head_region(np.array(face, np.float32), size_hw)


def test_head_is_four_faces_wide_and_high_around_the_same_centre() -> None:
    head, face = region(90, 40, 110, 50)
    assert head == (60, 25, 140, 65)
    assert face == (30, 15, 50, 25)


@pytest.mark.parametrize(
    ("face", "head", "face_in_head"),
    [
        ((5, 40, 25, 50), (0, 25, 55, 65), (5, 15, 25, 25)),  # left
        ((180, 40, 200, 50), (150, 25, 200, 65), (30, 15, 50, 25)),  # right
        ((90, 2, 110, 12), (60, 0, 140, 27), (30, 2, 50, 12)),  # top
        ((90, 88, 110, 98), (60, 73, 140, 100), (30, 15, 50, 25)),  # bottom
        ((0, 0, 200, 100), (0, 0, 200, 100), (0, 0, 200, 100)),  # everything
        ((195, 95, 215, 105), (165, 80, 200, 100), (30, 15, 35, 20)),  # a quarter of the face is in the image
    ],
)
def test_head_is_clipped_at_every_border_and_the_face_stays_in_place(face: Box, head: Box, face_in_head: Box) -> None:
    assert region(*face) == (head, face_in_head)


@pytest.mark.parametrize("horizontal", [(-15, 5), (0, 20), (90, 110), (180, 200), (195, 215)])
@pytest.mark.parametrize("vertical", [(-15, 5), (0, 20), (40, 60), (80, 100), (95, 115)])
def test_face_in_its_head_is_the_same_pixels_as_in_the_image(
    horizontal: tuple[int, int], vertical: tuple[int, int]
) -> None:
    image = np.arange(SIZE_HW[0] * SIZE_HW[1]).reshape(SIZE_HW)
    (x1, x2), (y1, y2) = horizontal, vertical
    head, face = region(x1, y1, x2, y2)
    direct = image[max(y1, 0) : y2, max(x1, 0) : x2]
    assert direct.size > 0
    assert np.array_equal(crop(crop(image, head), face), direct)


@pytest.mark.parametrize(
    "face", [(-50, 40, -30, 50), (230, 40, 250, 50), (90, -40, 110, -30), (90, 130, 110, 140), (500, 500, 600, 600)]
)
def test_face_outside_the_image_is_empty(face: Box) -> None:
    head, face_in_head = region(*face)
    image = np.zeros(SIZE_HW)
    assert crop(crop(image, head), face_in_head).size == 0
    assert min(head + face_in_head) >= 0


def test_face_of_one_pixel_and_image_of_one_pixel() -> None:
    assert region(10, 20, 11, 21) == ((8, 18, 12, 22), (2, 2, 3, 3))
    assert region(0, 0, 1, 1, size_hw=(1, 1)) == ((0, 0, 1, 1), (0, 0, 1, 1))
    assert region(10.2, 20.2, 10.9, 20.9) == ((10, 20, 10, 20), (0, 0, 0, 0))


def test_face_mask_is_the_part_of_the_head_mask_in_the_face() -> None:
    mask = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert HeadMask((0, 0, 6, 4), (1, 2, 4, 4), mask).face_mask.tolist() == [[13, 14, 15], [19, 20, 21]]


@pytest.fixture(scope="module")
def segmenter() -> Iterator[HeadSegmenter]:
    pytest.importorskip("mediapipe")
    with HeadSegmenter() as segmenter:
        yield segmenter


def test_person_fills_the_face_and_not_all_of_the_head(segmenter: HeadSegmenter) -> None:
    image = read_image(ROOT / "data" / "sample_widerface" / "images" / "astronaut.jpg")
    head = segmenter.segment(image, ASTRONAUT)
    assert head.head_mask.dtype == np.uint8
    assert set(np.unique(head.head_mask)) == {0, 255}
    assert (head.face_mask == 255).mean() > 0.9
    assert (head.head_mask == 0).mean() > 0.1


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 9), (9, 1), (37, 23), (60, 100)])
@pytest.mark.parametrize("face", [(0, 0, 1, 1), (-5, -5, 4, 4), (2.5, 3.5, 30, 25), (500, 500, 600, 600)])
def test_masks_have_the_sizes_of_their_boxes(
    segmenter: HeadSegmenter, face: tuple[float, ...], size_hw: tuple[int, int]
) -> None:
    head = segmenter.segment(np.full((*size_hw, 3), 90, np.uint8), np.array(face, np.float32))
    for mask, (x1, y1, x2, y2) in ((head.head_mask, head.head_box), (head.face_mask, head.face_box)):
        assert mask.shape == (y2 - y1, x2 - x1)


def test_faces_without_a_person_are_counted(segmenter: HeadSegmenter) -> None:
    blank = np.full((120, 160, 3), 90, np.uint8)
    segmenter.count = segmenter.empty = 0
    head = segmenter.segment(blank, np.array([60.0, 40.0, 100.0, 80.0]))
    assert not head.face_mask.any()
    assert segmenter.describe().startswith("1 heads segmented, 1 of them without a person where the face is, ")


def test_model_input_is_rgb(segmenter: HeadSegmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    mediapipe = pytest.importorskip("mediapipe")
    shown: list[np.ndarray] = []
    make_image = mediapipe.Image

    def spy(**given: Any) -> Any:
        shown.append(given["data"])
        return make_image(**given)

    monkeypatch.setattr(mediapipe, "Image", spy)
    segmenter.segment(np.full((20, 30, 3), (1, 2, 3), np.uint8), np.array([10, 5, 14, 9], np.float32))
    assert shown[0][0, 0].tolist() == [3, 2, 1]


def test_image_need_not_be_contiguous(segmenter: HeadSegmenter) -> None:
    image = read_image(ROOT / "data" / "sample_widerface" / "images" / "astronaut.jpg")
    mirrored = np.ascontiguousarray(image[:, ::-1])
    face = np.array([60, 70, 145, 180], np.float32)
    expected = segmenter.segment(mirrored, face).head_mask
    assert np.array_equal(segmenter.segment(image[:, ::-1], face).head_mask, expected)


def test_unusable_models_are_named(tmp_path: Path) -> None:
    pytest.importorskip("mediapipe")
    with pytest.raises(UserError, match=r"none\.tflite: no such segmenter model; give a \.tflite"):
        HeadSegmenter(tmp_path / "none.tflite")
    (tmp_path / "text.tflite").write_text("not a model")
    with pytest.raises(UserError, match=r"text\.tflite: MediaPipe cannot use it as a segmenter") as exc_info:
        HeadSegmenter(tmp_path / "text.tflite")
    assert "\n" not in str(exc_info.value)
