"""Property-based tests (hypothesis): inverses and invariants that hold for any input."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor
from torchvision.ops import box_convert

from config import USUAL_LEVELS, StageConfig
from layers.matcher import match_priors
from layers.prior_box import prior_boxes
from tests.layers.test_matcher import batch_of, match_one_image
from tests.utils.evaluation.test_wider_eval import reference_evaluation
from tests.utils.test_nms import reference_nms
from utils.boxes import decode_boxes, decode_landmarks, encode_boxes, encode_landmarks
from utils.datasets.label_file import read_labels, write_labels
from utils.datasets.labels import FaceRow, labelled_image
from utils.datasets.transforms import Sample, crop, mirror
from utils.evaluation.wider_eval import SUBSETS, GroundTruth, evaluate
from utils.nms import pixel_nms
from utils.results.masks import head_region
from utils.runtime.distributed import DistributedContext, shard_positions
from utils.structures import Detections, Faces

# The same examples in every run.
repeatable = settings(derandomize=True, deadline=None, max_examples=40, database=None)
sizes_hw = st.tuples(st.integers(1, 200), st.integers(1, 200))
variances = st.tuples(st.floats(0.05, 1), st.floats(0.05, 1))


@st.composite
def faces_of(draw: st.DrawFn, largest: int = 8, integer_boxes: bool = False) -> Faces:
    """Faces of positive area, some with landmarks, some ignored; maybe none."""
    count = draw(st.integers(0, largest))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    corners, sides = rng.uniform(-50, 300, (count, 2)), rng.uniform(0.5, 200, (count, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1)
    boxes = (np.rint(boxes) + np.array([0, 0, 1, 1]) if integer_boxes else boxes).astype(np.float32)
    known, ignored = rng.random(count) < 0.5, rng.random(count) < 0.3
    landmarks = (rng.uniform(0, 300, (count, 5, 2)) * known[:, None, None]).astype(np.float32)
    return Faces(boxes, landmarks, known, ignored)


@st.composite
def boxes_of(draw: st.DrawFn, largest: int = 12) -> Tensor:
    """(N, 4) xyxy within a unit square; on a coarse grid, so that some are equal or touch."""
    corners = draw(arrays(np.int64, st.tuples(st.integers(1, largest), st.just(4)), elements=st.integers(0, 15)))
    low, high = np.minimum(corners[:, :2], corners[:, 2:]), np.maximum(corners[:, :2], corners[:, 2:]) + 1
    return torch.from_numpy(np.concatenate([low, high], axis=1) / 16).float()


# --------------------------------------------------------------------------------------- boxes and landmarks


@repeatable
@given(boxes_of(), sizes_hw, variances, st.sampled_from(sorted(USUAL_LEVELS)), st.data())
def test_decoding_inverts_encoding(
    boxes: Tensor, size_hw: tuple[int, int], variances: tuple[float, float], num_anchor: int, data: st.DataObject
) -> None:
    """For priors of every level."""
    priors = prior_boxes(size_hw, USUAL_LEVELS[num_anchor])
    chosen = data.draw(st.lists(st.integers(0, len(priors) - 1), min_size=len(boxes), max_size=len(boxes)))
    priors = priors[chosen].double()
    decoded = decode_boxes(encode_boxes(boxes.double(), priors, variances), priors, variances)
    assert torch.allclose(decoded, boxes.double(), atol=1e-9)
    points = boxes.double().repeat(1, 3)[:, :10].unflatten(1, (5, 2))
    decoded = decode_landmarks(encode_landmarks(points, priors, variances), priors, variances)
    assert torch.allclose(decoded, points, atol=1e-9)


@repeatable
@given(faces_of(), st.integers(1, 400))
def test_mirroring_inverts_itself(faces: Faces, width: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, width, 3), dtype=np.uint8)
    once = mirror(Sample(image, faces))
    twice = mirror(once)
    assert np.array_equal(twice.image, image)
    assert np.allclose(twice.faces.boxes, faces.boxes, atol=1e-3)
    assert np.allclose(twice.faces.landmarks[faces.has_landmarks], faces.landmarks[faces.has_landmarks], atol=1e-3)
    assert (once.faces.boxes[:, 2:] > once.faces.boxes[:, :2]).all()
    found = Detections(torch.from_numpy(faces.boxes), torch.ones(len(faces)), torch.from_numpy(faces.landmarks))
    again = found.mirrored(width).mirrored(width)
    assert torch.allclose(again.boxes, found.boxes, atol=1e-3)
    assert again.landmarks is not None
    assert found.landmarks is not None
    assert torch.allclose(again.landmarks, found.landmarks, atol=1e-3)


@repeatable
@given(faces_of(), st.floats(0.01, 100))
def test_scaling_back_restores_the_faces(faces: Faces, factor: float) -> None:
    back = faces.scaled(factor).scaled(1 / factor)
    assert np.allclose(back.boxes, faces.boxes, rtol=1e-5, atol=1e-4)
    assert np.allclose(back.landmarks, faces.landmarks, rtol=1e-5, atol=1e-4)


@repeatable
@given(
    faces_of(),
    sizes_hw,
    st.tuples(st.integers(-60, 250), st.integers(-60, 250), st.integers(1, 99), st.integers(1, 99)),
)
def test_crop_has_its_size_and_faces_within_it(
    faces: Faces, size_hw: tuple[int, int], region: tuple[int, int, int, int]
) -> None:
    image = np.random.default_rng(0).integers(1, 256, (*size_hw, 3), dtype=np.uint8)
    x, y, width, height = region
    cut = crop(Sample(image, faces), region)
    assert cut.image.shape == (height, width, 3)
    padded = np.pad(image, ((400, 400), (400, 400), (0, 0)))
    assert np.array_equal(cut.image, padded[400 + y : 400 + y + height, 400 + x : 400 + x + width])
    assert (cut.faces.boxes >= 0).all()
    assert (cut.faces.boxes[:, 2:] <= (width, height)).all()
    assert (cut.faces.boxes[:, 2:] > cut.faces.boxes[:, :2]).all()


# ----------------------------------------------------------------------------------- matching and suppression


@repeatable
@given(
    boxes_of(), st.data(), st.sampled_from([StageConfig(0.35), StageConfig(0.5, negative_iou=0.4, force_match=False)])
)
def test_matcher_equals_the_reference_loops(boxes: Tensor, data: st.DataObject, stage: StageConfig) -> None:
    priors = box_convert(torch.cat([data.draw(boxes_of()), boxes[::2] * 0.97]), "xyxy", "cxcywh")
    ignored = data.draw(st.lists(st.booleans(), min_size=len(boxes), max_size=len(boxes)))
    found = match_priors(batch_of(boxes.tolist(), ignored=[ignored]), priors, stage)[0]
    assert found.tolist() == match_one_image(boxes, torch.tensor(ignored), priors, stage).tolist()


@repeatable
@given(boxes_of(largest=25), st.floats(0.05, 0.95))
def test_pixel_nms_equals_the_reference_loop(boxes: Tensor, threshold: float) -> None:
    boxes = (boxes * 64).round()
    scores = torch.rand(len(boxes), generator=torch.Generator().manual_seed(len(boxes)))
    kept = pixel_nms(boxes, scores, threshold)
    assert kept.tolist() == reference_nms(boxes, scores, threshold)


# ----------------------------------------------------------------------------------------------------- labels


@repeatable
@given(st.lists(faces_of(), min_size=1, max_size=4))
def test_reading_labels_inverts_writing(faces: list[Faces]) -> None:
    """Ignored faces have no landmarks in the file; one large face keeps the boxes from seeming normalised."""
    images = []
    for number, each in enumerate(faces):
        landmarks = [points.tolist() if known and not ignored else None for points, known, ignored in _rows(each)]
        rows = [
            FaceRow(box, points, bool(ignored))
            for box, points, ignored in zip(each.boxes.tolist(), landmarks, each.ignored, strict=True)
        ]
        large = FaceRow([0, 0, 300, 300])
        images.append(labelled_image(Path(f"images/a b{number}.jpg"), [large, *rows]))
    with TemporaryDirectory() as folder:
        write_labels(Path(folder) / "label.txt", images, Path("images"))
        again = read_labels(Path(folder) / "label.txt", Path("images"))
    for one, other in zip(images, again, strict=True):
        assert one.path == other.path
        for name, values in vars(one.faces).items():
            assert np.allclose(values, getattr(other.faces, name), rtol=1e-6, atol=1e-4), name


def _rows(faces: Faces) -> list[tuple[np.ndarray, bool, bool]]:
    return list(zip(faces.landmarks, faces.has_landmarks.tolist(), faces.ignored.tolist(), strict=True))


# ------------------------------------------------------------------------------------------------- evaluation


@settings(repeatable, max_examples=15)
@given(
    st.lists(faces_of(largest=4, integer_boxes=True), min_size=1, max_size=4), st.integers(0, 2**32), st.integers(0, 2)
)
def test_ap_equals_the_reference_loops(images: list[Faces], seed: int, decimals: int) -> None:
    rng, truths, predictions = np.random.default_rng(seed), [], {}
    for number, faces in enumerate(images):
        boxes = np.concatenate([faces.boxes[:, :2], faces.boxes[:, 2:] - faces.boxes[:, :2]], axis=1).astype(float)
        subsets = {subset: rng.random(len(boxes)) < 0.7 for subset in SUBSETS}
        truths.append(GroundTruth(f"event/{number}", boxes, subsets))
        near = np.concatenate([np.repeat(boxes, 2, axis=0), rng.uniform(1, 99, (2, 4))]) + rng.normal(
            0, 3, (2 * len(boxes) + 2, 4)
        )
        predictions[f"event/{number}"] = np.concatenate([near, rng.random((len(near), 1)).round(decimals)], axis=1)
    scores = np.concatenate([rows[:, 4] for rows in predictions.values()])
    found = evaluate(predictions, truths).average_precisions
    for subset in SUBSETS:
        if scores.min() < scores.max() and any(truth.subsets[subset].any() for truth in truths):
            assert found[subset] == pytest.approx(reference_evaluation(predictions, truths, subset), abs=1e-12)


# ----------------------------------------------------------------------------------------- shards and masks


@repeatable
@given(st.integers(0, 100), st.integers(1, 9), st.integers(1, 9), st.data())
def test_shards_cover_every_missing_image_once(count: int, block: int, processes: int, data: st.DataObject) -> None:
    done = data.draw(st.sets(st.integers(0, count - 1)) if count else st.just(set[int]()))
    shards = [
        shard_positions(count, np.array(sorted(done), int), block, DistributedContext(rank, processes))
        for rank in range(processes)
    ]
    together = [position for shard in shards for position in shard]
    assert len(together) == len(set(together))
    assert set(range(count)) - done <= set(together)
    assert {position // block for position in together} == {position // block for position in set(range(count)) - done}
    assert all(shard == sorted(shard) for shard in shards)


@settings(repeatable, max_examples=200)
@given(sizes_hw, st.tuples(*[st.integers(-250, 450)] * 2), st.tuples(*[st.integers(1, 120)] * 2))
def test_head_region_lies_in_the_image_and_contains_the_face(
    size_hw: tuple[int, int], corner: tuple[int, int], sides: tuple[int, int]
) -> None:
    """At every border: the face box in the head region marks the same pixels as the face in the image."""
    height, width = size_hw
    x, y = corner
    head, face = head_region(np.array([x, y, x + sides[0], y + sides[1]]), size_hw)
    for (x1, y1, x2, y2), across, down in ((head, width, height), (face, head[2] - head[0], head[3] - head[1])):
        assert 0 <= x1 <= x2 <= across
        assert 0 <= y1 <= y2 <= down
    canvas = np.zeros(size_hw, bool)
    canvas[head[1] : head[3], head[0] : head[2]][face[1] : face[3], face[0] : face[2]] = True
    expected = np.zeros(size_hw, bool)
    expected[max(0, y) : max(0, y + sides[1]), max(0, x) : max(0, x + sides[0])] = True
    assert np.array_equal(canvas, expected)
