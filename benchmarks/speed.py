"""Images per second, stage by stage and end to end: python -m benchmarks.speed --images=FOLDER.

Our pipeline is compared with `reference_detect`, a literal reimplementation of biubug6/Pytorch_Retinaface's pipeline
with the same weights: the model in PyTorch's default layout with its batch normalisation, priors by nested loops for
each image, all boxes decoded, suppression box by box in NumPy, at most 5,000 candidates and 750 faces. All pipelines
read the same files and write the same text. The pipelines of a table take turns; each figure is a median.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch

from benchmarks.scaling import measure
from config import DEFAULT_EXPERIMENT, EXPERIMENTS, ROOT, ComputeOptions, LevelConfig, PostprocessConfig
from engine.evaluation import predict_files
from layers.postprocess import postprocess
from models.architecture import usual_config
from models.backend import TorchBackend
from models.checkpoint import load_checkpoint
from models.detector import FaceDetector
from models.initialise import load_model
from models.onnx_graph import missing_onnx_packages
from models.retinaface import RetinaFace
from utils.drawing import draw_detections
from utils.errors import UserError
from utils.evaluation.predictions import write_predictions
from utils.results.masks import HeadSegmenter
from utils.runtime.cli import run
from utils.runtime.images import IMAGE_SUFFIXES, read_image, write_image

# The thresholds with which both projects are evaluated.
_DETECTION = PostprocessConfig(confidence_threshold=0.02, nms_threshold=0.4)
_CANDIDATES, _FACES = 5000, 750
_SIDE = 640  # side of the image for ResNet-50

Contenders = Mapping[str, Callable[[], object]]


# ------------------------------------------------------------------------------------ the pipeline of the reference


@torch.no_grad()
def reference_detect(model: RetinaFace, image: np.ndarray) -> np.ndarray:
    """Detect faces as the reference does; returns (N, 5) x1, y1, x2, y2, score."""
    config = model.model_config
    height, width = image.shape[:2]
    pixels = image.astype(np.float32) - np.array(config.pixel_mean, np.float32)
    tensor = torch.from_numpy(pixels.transpose(2, 0, 1)).unsqueeze(0)
    output = model(tensor + model.pixel_mean)[-1]  # because our model subtracts the mean again

    priors = torch.tensor(_priors_by_loops(model.levels, height, width)).view(-1, 4)
    deltas, (centre, size) = output.box_deltas[0], config.variances
    boxes = torch.cat(
        (priors[:, :2] + deltas[:, :2] * centre * priors[:, 2:], priors[:, 2:] * torch.exp(deltas[:, 2:] * size)), 1
    )
    boxes[:, :2] -= boxes[:, 2:] / 2
    boxes[:, 2:] += boxes[:, :2]
    corners = (boxes * torch.tensor([width, height, width, height])).numpy()
    scores = output.class_logits[0].softmax(dim=-1)[:, 1].numpy()
    points = np.empty(0)
    if output.landmark_deltas is not None:
        offsets = output.landmark_deltas[0]
        decoded = [priors[:, :2] + offsets[:, i : i + 2] * centre * priors[:, 2:] for i in range(0, 10, 2)]
        points = (torch.cat(decoded, dim=1) * torch.tensor([width, height] * 5)).numpy()

    above = np.where(scores > _DETECTION.confidence_threshold)[0]
    order = above[scores[above].argsort()[::-1][:_CANDIDATES]]
    candidates = np.hstack((corners[order], scores[order, None])).astype(np.float32)
    points = points[order] if len(points) else points
    kept = _suppress_one_by_one(candidates, _DETECTION.nms_threshold)
    return candidates[kept][:_FACES]


def _priors_by_loops(levels: Sequence[LevelConfig], height: int, width: int) -> list[float]:
    anchors: list[float] = []
    for level in levels:
        stride = level.stride
        for row, column in product(range(math.ceil(height / stride)), range(math.ceil(width / stride))):
            for side in level.anchor_sizes:
                anchors += [(column + 0.5) * stride / width, (row + 0.5) * stride / height, side / width, side / height]
    return anchors


def _suppress_one_by_one(boxes: np.ndarray, threshold: float) -> list[int]:
    x1, y1, x2, y2, scores = boxes.T
    areas = (x2 - x1 + 1) * (y2 - y1 + 1)
    order = scores.argsort()[::-1]
    kept = []
    while order.size > 0:
        best, others = order[0], order[1:]
        kept.append(int(best))
        width = np.maximum(0, np.minimum(x2[best], x2[others]) - np.maximum(x1[best], x1[others]) + 1)
        height = np.maximum(0, np.minimum(y2[best], y2[others]) - np.maximum(y1[best], y1[others]) + 1)
        overlap = width * height / (areas[best] + areas[others] - width * height)
        order = others[overlap <= threshold]
    return kept


def reference_run(model: RetinaFace, files: Sequence[tuple[str, Path]], folder: Path) -> None:
    for name, path in files:
        _write(folder, name, reference_detect(model, cv2.imread(str(path))))


# ------------------------------------------------------------------------------------------- pipelines and steps


def our_run(detector: FaceDetector, files: Sequence[tuple[str, Path]], folder: Path) -> None:
    for _ in predict_files(detector, files, folder, integer_boxes=False):
        pass


def yunet_run(model: Path, files: Sequence[tuple[str, Path]], folder: Path) -> None:
    """OpenCV's YuNet, a smaller model, with the same thresholds."""
    try:
        detector = cv2.FaceDetectorYN.create(
            str(model), "", (320, 320), _DETECTION.confidence_threshold, _DETECTION.nms_threshold, _CANDIDATES
        )
    except cv2.error as error:
        raise UserError(f"--yunet {model}: OpenCV cannot read it ({error.err})") from None
    for name, path in files:
        image = cv2.imread(str(path))
        detector.setInputSize((image.shape[1], image.shape[0]))
        faces = detector.detect(image)[1]
        boxes: np.ndarray = np.empty((0, 5)) if faces is None else faces[:, [0, 1, 2, 3, 14]]
        boxes[:, 2:4] += boxes[:, :2]
        _write(folder, name, boxes)


def _write(folder: Path, name: str, boxes: np.ndarray) -> None:
    rows = boxes.astype(np.float64)
    rows[:, 2:4] -= rows[:, :2]
    write_predictions(folder, name, rows)


def stages(detectors: Mapping[str, FaceDetector], files: Sequence[tuple[str, Path]], folder: Path) -> Contenders:
    """Return the steps of our pipeline, each to be timed on its own."""
    paths = [path for _, path in files]
    images = [read_image(path) for path in paths]
    tensors = [torch.from_numpy(image)[None] for image in images]
    best = detectors[list(detectors)[-1]]
    outputs = [best.backend(tensor) for tensor in tensors]
    sizes = [(image.shape[0], image.shape[1]) for image in images]
    found = [postprocess(*pair, best.model.model_config, _DETECTION)[0] for pair in zip(outputs, sizes, strict=True)]

    def decode_and_suppress() -> None:
        for pair in zip(outputs, sizes, strict=True):
            postprocess(*pair, best.model.model_config, _DETECTION)

    def draw_and_write() -> None:
        for image, detections in zip(images, found, strict=True):
            write_image(folder / "drawing.jpg", draw_detections(image, detections))

    return {
        "read": lambda: [read_image(path) for path in paths],
        **{
            f"forward, {name}": partial(_call_on_each, detector.backend, tensors)
            for name, detector in detectors.items()
        },
        "decode, suppress": decode_and_suppress,
        "draw, write": draw_and_write,
    }


def _call_on_each(function: Callable[[torch.Tensor], object], tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        function(tensor)


def our_detectors(model: RetinaFace) -> dict[str, FaceDetector]:
    """Return our detector with each backend; the last is the fastest: ONNX Runtime if it is installed."""
    backends = {"eager": "torch", "torch": "torch"} | ({} if missing_onnx_packages() else {"onnx": "onnx"})
    detectors = {
        name: FaceDetector(copy.deepcopy(model), _DETECTION, ComputeOptions(backend, max_pixels=0))
        for name, backend in backends.items()
    }
    detectors["eager"].backend = TorchBackend(detectors["eager"].model, "eager")
    return detectors


# --------------------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def compare(title: str, contenders: Contenders, images: int, repeats: int) -> dict[str, float]:
    """Run the contenders in turns, print their median times, and return them in seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if turn:  # the first turn is a warm-up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"\n{title:<34}{'images/s':>10}{'ms':>9}")
    for name, median in medians.items():
        print(f"{name:<34}{images / median:>10.1f}{1000 * median / images:>9.1f}", flush=True)
    return medians


def find_images(folder: Path, limit: int) -> list[tuple[str, Path]]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[:limit]
    if not paths:
        raise UserError(f"{folder}: holds no image")
    return [(path.relative_to(folder).as_posix(), path) for path in paths]


def measure_pipeline(
    model: RetinaFace, files: Sequence[tuple[str, Path]], yunet: Path | None, repeats: int
) -> FaceDetector:
    """Compare all pipelines; returns the fastest of our detectors."""
    detectors = our_detectors(model)
    best = list(detectors)[-1]
    with TemporaryDirectory() as name:
        folder = Path(name)
        steps = compare("stage", stages(detectors, files, folder), len(files), repeats)
        runs: dict[str, Callable[[], object]] = {
            f"ours, {key}": partial(our_run, detector, files, folder) for key, detector in detectors.items()
        }
        runs["reference pipeline"] = partial(reference_run, copy.deepcopy(model).eval(), files, folder)
        if yunet is not None:
            runs["YuNet (OpenCV)"] = partial(yunet_run, yunet, files, folder)
        totals = compare("end to end, read to text", runs, len(files), repeats)
    ours = totals[f"ours, {best}"]
    print(f"ours takes {ours / steps[f'forward, {best}']:.2f} times the bare model's time")
    print(f"ours is {totals['reference pipeline'] / ours:.2f} times as fast as the reference pipeline")
    return detectors[best]


def measure_masks(detector: FaceDetector, files: Sequence[tuple[str, Path]], repeats: int) -> None:
    """Measure the cost of `--mask` for each face that `inference.py` would find."""
    images = [read_image(path) for _, path in files]
    found = [detector.detect(image) for image in images]
    confident = [faces.boxes[faces.scores > PostprocessConfig.confidence_threshold].numpy() for faces in found]
    with HeadSegmenter() as segmenter:
        for _ in range(repeats):
            for image, boxes in zip(images, confident, strict=True):
                for box in boxes:
                    segmenter.segment(image, box)
        print(f"\nmasks: {segmenter.describe()}")


def measure_memory(files: Sequence[tuple[str, Path]], weights: Path, threads: int) -> None:
    """Measure the peak memory of the command in a separate process."""
    with TemporaryDirectory() as name:
        images = Path(name) / "images.txt"
        images.write_text("".join(f"{path.absolute()}\n" for _, path in files), encoding="utf-8")
        flags = [f"--model_weight={weights.absolute()}", "--experiment_name=bench"]
        peak = measure(images, Path(name) / "out", 1, flags, threads).peak_megabytes
    print(f"peak memory of inference.py: {peak:.0f} MB")


def measure_resnet(repeats: int) -> None:
    """Measure a cascade on ResNet-50 with random weights."""
    torch.manual_seed(0)
    model = RetinaFace(usual_config("resnet50")).eval()
    image = torch.randint(0, 256, (1, _SIDE, _SIDE, 3), dtype=torch.uint8)
    runs: dict[str, Callable[[], object]] = {
        "eager, default layout": partial(copy.deepcopy(model), image.permute(0, 3, 1, 2).contiguous())
    }
    runs |= {name: partial(detector.backend, image) for name, detector in our_detectors(model).items()}
    medians = compare(f"ResNet-50 cascade, {_SIDE}x{_SIDE}", runs, 1, repeats)
    plain, eager, best = medians["eager, default layout"], medians["eager"], min(medians.values())
    print(f"{plain / best:.2f} times as fast as eager in its default layout, {eager / best:.2f} in channels_last")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=ROOT / "data/sample_widerface/images", help="folder of images")
    parser.add_argument("--limit", type=int, default=100, help="maximum number of images (default: 100)")
    parser.add_argument(
        "--model_weight",
        type=Path,
        default=EXPERIMENTS / DEFAULT_EXPERIMENT / "ckpt/mobilenet0.25_ckpt-best.pth",
        help="any supported checkpoint (default: the shipped one)",
    )
    parser.add_argument("--yunet", type=Path, help="OpenCV's face_detection_yunet .onnx, to compare with")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the model")
    parser.add_argument("--repeats", type=int, default=5, help="turns of which the median is shown (default: 5)")
    parser.add_argument("--no_resnet", action="store_true", help="leave the ResNet-50 out, which takes a minute")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cv2.setNumThreads(arguments.threads)
    files = find_images(arguments.images, arguments.limit)
    model = load_model(load_checkpoint(arguments.model_weight)).eval()
    print(f"{len(files)} images, {arguments.model_weight.name}, {arguments.threads} threads, {arguments.repeats} turns")
    best = measure_pipeline(model, files, arguments.yunet, arguments.repeats)
    measure_masks(best, files, arguments.repeats)
    measure_memory(files, arguments.model_weight, arguments.threads)
    if not arguments.no_resnet:
        measure_resnet(arguments.repeats)


if __name__ == "__main__":
    run(main)
