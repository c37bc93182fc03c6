"""Training steps per second, and those of biubug6/Pytorch_Retinaface: python -m benchmarks.training --dataset=FOLDER.

The reference loop is reimplemented with the types of this project: augmentation on float images, matching image by
image, mining over the whole batch, the model in PyTorch's default layout. Model, batch and images are the same for
both, data loading is included, and the two take turns.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import chain, cycle, islice
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.ops import box_convert, box_iou

from config import DataConfig, ExperimentConfig, TrainConfig
from engine.training import Trainer
from engine.training_state import TrainingData
from layers.prior_box import prior_boxes
from models.architecture import usual_config
from models.retinaface import RetinaFace
from utils.boxes import encode_boxes, encode_landmarks
from utils.datasets.folders import read_split
from utils.datasets.labels import LabelledImage
from utils.runtime.cli import run
from utils.runtime.experiment import Experiment
from utils.runtime.logger import RunLog

MODEL = usual_config("mobilenet0.25", num_anchor=2, cascade=False, model_version="retina")
_MEAN = np.array(MODEL.pixel_mean, np.float32)


class SpeedLog(RunLog):
    """Records the speed of each epoch."""

    def __init__(self) -> None:
        super().__init__(None)
        self.images_per_second: list[float] = []

    def epoch(self, epoch: int, metrics: Mapping[str, float], images_per_second: float) -> None:
        self.images_per_second.append(images_per_second)


def our_images_per_second(images: Sequence[LabelledImage], side: int, batch_size: int, workers: int) -> float:
    """Measure the speed of our loop in the second of two epochs."""
    config = ExperimentConfig(
        model=MODEL,
        data=DataConfig(im_size=side, mosaic_probability=0, num_workers=workers),  # as in the reference
        train=TrainConfig(epochs=2, batch_size=batch_size, learning_rate=1e-3, save_minutes=0),
    )
    speed = SpeedLog()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Trainer(RetinaFace(MODEL), config, Experiment(Path(folder)), TrainingData(images), speed).fit()
    return speed.images_per_second[-1]


# ------------------------------------------------------------------------------------- the loop of the reference


class ReferenceDataset(Dataset[tuple[Tensor, np.ndarray]]):
    """Crops as the reference makes them: (3, S, S) float32 without the mean, and (N, 15) normalised faces."""

    def __init__(self, images: Sequence[LabelledImage], side: int) -> None:
        self.images = images
        self.side = side

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, np.ndarray]:
        labelled = self.images[index]
        image = cv2.imread(str(labelled.path))
        known = np.where(labelled.faces.has_landmarks, 1.0, -1.0)[:, None]
        points = labelled.faces.landmarks.reshape(-1, 10)
        faces = np.concatenate([labelled.faces.boxes, points, known], axis=1).astype(np.float32)
        image, faces = _crop(image, faces, self.side)
        image = _distort(image)
        height, width = image.shape[:2]
        longest = max(height, width)
        square = np.empty((longest, longest, 3), image.dtype)
        square[:] = _MEAN
        square[:height, :width] = image
        if np.random.randint(2):
            square = square[:, ::-1]
            faces[:, [0, 2]] = longest - faces[:, [2, 0]]
            faces[:, 4:14:2] = longest - faces[:, 4:14:2]
        faces[:, :14] /= longest
        pixels = cv2.resize(square, (self.side, self.side), interpolation=int(np.random.randint(5))).astype(np.float32)
        pixels -= _MEAN
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))), faces


def _crop(image: np.ndarray, faces: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Crop a random square that contains the centre of a face that is large enough in it."""
    height, width = image.shape[:2]
    for _ in range(250):
        length = int(np.random.choice([0.3, 0.45, 0.6, 0.8, 1.0]) * min(height, width))
        left = np.random.randint(width - length + 1)
        top = np.random.randint(height - length + 1)
        centres = (faces[:, :2] + faces[:, 2:4]) / 2 - (left, top)
        inside = ((centres > 0) & (centres < length)).all(axis=1)
        kept = faces[inside].copy()
        kept[:, :4] = np.clip(kept[:, :4] - np.tile([left, top], 2), 0, length)
        kept[:, 4:14] -= np.tile([left, top], 5)
        sizes = (kept[:, 2:4] - kept[:, :2]) / length * side
        kept = kept[sizes.min(axis=1, initial=np.inf) > 0] if len(kept) == 0 else kept[sizes.min(axis=1) > 0]
        if len(kept):
            return image[top : top + length, left : left + length], kept
    return image, faces.copy()


def _distort(image: np.ndarray) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, each with probability 0.5, on float copies."""

    def change(part: np.ndarray, factor: float = 1.0, offset: float = 0.0) -> None:
        values = part.astype(np.float32) * factor + offset
        part[:] = np.clip(values, 0, 255)

    image = image.copy()
    if np.random.randint(2):
        change(image, offset=np.random.uniform(-32, 32))
    if np.random.randint(2):
        change(image, factor=np.random.uniform(0.5, 1.5))
    image = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
    if np.random.randint(2):
        change(image[:, :, 1], factor=np.random.uniform(0.5, 1.5))
    if np.random.randint(2):
        image[:, :, 0] = (image[:, :, 0].astype(int) + np.random.randint(-18, 18)) % 180
    return cv2.cvtColor(image, cv2.COLOR_HSV2BGR)


def _collate(items: Sequence[tuple[Tensor, np.ndarray]]) -> tuple[Tensor, list[Tensor]]:
    return torch.stack([image for image, _ in items]), [torch.from_numpy(faces) for _, faces in items]


def reference_loss(boxes: Tensor, logits: Tensor, landmarks: Tensor, targets: Sequence[Tensor], side: int) -> Tensor:
    """Compute the multibox loss, matching in a loop over the images."""
    priors = prior_boxes((side, side), MODEL.levels)
    corners = box_convert(priors, "cxcywh", "xyxy")
    labels = torch.zeros(logits.shape[:2], dtype=torch.long)
    box_targets, landmark_targets = torch.zeros_like(boxes), torch.zeros_like(landmarks)
    for number, faces in enumerate(targets):
        overlaps = box_iou(faces[:, :4], corners)
        best_overlap, best_face = overlaps.max(0)
        face_overlap, face_prior = overlaps.max(1)
        reachable = face_prior[face_overlap >= 0.2]
        best_overlap[reachable] = 2
        for face in range(len(face_prior)):
            best_face[face_prior[face]] = face
        matched = faces[best_face]
        labels[number] = matched[:, 14].long()
        labels[number][best_overlap < 0.35] = 0
        box_targets[number] = encode_boxes(matched[:, :4], priors, MODEL.variances)
        points = matched[:, 4:14].reshape(-1, 5, 2)
        landmark_targets[number] = encode_landmarks(points, priors, MODEL.variances)
    known, positive = labels > 0, labels != 0
    landmark_loss = F.smooth_l1_loss(landmarks[known], landmark_targets[known], reduction="sum") / known.sum().clamp(
        min=1
    )
    box_loss = F.smooth_l1_loss(boxes[positive], box_targets[positive], reduction="sum")
    flat = logits.view(-1, 2)
    losses = torch.logsumexp(flat, 1, keepdim=True) - flat.gather(1, positive.long().view(-1, 1))
    losses[positive.view(-1, 1)] = 0
    _, order = losses.view(len(labels), -1).sort(1, descending=True)
    _, rank = order.sort(1)
    negative = rank < torch.clamp(7 * positive.sum(1, keepdim=True), max=positive.size(1) - 1)
    chosen = positive | negative
    class_loss = F.cross_entropy(logits[chosen], positive.long()[chosen], reduction="sum")
    count = positive.sum().clamp(min=1)
    return 2 * box_loss / count + class_loss / count + landmark_loss


def reference_images_per_second(images: Sequence[LabelledImage], side: int, batch_size: int, workers: int) -> float:
    """Measure the speed of the reference loop over one epoch, including the start of its loader."""
    torch.manual_seed(0)
    model = RetinaFace(MODEL).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    dataset = ReferenceDataset(images, side)
    loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, collate_fn=_collate, drop_last=True)
    start = time.perf_counter()
    for pixels, targets in loader:
        (output,) = model(pixels)
        optimizer.zero_grad()
        assert output.landmark_deltas is not None
        reference_loss(output.box_deltas, output.class_logits, output.landmark_deltas, targets, side).backward()
        optimizer.step()
    return len(loader) * batch_size / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="folder with train/images and train/label.txt")
    parser.add_argument("--sides", type=int, nargs="+", default=[320, 640], help="crop sides (default: 320 640)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12, help="batches per measurement (default: 12)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="measurements of which the median is shown (default: 3)")
    arguments = parser.parse_args()
    images = [image for image in chain.from_iterable(read_split([arguments.dataset], "train")) if len(image.faces)]
    images = list(islice(cycle(images), arguments.steps * arguments.batch_size))
    print(f"{'side':>6}{'ours, batches/s':>18}{'reference, batches/s':>23}{'ratio':>8}")
    for side in arguments.sides:
        rates: list[tuple[float, float]] = []
        for _ in range(arguments.repeats):
            settings = (images, side, arguments.batch_size, arguments.workers)
            rates.append((our_images_per_second(*settings), reference_images_per_second(*settings)))
        ours, reference = (statistics.median(rate) / arguments.batch_size for rate in zip(*rates, strict=True))
        print(f"{side:>6}{ours:>18.2f}{reference:>23.2f}{ours / reference:>8.2f}", flush=True)


if __name__ == "__main__":
    run(main)
