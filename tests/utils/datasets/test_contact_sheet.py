"""Tests of contact sheets of training crops."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils.datasets.contact_sheet import draw_crops, write_contact_sheet
from utils.datasets.face_dataset import Batch
from utils.drawing import arrange_tiles
from utils.structures import FaceTargets

GREEN = [60, 220, 60]
NO_FACES = FaceTargets(
    torch.zeros(0, 4), torch.zeros(0, 5, 2), torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool), (0,)
)


def face(has_landmarks: bool) -> FaceTargets:
    """Return a face in the middle, from 1/4 to 3/4, with all landmarks at its centre."""
    return FaceTargets(
        torch.tensor([[0.25, 0.25, 0.75, 0.75]]),
        torch.full((1, 5, 2), 0.5),
        torch.tensor([has_landmarks]),
        torch.tensor([False]),
        counts=(1,),
    )


def batch_of(*faces: FaceTargets, side: int = 40) -> Batch:
    images = torch.zeros(len(faces), 3, side, side, dtype=torch.uint8)
    return Batch(images, FaceTargets.join(faces), tuple(range(len(faces))), ())


def test_each_tile_has_its_own_faces() -> None:
    """Three tiles of 40 pixels in two columns: no face, a face with landmarks, and one without below."""
    sheet = arrange_tiles(draw_crops(batch_of(NO_FACES, face(True), face(False))), columns=2)
    assert sheet.shape == (80, 80, 3)
    assert sheet.dtype == np.uint8
    assert not sheet[:40, :40].any()
    assert not sheet[40:, 40:].any()
    assert sheet[10, 60].tolist() == sheet[30, 60].tolist() == sheet[20, 50].tolist() == sheet[20, 70].tolist() == GREEN
    assert sheet[20, 60].any()
    assert sheet[50, 20].tolist() == GREEN
    assert not sheet[60, 20].any()


@pytest.mark.parametrize(("side", "tile"), [(640, 320), (320, 320), (33, 33)])
def test_tiles_have_320_pixels_at_most(side: int, tile: int) -> None:
    crops = draw_crops(batch_of(face(True), NO_FACES, side=side))
    assert [crop.shape for crop in crops] == [(tile, tile, 3)] * 2
    assert arrange_tiles(crops, columns=2).shape == (tile, 2 * tile, 3)


def test_drawing_does_not_change_the_batch() -> None:
    batch = batch_of(face(True))
    draw_crops(batch)
    assert not batch.images.any()


@pytest.mark.parametrize(("count", "size_hw"), [(1, (40, 40)), (3, (80, 80)), (5, (80, 120)), (99, (80, 120))])
def test_requested_number_of_crops_is_written(tmp_path: Path, count: int, size_hw: tuple[int, int]) -> None:
    batches = [batch_of(face(True), NO_FACES), batch_of(NO_FACES, face(True)), batch_of(face(False), NO_FACES)]
    write_contact_sheet(tmp_path / "log" / "batch.png", batches, count)
    assert cv2.imread(str(tmp_path / "log" / "batch.png")).shape == (*size_hw, 3)
