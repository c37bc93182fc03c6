"""Agreement with the CPU, speed and memory on a CUDA device, as tables in Markdown: python -m benchmarks.gpu."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import torch
from torchvision.ops import box_iou

from config import DATA, EXPERIMENTS, ComputeOptions, LossConfig, RunOptions
from layers.multibox_loss import MultiBoxLoss
from models.checkpoint import load_checkpoint
from models.detector import FaceDetector
from models.initialise import load_model
from utils.errors import ConfigError
from utils.options import parse_flags
from utils.runtime.cli import choose_device, run
from utils.structures import Faces, FaceTargets

_SIDE = 640
_BATCH_SIZES = (1, 8, 32)
_REPEATS = 20


def main(argv: Sequence[str] | None = None) -> None:
    device = choose_device(parse_flags(__doc__ or "", (RunOptions(),), argv).apply(RunOptions()).gpu_num)
    if device.type != "cuda":
        raise ConfigError("no CUDA device was found; this check needs one")
    print(f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}, images of {_SIDE}x{_SIDE}\n")
    images = [cv2.imread(str(path)) for path in sorted((DATA / "sample_widerface/images").glob("*.jpg"))]
    checkpoints = sorted(EXPERIMENTS.glob("*/ckpt/*ckpt-best.pth"))
    print("| checkpoint | faces, CPU and CUDA | largest difference, px | of scores |\n| --- | --- | --- | --- |")
    for path in checkpoints:
        print(compare_with_cpu(path, device, images), flush=True)
    print("\n| checkpoint | batch | 16 bits | inference, images/s | MiB | training, images/s | MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path, batch_size, amp in product(checkpoints, _BATCH_SIZES, (False, True)):
        print(measure_speed(path, device, batch_size, amp), flush=True)
    print("\n| checkpoint | inference by one process, images/s | by two on the same device |\n| --- | --- | --- |")
    for path in checkpoints:
        rates = [processes_rate(path, device, count) for count in (1, 2)]
        print(f"| {path.parent.parent.name} | {rates[0]:.0f} | {rates[1]:.0f} |", flush=True)


def compare_with_cpu(path: Path, device: torch.device, images: Sequence[np.ndarray]) -> str:
    """Compare the detections on the CPU and on the device; returns a row of the table."""
    on_cpu, on_device = (FaceDetector.from_checkpoint(path, place) for place in ("cpu", device))
    counts, distances, differences = [0, 0], [0.0], [0.0]
    for image in images:
        expected, found = on_cpu.detect(image), on_device.detect(image)
        counts = [counts[0] + len(expected), counts[1] + len(found)]
        if len(expected) and len(found):
            nearest = box_iou(expected.boxes, found.boxes).argmax(dim=1)  # the order of equal scores may differ
            distances.append(float((expected.boxes - found.boxes[nearest]).abs().max()))
            differences.append(float((expected.scores - found.scores[nearest]).abs().max()))
    name = path.parent.parent.name
    return f"| {name} | {counts[0]}, {counts[1]} | {max(distances):.4f} | {max(differences):.6f} |"


def measure_speed(path: Path, device: torch.device, batch_size: int, amp: bool) -> str:
    """Measure images per second, with post-processing and optimiser steps, and peak memory; returns a row."""
    rng = np.random.default_rng(0)
    torch.cuda.reset_peak_memory_stats(device)
    detection_rate = inference_rate(path, device, batch_size, amp)
    detection_peak = torch.cuda.max_memory_allocated(device) / 2**20
    model = load_model(load_checkpoint(path)).to(device).train()
    loss, optimizer = MultiBoxLoss(LossConfig(), model.model_config), torch.optim.SGD(model.parameters(), lr=1e-6)
    corners = rng.uniform(0, 600, (10, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(8, 40, (10, 1))], axis=1).astype(np.float32)
    absent = np.zeros(10, bool)
    faces = FaceTargets.from_faces(Faces(boxes, np.zeros((10, 5, 2), np.float32), absent, absent), (_SIDE, _SIDE))
    targets = FaceTargets.join([faces] * batch_size).to(device)
    pixels = torch.rand(batch_size, 3, _SIDE, _SIDE, device=device) * 255

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            outputs = model(pixels)
        torch.stack(list(loss(outputs, targets, (_SIDE, _SIDE)).values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats(device)
    training = seconds_per_call(step)
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    figures = f"{detection_rate:.0f} | {detection_peak:.0f} | {batch_size / training:.0f} | {peak:.0f}"
    return f"| {path.parent.parent.name} | {batch_size} | {'yes' if amp else 'no'} | {figures} |"


def inference_rate(path: Path, device: torch.device, batch_size: int = 8, amp: bool = False) -> float:
    """Return images per second of detection in batches of random images."""
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, _SIDE, _SIDE, 3), dtype=np.uint8)
    detector = FaceDetector.from_checkpoint(path, device, ComputeOptions(backend="torch", amp=amp))
    return batch_size / seconds_per_call(lambda: detector.detect_batch(list(pixels)))


def processes_rate(path: Path, device: torch.device, count: int) -> float:
    """Return the total images per second of several processes that detect on the same device."""
    with multiprocessing.get_context("spawn").Pool(count) as pool:
        return sum(pool.map(partial(inference_rate, path), [device] * count, chunksize=1))


def seconds_per_call(call: Callable[[], object]) -> float:
    """Return the mean time of a call, after three warm-up calls."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_REPEATS):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / _REPEATS


if __name__ == "__main__":
    run(main)
