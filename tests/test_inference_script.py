"""Tests of inference.py, run as a user runs it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

import inference
from config import ROOT, ExperimentConfig
from models.architecture import usual_config
from models.checkpoint import save_checkpoint
from models.retinaface import RetinaFace
from tests.scripts import run_process, run_script

SAMPLES = ROOT / "data/sample_widerface/images"
LONG = "x" * 300  # file systems permit 255 bytes
FAST = "--experiment_name=mobilenet0.25_anc2_casT_fpn3"  # the default takes seconds to become an ONNX graph


def infer(*flags: str) -> CompletedProcess[str]:
    return run_script(inference, "--gpu_num=-1", *flags)


def results_of(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the faces by image name."""
    return {entry["name"]: entry["faces"] for entry in json.loads((folder / "results.json").read_text())["images"]}


@pytest.fixture
def mixed_folder(tmp_path: Path) -> Path:
    """One image in several formats, and files that cannot be read."""
    folder = tmp_path / "in"
    folder.mkdir()
    image = Image.open(SAMPLES / "astronaut.jpg")
    data = (SAMPLES / "astronaut.jpg").read_bytes()
    image.save(folder / "two. dots .and spaces.JPEG")
    image.save(folder / "얼굴 é.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.convert("L").save(folder / "grey.tif")
    image.convert("RGBA").save(folder / "alpha.webp")
    cv2.imwrite(str(folder / "sixteen.PNG"), cv2.imread(str(SAMPLES / "astronaut.jpg")).astype(np.uint16) * 257)
    Image.new("RGB", (1, 1)).save(folder / "one_pixel.png")
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "notes.txt").write_text("not meant as an image")
    return folder


def test_unreadable_images_are_named_and_the_rest_is_processed(mixed_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = (f"--inference_dir={mixed_folder}", f"--inference_save_folder={out}", "--save_img")
    result = run_process("inference", "--gpu_num=-1", *flags)
    assert result.returncode == 0, result.stderr
    assert "7 images" in result.stdout
    for name in ("truncated.jpg", "empty.jpg", "text.jpg"):
        assert f"skipped {name}: " in result.stdout
    assert f"skipped {mixed_folder / 'notes.txt'}: its suffix is not that of an image" in result.stdout
    faces = results_of(out)
    assert {name: len(found) for name, found in faces.items()} == {
        "alpha.webp": 1,
        "cmyk.jpg": 1,
        "grey.tif": 1,
        "one_pixel.png": 0,
        "sixteen.PNG": 1,
        "two. dots .and spaces.JPEG": 1,
        "얼굴 é.png": 1,
    }
    assert {path.name for path in (out / "result_images").iterdir()} == set(faces)
    skipped = json.loads((out / "results.json").read_text())["skipped"]
    assert [entry["name"] for entry in skipped] == ["empty.jpg", "text.jpg", "truncated.jpg"]


def test_text_file_has_the_format_of_the_original_project(tmp_path: Path) -> None:
    """The name of an image, then `x1 y1 x2 y2 score` per face, with integer boxes and scores of six decimals."""
    result = infer(FAST, f"--inference_dir={SAMPLES / 'astronaut.jpg'}", f"--inference_save_folder={tmp_path}")
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("*_inference_results.txt")
    name, line = path.read_text().splitlines()
    assert name == "astronaut.jpg"
    *box, score = line.split()
    (face,) = results_of(tmp_path)["astronaut.jpg"]
    np.testing.assert_allclose([float(value) for value in box], face["box"], atol=1.01)
    assert score == f"{face['score']:f}"


def test_batching_does_not_change_the_detections(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    image = cv2.imread(str(SAMPLES / "astronaut.jpg"))[:256, 100:356]
    for number in range(11):
        cv2.imwrite(str(folder / f"{number:02d}.png"), np.roll(image, 7 * number, axis=1))
    cv2.imwrite(str(folder / "05b.png"), image[:200])
    for flag in (True, False):
        result = infer(
            f"--inference_dir={folder}",
            f"--inference_save_folder={tmp_path / str(flag)}",
            f"--infer_imsize_same={flag}",
        )
        assert result.returncode == 0, result.stderr
        assert "im_detect: 10/12" in result.stdout
    batched, single = results_of(tmp_path / "True"), results_of(tmp_path / "False")
    assert list(batched) == list(single)
    for name, faces in batched.items():
        np.testing.assert_allclose([f["box"] for f in faces], [f["box"] for f in single[name]], atol=0.02)


def test_masks_are_written_for_every_face(tmp_path: Path) -> None:
    pytest.importorskip("mediapipe")
    result = infer("--inference_dir=sample_mask/images", f"--inference_save_folder={tmp_path}", "--mask", "--save_mask")
    assert result.returncode == 0, result.stderr
    faces = results_of(tmp_path)
    names = {f"{Path(name).stem}_{index}.png" for name, found in faces.items() for index in range(len(found))}
    assert len(names) >= 4
    for folder in ("masks", "faces", "heads", "head_masks"):
        assert {path.name for path in (tmp_path / folder).iterdir()} == names
    for name in names:
        face, mask = cv2.imread(str(tmp_path / "faces" / name)), cv2.imread(str(tmp_path / "masks" / name), -1)
        assert mask.shape == face.shape[:2]
        assert set(np.unique(mask)) <= {0, 255}
        assert mask.mean() > 200  # nearly all pixels of a face belong to a person


def test_returned_lists_have_an_entry_for_every_image(tmp_path: Path) -> None:
    """An image without faces does not shift the entries after it."""
    pytest.importorskip("mediapipe")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "c.jpg"):
        shutil.copy(SAMPLES / "astronaut.jpg", folder / name)
    Image.new("RGB", (90, 60)).save(folder / "b.png")
    places = [f"--inference_dir={folder}", f"--inference_save_folder={tmp_path / 'out'}"]
    flags = ["--gpu_num=-1", FAST, *places, "--mask"]
    bboxes, face_bboxes, face_masks, head_bboxes, head_masks = inference.inference(flags)
    assert [len(boxes) for boxes in bboxes] == [1, 0, 1]
    assert face_bboxes[1].shape == head_bboxes[1].shape == (0, 4)
    assert face_masks[1] == head_masks[1] == []
    (x1, y1, x2, y2), (left, top, right, bottom) = face_bboxes[0][0], head_bboxes[0][0]
    np.testing.assert_array_equal(bboxes[0][0], [left + x1, top + y1, left + x2, top + y2])
    assert head_masks[0][0].shape == (bottom - top, right - left)
    np.testing.assert_array_equal(face_masks[0][0], head_masks[0][0][y1:y2, x1:x2])


def test_video_is_read_and_written(tmp_path: Path) -> None:
    image = cv2.imread(str(SAMPLES / "astronaut.jpg"))
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (512, 512))
    for shift in range(5):
        writer.write(np.roll(image, 4 * shift, axis=1))
    writer.release()
    flags = (FAST, "--save_img", "--max_frames=3")
    result = infer(f"--inference_dir={tmp_path / 'clip.mp4'}", f"--inference_save_folder={tmp_path / 'out'}", *flags)
    assert result.returncode == 0, result.stderr
    assert [len(found) for found in results_of(tmp_path / "out").values()] == [1, 1, 1]
    drawn = cv2.VideoCapture(str(tmp_path / "out/result_images/clip.mp4"))
    assert int(drawn.get(cv2.CAP_PROP_FRAME_COUNT)) == 3


def test_outputs_are_named_after_a_checkpoint_given_by_path(tmp_path: Path) -> None:
    model_config = usual_config("mobilenet0.25", num_anchor=2)
    weights = tmp_path / "my detector.pth"
    save_checkpoint(weights, ExperimentConfig(model=model_config), RetinaFace(model_config).state_dict())
    result = infer(
        f"--model_weight={weights}",
        f"--inference_dir={SAMPLES / 'astronaut.jpg'}",
        f"--inference_save_folder={tmp_path / 'out'}",
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/my detector_inference_results.txt").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--experiment_name=nowhere"], "no such experiment"),
        (["--model_weight=nowhere.pth"], "no checkpoint named nowhere.pth"),
        (["--num_anchor=3"], "--num_anchor=3"),
        (["--inference_dir=nowhere"], "nowhere"),
        ([f"--model_weight={LONG}"], "cannot be used (File name too long)"),
        ([f"--inference_save_folder={LONG}"], "cannot be used (File name too long)"),
        (["--mask", f"--segmenter_model={LONG}"], "cannot be used (File name too long)"),
        (["--inference_dir={empty}"], "holds no image"),
        (["--inference_save_folder=/proc/results"], "/proc/results"),
    ],
)
def test_user_errors_end_in_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = infer(f"--inference_save_folder={tmp_path / 'out'}", *[flag.format(empty=empty) for flag in flags])
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--confidence_threshold=1.5", "--confidence_threshold must lie in [0, 1], got 1.5"),
        ("--confidence_threshold=x", "invalid float value: 'x'"),
        ("--export=coco,xml", "--export is one of coco, yolo, csv, cvat, labelme, got 'xml'"),
        ("--save_crops=plain,round", "--save_crops is one of plain, aligned, got 'round'"),
        ("--unknown", "unrecognized arguments: --unknown"),
        (f"--experiment_name={LONG}", "--experiment_name is too long"),
        ("--save_mask", "--save_mask needs --mask"),
    ],
)
def test_wrong_flags_exit_with_status_2(flag: str, message: str, tmp_path: Path) -> None:
    result = infer(f"--inference_save_folder={tmp_path / 'out'}", flag)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
