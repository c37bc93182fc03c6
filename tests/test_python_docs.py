"""Tests of docs/python.md: its code runs, and detections and threads behave as it states."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from config import ROOT
from models.detector import FaceDetector
from utils.structures import Detections

FAST = "mobilenet0.25_anc2_casT_fpn3"
SAMPLES = ROOT / "data/sample_widerface/images"
NO_FACES = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 5, 2))
ONE = Detections(
    torch.tensor([[10.0, 20, 40, 60]]),
    torch.tensor([0.5]),
    torch.tensor([[[18.0, 32], [32, 32], [25, 40], [19, 49], [31, 49]]]),
)


def test_code_blocks_run(tmp_path: Path) -> None:
    """All blocks run as one program in the repository; its files are written elsewhere."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    code = re.sub(r'imwrite\("', f'imwrite("{tmp_path.as_posix()}/', "\n".join(blocks))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "8 faces, best first"
    assert "dict_keys(['box', 'score', 'landmarks'])" in lines
    assert "astronaut.jpg 1" in lines
    assert {path.name for path in tmp_path.iterdir()} == {"faces.png", "drawing.jpg", "hidden.jpg"}


# ---------------------------------------------------------------------------------------------- detections


def test_to_dict_returns_json_values() -> None:
    assert json.loads(json.dumps(NO_FACES.to_dict())) == {"faces": []}
    assert ONE.to_dict() == {
        "faces": [
            {
                "box": [10, 20, 40, 60],
                "score": 0.5,
                "landmarks": [[18, 32], [32, 32], [25, 40], [19, 49], [31, 49]],
            }
        ]
    }
    assert Detections(ONE.boxes, ONE.scores, None).to_dict()["faces"][0]["landmarks"] is None


def test_crops_and_drawings() -> None:
    image = np.zeros((80, 100, 3), np.uint8)
    assert NO_FACES.crop(image) == NO_FACES.aligned(image) == []
    assert [crop.shape for crop in ONE.crop(image, margin=0)] == [(40, 30, 3)]
    assert [crop.shape for crop in ONE.crop(image)] == [(60, 50, 3)]
    assert [crop.shape for crop in ONE.aligned(image, 64)] == [(64, 64, 3)]
    assert ONE.draw(image).any()
    assert not image.any()
    assert not NO_FACES.draw(image).any()
    with pytest.raises(ValueError, match="landmarks, which this model does not predict"):
        Detections(ONE.boxes, ONE.scores, None).aligned(image)


# -------------------------------------------------------------------------------------------------- threads


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector.from_experiment(FAST)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Images of different sizes and numbers of faces."""
    image = cv2.imread(str(SAMPLES / "gray_pair.jpg"))
    return [image, image[:, :410], image[:100, :100], image[::2, ::2]] * 3


def assert_same(found: Detections, expected: Detections) -> None:
    torch.testing.assert_close(found.boxes, expected.boxes, atol=0.01, rtol=0)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)


@pytest.mark.parametrize("workers", [None, 1, 3])
def test_detect_many_keeps_the_order_of_the_images(
    workers: int | None, detector: FaceDetector, images: list[np.ndarray]
) -> None:
    taken = 0

    def stream() -> Iterator[np.ndarray]:
        nonlocal taken
        for image in images:
            taken += 1
            yield image

    found = detector.detect_many(stream(), workers)
    first = next(iter(found))
    assert taken <= (workers or detector.num_workers) + 1
    for each, image in zip([first, *found], images, strict=True):
        assert_same(each, detector.detect(image))
    assert list(detector.detect_many([])) == []


def test_threads_can_share_one_detector(detector: FaceDetector, images: list[np.ndarray]) -> None:
    expected = [detector.detect(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        for found, each in zip(pool.map(detector.detect, images), expected, strict=True):
            assert_same(found, each)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_detector_survives_a_fork() -> None:
    """A detector made before a fork works in the child, as in a pre-forking web server that has not yet used it."""
    code = f"""
import multiprocessing, cv2
from models.detector import FaceDetector
detector = FaceDetector.from_experiment({FAST!r})
image = cv2.imread({str(SAMPLES / "astronaut.jpg")!r})
def count(_): return len(detector.detect(image))
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(pool.map(count, range(3)))
"""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert (result.returncode, result.stdout) == (0, "[1, 1, 1]\n"), result.stderr
