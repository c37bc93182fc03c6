"""Tests of the augmentations: crops, rotation, scaling, mirroring, mosaics, colour, blur and compression."""

from __future__ import annotations

import copy
from dataclasses import replace

import cv2
import numpy as np
import pytest

from config import DataConfig
from utils.datasets.transforms import (
    Sample,
    augment,
    blur,
    blur_by_motion,
    change_colours,
    compress,
    crop,
    crop_rotated,
    ignore_small_faces,
    mirror,
    mosaic,
    resize_square,
)
from utils.options import Flags
from utils.structures import Faces

LANDMARKS = [[12, 14], [18, 14], [15, 18], [13, 22], [17, 22]]  # left eye, right eye, nose, left and right corner


def sample_of(boxes: list[list[float]], height: int = 40, width: int = 60) -> Sample:
    """Return a sample in which the pixel at (x, y) has the colour (x, y, 0) and all faces have the same landmarks."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :, 0] = np.arange(width)
    image[:, :, 1] = np.arange(height)[:, None]
    landmarks = np.array([LANDMARKS] * len(boxes), np.float32).reshape(-1, 5, 2)
    known, ignored = np.ones(len(boxes), bool), np.zeros(len(boxes), bool)
    faces = Faces(np.array(boxes, np.float32).reshape(-1, 4), landmarks, known, ignored)
    return Sample(image, faces)


ONE_FACE = sample_of([[10, 10, 20, 26]])
NO_FACE = sample_of([])


def test_crop_moves_boxes_and_landmarks_with_the_pixels() -> None:
    cut = crop(ONE_FACE, (5, 8, 20, 30))
    assert cut.image.shape == (30, 20, 3)
    assert cut.image[0, 0].tolist() == [5, 8, 0]
    assert cut.image[-1, -1].tolist() == [24, 37, 0]
    assert cut.faces.boxes.tolist() == [[5, 2, 15, 18]]
    assert cut.faces.landmarks[0, 0].tolist() == [7, 6]


def test_crop_clips_boxes_but_not_landmarks() -> None:
    cut = crop(ONE_FACE, (14, 16, 10, 10))
    assert cut.faces.boxes.tolist() == [[0, 0, 6, 10]]
    assert cut.faces.landmarks[0, 0].tolist() == [-2, -2]


@pytest.mark.parametrize(("left", "kept"), [(15, 1), (16, 0), (5, 1), (4, 0)])
def test_crop_keeps_the_faces_whose_centre_is_inside(left: int, kept: int) -> None:
    """The others are ignored, because a part of them is visible."""
    cut = crop(ONE_FACE, (left, 10, 11 if left < 10 else 20, 20))  # the centre is (15, 18), and 4 + 11 = 15
    assert [len(value) for value in vars(cut.faces).values()] == [1] * 4
    assert cut.faces.ignored.tolist() == [not kept]


def test_crop_drops_the_faces_that_are_not_visible() -> None:
    cut = crop(ONE_FACE, (20, 10, 20, 20))  # the face ends at 20
    assert [len(value) for value in vars(cut.faces).values()] == [0] * 4


def test_crop_keeps_ignored_faces_ignored() -> None:
    ignored = replace(ONE_FACE, faces=replace(ONE_FACE.faces, ignored=np.array([True])))
    assert crop(ignored, (0, 0, 60, 40)).faces.ignored.tolist() == [True]


def test_small_faces_are_ignored_by_the_root_of_their_area() -> None:
    sample = sample_of([[0, 0, 4, 16], [0, 0, 4, 15]])  # roots 8 and 7.7
    assert ignore_small_faces(sample, 8).faces.ignored.tolist() == [False, True]
    assert ignore_small_faces(sample, 0).faces.ignored.tolist() == [False, False]


def test_crop_beyond_the_image_is_filled() -> None:
    cut = crop(ONE_FACE, (-2, -3, 70, 50), fill=(104, 117, 122.6))
    assert cut.image[3:43, 2:62].tolist() == ONE_FACE.image.tolist()
    assert {tuple(cut.image[y, x]) for y, x in ((0, 0), (49, 69), (2, 30), (20, 1), (43, 30), (20, 62))} == {
        (104, 117, 123)
    }
    assert cut.faces.boxes.tolist() == [[12, 13, 22, 29]]


@pytest.mark.parametrize("corner", [(200, 0), (-200, 0), (0, 200), (0, -200), (60, 40)])
def test_crop_that_misses_the_image_is_all_fill(corner: tuple[int, int]) -> None:
    cut = crop(ONE_FACE, (*corner, 150, 170), fill=(1, 2, 3))
    assert cut.image.tolist() == [[[1, 2, 3]] * 150] * 170
    assert len(cut.faces) == 0


def test_mirror_swaps_left_and_right() -> None:
    mirrored = mirror(ONE_FACE)
    assert mirrored.faces.boxes.tolist() == [[40, 10, 50, 26]]
    assert mirrored.faces.landmarks.tolist() == [[[42, 14], [48, 14], [45, 18], [43, 22], [47, 22]]]
    assert mirrored.image[0, 0].tolist() == [59, 0, 0]
    assert ONE_FACE.faces.boxes.tolist() == [[10, 10, 20, 26]]


@pytest.mark.parametrize("sample", [ONE_FACE, NO_FACE, sample_of([[0, 0, 60, 40], [59, 0, 60, 1], [-5, 1, 3, 2]])])
def test_mirror_inverts_itself(sample: Sample) -> None:
    twice = mirror(mirror(sample))
    assert np.array_equal(twice.image, sample.image)
    for name in ("boxes", "landmarks", "has_landmarks", "ignored"):
        assert np.array_equal(getattr(twice.faces, name), getattr(sample.faces, name)), name


def test_resize_scales_faces_and_drops_those_thinner_than_a_pixel() -> None:
    square = sample_of([[4, 8, 16, 32], [0, 0, 4, 40], [0, 0, 3.9, 40], [0, 0, 40, 3]], height=40, width=40)
    small = resize_square(square, 10)
    assert small.image.shape == (10, 10, 3)
    assert small.faces.boxes.tolist() == [[1, 2, 4, 8], [0, 0, 1, 10]]
    assert small.faces.landmarks[:, 0].tolist() == [[3, 3.5], [3, 3.5]]
    assert small.faces.boxes.dtype == small.faces.landmarks.dtype == np.float32


def test_augmentation_does_not_change_its_input() -> None:
    before = copy.deepcopy(ONE_FACE)
    augment(ONE_FACE, 32, DataConfig(flip_probability=1, colour_probability=1), (0, 0, 0), rng(0))
    assert np.array_equal(before.image, ONE_FACE.image)
    assert np.array_equal(before.faces.boxes, ONE_FACE.faces.boxes)


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("max_scale", [1.0, 2.5])
def test_augmented_boxes_contain_their_faces(max_scale: float) -> None:
    """After any augmentation, the box of a red face on black still contains it."""
    image = np.zeros((60, 90, 3), np.uint8)
    image[20:44, 30:50] = (0, 0, 255)
    red = replace(sample_of([[30, 20, 50, 44]]), image=image)
    config = DataConfig(crop_scales=(0.3, 0.6, max_scale), colour_probability=0, grey_probability=0)
    kept = 0
    for seed in range(40):
        sample = augment(red, 128, config, (0, 0, 0), rng(seed))
        assert sample.image.shape == (128, 128, 3)
        for x1, y1, x2, y2 in np.rint(sample.faces.boxes).astype(int):
            kept += 1
            assert 0 <= x1 < x2 <= 128
            assert 0 <= y1 < y2 <= 128
            face = sample.image[y1:y2, x1:x2, 2]
            assert (face > 127).mean() > 0.85
            assert (sample.image[:, :, 2] > 127).sum() == pytest.approx(face.size, rel=0.15, abs=8)
    assert kept == 40  # the crop is drawn around a face


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 50), (50, 1), (7, 5)])
@pytest.mark.parametrize("boxes", [[], [[0, 0, 1, 1]], [[-9, -9, -1, -1]], [[0, 0, 500, 500]]])
@pytest.mark.parametrize("degrees", [0, 180])
def test_any_image_and_any_box_give_a_crop(size_hw: tuple[int, int], boxes: list[list[float]], degrees: float) -> None:
    for seed in range(20):
        config = DataConfig(rotation_degrees=degrees, blur_probability=0.5, jpeg_probability=0.5)
        sample = augment(sample_of(boxes, *size_hw), 32, config, (104, 117, 123), rng(seed))
        assert sample.image.shape == (32, 32, 3)
        assert sample.faces.boxes.shape == (len(sample.faces.has_landmarks), 4)
        assert ((sample.faces.boxes >= 0) & (sample.faces.boxes <= 32)).all()


def test_equal_seeds_give_equal_samples_and_others_differ() -> None:
    def image(seed: int) -> bytes:
        return augment(ONE_FACE, 32, DataConfig(), (0, 0, 0), rng(seed)).image.tobytes()

    assert image(1) == image(1)
    assert image(1) != image(2)


def test_colours_change_only_with_their_probability() -> None:
    colours = rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert np.array_equal(change_colours(colours, 0.0, rng(1)), colours)
    changed = change_colours(colours, 1.0, rng(1))
    assert (changed.shape, changed.dtype) == (colours.shape, np.uint8)
    assert not np.array_equal(changed, colours)


def test_grey_stays_grey_and_hue_moves_by_36_degrees_at_most() -> None:
    grey = np.full((2, 3, 3), 100, np.uint8)
    red = np.zeros((2, 3, 3), np.uint8)
    red[:, :, 2] = 128
    for seed in range(30):
        assert np.ptp(change_colours(grey, 1.0, rng(seed))[0, 0]) == 0
        hue = int(cv2.cvtColor(change_colours(red, 1.0, rng(seed)), cv2.COLOR_BGR2HSV)[0, 0, 0])
        assert min(hue, 180 - hue) <= 18 + 1  # OpenCV counts hue in steps of two degrees


def test_mosaic_puts_four_samples_side_by_side() -> None:
    """Quarters of 10 pixels: the face at (1, 2) of the last one is at (11, 12) of the whole."""
    face = replace(sample_of([[1, 2, 4, 8]]), image=np.full((10, 10, 3), 7, np.uint8))
    none = replace(sample_of([]), image=np.zeros((10, 10, 3), np.uint8))
    whole = mosaic([face, none, none, face])
    assert whole.image.shape == (20, 20, 3)
    assert whole.faces.boxes.tolist() == [[1, 2, 4, 8], [11, 12, 14, 18]]
    assert (whole.faces.landmarks[1] - whole.faces.landmarks[0]).tolist() == [[10, 10]] * 5
    assert np.array_equal(whole.image[:10, :10], face.image)
    assert np.array_equal(whole.image[10:, 10:], face.image)
    assert not whole.image[10:, :10].any()


@pytest.mark.parametrize(("probability", "grey"), [(1.0, True), (0.0, False)])
def test_crops_become_grey_with_their_probability(probability: float, grey: bool) -> None:
    sample = augment(ONE_FACE, 32, DataConfig(grey_probability=probability), (0, 0, 0), rng(0))
    blue, green, red = np.moveaxis(sample.image, 2, 0)
    assert (np.array_equal(blue, green) and np.array_equal(green, red)) is grey


@pytest.mark.parametrize("fill", [(0, 0, 0), (1, 2, 3)])
@pytest.mark.parametrize("region", [(5, 8, 20, 30), (-2, -3, 70, 51), (0, 0, 60, 40)])
def test_crop_rotated_by_zero_degrees_is_a_plain_crop(
    region: tuple[int, int, int, int], fill: tuple[int, int, int]
) -> None:
    rotated, plain = crop_rotated(ONE_FACE, region, 0, fill), crop(ONE_FACE, region, fill)
    assert np.array_equal(rotated.image, plain.image)
    assert np.array_equal(rotated.faces.boxes, plain.faces.boxes)
    assert np.array_equal(rotated.faces.landmarks, plain.faces.landmarks)


def test_rotation_by_90_degrees_moves_boxes_and_landmarks_with_the_pixels() -> None:
    """Counter-clockwise about (20, 20): 5 to the left becomes 5 below, and the box of 10 x 16 becomes 16 x 10."""
    rotated = crop_rotated(ONE_FACE, (0, 0, 40, 40), 90)
    assert np.array_equal(rotated.image, np.rot90(ONE_FACE.image[:, :40]))
    assert rotated.faces.boxes[0].tolist() == pytest.approx([10, 20, 26, 30], abs=1e-4)  # from 10, 10, 20, 26
    assert rotated.faces.landmarks[0].tolist() == [pytest.approx([y, 40 - x], abs=1e-4) for x, y in LANDMARKS]


def test_rotation_by_90_degrees_of_a_region_that_is_not_square() -> None:
    """The region of 30 x 20 about (20, 20) shows columns 10 to 30 and rows 5 to 35."""
    rotated = crop_rotated(ONE_FACE, (5, 10, 30, 20), 90)
    assert np.array_equal(rotated.image, np.rot90(ONE_FACE.image[5:35, 10:30]))
    assert rotated.faces.boxes[0].tolist() == pytest.approx([5, 10, 21, 20], abs=1e-4)


@pytest.mark.parametrize("degrees", [17, 45, 90, -133, 180])
def test_square_box_keeps_its_size_at_any_angle(degrees: float) -> None:
    """A square box contains a circle: its bounds do not grow, and its centre is rotated exactly."""
    rotated = crop_rotated(sample_of([[24, 14, 36, 26]]), (10, 0, 40, 40), degrees)
    assert rotated.faces.boxes[0].tolist() == pytest.approx([14, 14, 26, 26], abs=1e-4)


def test_box_of_an_oval_face_is_that_of_the_ellipse() -> None:
    """Half sides of 3 and 4, rotated by 45 degrees, both become the root of (9 + 16) / 2."""
    rotated = crop_rotated(sample_of([[27, 16, 33, 24]]), (10, 0, 40, 40), 45)
    assert (rotated.faces.boxes[0, 2:] - 20).tolist() == pytest.approx([12.5**0.5] * 2, abs=1e-4)


def test_faces_rotated_out_of_the_region_are_dropped_and_others_clipped() -> None:
    """By 45 degrees about (20, 20) in 40 x 40 pixels: (1, 1) leaves the region, (20, 1) moves to (6.6, 6.6)."""
    rotated = crop_rotated(sample_of([[0, 0, 2, 2], [10, -9, 30, 11]]), (0, 0, 40, 40), 45)
    assert rotated.faces.boxes.tolist() == [pytest.approx([0, 0, 16.56, 16.56], abs=0.01)]
    assert len(rotated.faces.landmarks) == len(rotated.faces.has_landmarks) == 1


def test_rotated_crop_shows_the_image_around_the_region_and_fill_beyond_the_image() -> None:
    white = replace(NO_FACE, image=np.full((40, 60, 3), 255, np.uint8))
    assert (crop_rotated(white, (20, 10, 20, 20), 45, (1, 2, 3)).image == 255).all()
    # Corners lie 28 pixels from the centre: two of them above and below it, where the image has 20, two at its sides,
    # where it has 30.
    corners = crop_rotated(white, (10, 0, 40, 40), 45, (1, 2, 3)).image[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.tolist() == [[1, 2, 3], [255] * 3, [255] * 3, [1, 2, 3]]
    assert len(crop_rotated(NO_FACE, (10, 0, 40, 40), 45).faces) == 0


def test_motion_blur_spreads_a_point_along_a_line() -> None:
    point = np.zeros((7, 9, 3), np.uint8)
    point[3, 4] = 255
    across, down = blur_by_motion(point, 1, 0), blur_by_motion(point, 2, 90)
    assert across[3, 2:7, 0].tolist() == [0, 85, 85, 85, 0]
    assert down[:, 4, 0].tolist() == [0, 51, 51, 51, 51, 51, 0]
    assert across.sum(dtype=int) == down.sum(dtype=int) == point.sum(dtype=int)


def test_blur_smooths_noise_and_keeps_a_flat_image() -> None:
    noise = rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    flat = np.full((1, 5, 3), 77, np.uint8)
    for seed in range(20):
        assert blur(noise, rng(seed)).std() < 0.8 * noise.std()
        assert np.array_equal(blur(flat, rng(seed)), flat)


def test_compression_loses_more_at_lower_quality() -> None:
    noise = rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    low, high = (np.abs(compress(noise, quality).astype(int) - noise).mean() for quality in (30, 95))
    assert 0 < high < low


@pytest.mark.parametrize("name", ["rotation_degrees", "blur_probability", "jpeg_probability"])
def test_each_augmentation_changes_the_pixels(name: str) -> None:
    noise = replace(ONE_FACE, image=rng(0).integers(0, 256, (40, 60, 3), np.uint8))
    still = DataConfig(flip_probability=0, colour_probability=0, grey_probability=0)
    before = augment(noise, 40, still, (0, 0, 0), rng(0))
    after = augment(noise, 40, Flags({name: 1.0}).apply(still), (0, 0, 0), rng(0))
    assert after.image.shape == before.image.shape
    assert not np.array_equal(after.image, before.image)
    assert np.array_equal(after.faces.boxes, before.faces.boxes) is (name != "rotation_degrees")
