"""The options of one run of a command, which are not part of an experiment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from utils.options import Options, option, require

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = ROOT / "experiments"
DATA = ROOT / "data"
RECIPES = ROOT / "recipes"
DEFAULT_EXPERIMENT = "mobilenet0.25_compact"
_MAX_NAME_BYTES = 200  # files are named after the experiment, and file systems permit 255


@dataclass(frozen=True)
class RunOptions(Options):
    """Device and experiment"""

    gpu_num: int = option(0, "CUDA device; -1 is the CPU. Without CUDA the CPU is used, with a warning")
    experiment_name: str | None = option(
        None, f"folder under experiments/ (default: {DEFAULT_EXPERIMENT}; of train.py: named after the architecture)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gpu_num >= -1, f"--gpu_num is the index of a CUDA device or -1 for the CPU, got {self.gpu_num}")
        name = Path(self.experiment_name or "default")
        require(len(os.fsencode(name)) <= _MAX_NAME_BYTES, "--experiment_name is too long; give a shorter one")
        require(
            bool(name.parts) and not name.anchor and ".." not in name.parts,
            f"--experiment_name={self.experiment_name} leads out of experiments/; give the name of a folder in it",
        )


@dataclass(frozen=True)
class WeightOptions(Options):
    """Checkpoint"""

    model_weight: str = option(
        "ckpt-best.pth", "file in the experiment's ckpt/ or the path of any supported checkpoint"
    )


@dataclass(frozen=True)
class ComputeOptions(Options):
    """How the model is computed; the detections do not depend on it except for rounding and --max_pixels"""

    backend: str = option(
        "auto",
        "what runs the model: torch; compile, which takes up to a minute to start; onnx, ONNX Runtime on the CPU; "
        "auto is onnx on a CPU where it is installed and torch elsewhere",
        choices=("auto", "torch", "compile", "onnx"),
    )
    amp: bool = option(False, "automatic mixed precision, on CUDA; scores change in their third digit")
    max_pixels: int = option(
        2_250_000,
        "larger images are reduced to N pixels for the model; boxes stay in pixels of the original. 0 is no limit: "
        "small faces in large images are then found, but close-ups are missed",
        minimum=0,
    )


# WIDER FACE is evaluated at the original size.
EVALUATION_COMPUTE = ComputeOptions(max_pixels=16_000_000)


@dataclass(frozen=True)
class StartOptions(Options):
    """Where training starts"""

    resume: bool = option(True, "continue from the experiment's ckpt-last where there is one; False starts again")
    recipe: str | None = option(
        None,
        "a published training recipe: the name of a file of recipes/, or of an experiment, whose settings are then "
        "those of its config.json; other flags change it",
    )
    pretrained_backbone: str | None = option(
        None,
        "initial weights of the backbone: a file, torchvision's ImageNet weights (imagenet), or random (none) "
        "(default: imagenet for a ResNet)",
    )
    pretrained_detector: str | None = option(
        None,
        "initial weights from any supported checkpoint, with its architecture, which other flags change. A second "
        "stage that it lacks starts as a copy of the first",
    )
    show_batch: int = option(0, "draw N augmented crops into log/batch.png, and stop", minimum=0)


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """Evaluation"""

    dataset: str = option("widerface/", "folder with val/, a name under data/ or any path")
    gt_dir: str | None = option(
        None, "folder with the official .mat files (default: the dataset's val/gt, or else its label.txt)"
    )
    pred_dir: str | None = option(
        None,
        "evaluate predictions of any detector instead of running one: <event>/<image>.txt with the name of the image, "
        "the number of boxes, and a line `x y width height score` in pixels for each",
    )
    output_dir: str | None = option(
        None,
        "folder for the results (default: results/ of the experiment where --experiment_name is given, else a folder "
        "of its own in test_results/)",
    )
    subset: int = option(
        0,
        "evaluate N images only, those whose file names have the smallest SHA-1; the AP is an estimate. 0 is all",
        minimum=0,
    )
    resume: bool = option(False, "keep the predictions of an interrupted run and process the remaining images")
    bootstrap: int = option(0, "resample the images N times (100 or more) for a standard error of the AP", minimum=0)
    page: bool = option(True, "write index.html, a page of all images with hits, misses and false alarms")
    save_errors: int = option(0, "draw N false positives and N missed faces into errors.png", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.bootstrap != 1, f"--bootstrap is 0, or 2 and more samples, got {self.bootstrap}")


@dataclass(frozen=True)
class InferenceOptions(Options):
    """Inference"""

    inference_dir: str = option(
        "sample_widerface/images/",
        "folder (a name under data/ or any path), image, pattern such as 'photos/*.jpg', .txt with one path per line, "
        "video, or index of a camera",
    )
    inference_save_folder: str = option("inference_results", "folder for the results")
    infer_imsize_same: bool = option(True, "batch images of the same size; never changes the result")
    save_img: bool = option(False, "write images with the detections drawn")
    mask: bool = option(False, "segment the head of every face")
    save_mask: bool = option(False, "write masks and crops; needs --mask")
    segmenter_model: str | None = option(None, "a .tflite file for --mask (default: the one in mediapipe)")
    page: bool = option(True, "write index.html, a page of all images with their faces, and its thumbnails")
    export: tuple[str, ...] = option(
        (),
        "annotations for other tools, comma-separated: coco, yolo, csv, cvat, labelme",
        choices=("coco", "yolo", "csv", "cvat", "labelme"),
    )
    save_crops: tuple[str, ...] = option(
        (),
        "write a crop of every face: plain, with a margin, or aligned as face recognition expects it, or plain,aligned",
        choices=("plain", "aligned"),
    )
    crop_size: int = option(112, "side of aligned crops in pixels", minimum=1, maximum=4096)
    crop_margin: float = option(0.25, "margin around plain crops, relative to the longer side of the face", minimum=0)
    anonymize: str | None = option(
        None,
        "write images or the video with every face made unrecognisable; shaped by the person with --mask",
        choices=("blur", "pixelate", "solid"),
    )
    track: bool = option(False, "give every face of a video an id that it keeps over the frames")
    max_frames: int = option(0, "stop a video or camera after N frames; 0 is no limit", minimum=0)
    resume: bool = option(False, "keep the results of an interrupted run and process the remaining images")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mask or not self.save_mask, "--save_mask needs --mask: add it, or drop --save_mask")
        require(self.mask or not self.segmenter_model, "--segmenter_model needs --mask: add it, or drop the model")
        revealing = "--save_mask" if self.save_mask else "--save_crops" if self.save_crops else ""
        require(
            not (self.anonymize and revealing), f"{revealing} writes recognisable faces; drop it, or drop --anonymize"
        )


@dataclass(frozen=True)
class ExportOptions(Options):
    """Export"""

    output: str = option("detector.onnx", "file to write; an existing one is replaced")
    with_nms: bool = option(False, "decode and suppress within the file, with the thresholds given here")
    max_pixels: int = option(
        ComputeOptions.max_pixels,
        "larger images are reduced to N pixels within the file with --with_nms, and have to be by the caller without; "
        "0 is no limit",
        minimum=0,
    )
