"""Tests of the optional outputs of inference.py: page, exports, crops, and anonymised images and videos."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import cv2
import numpy as np
import pytest

import inference
from config import ROOT
from tests.browser import Browser
from tests.scripts import run_script
from utils.datasets.formats.registry import FORMATS

SAMPLES = ROOT / "data/sample_widerface/images"
FAST = "mobilenet0.25_anc2_casT_fpn3"
HOSTILE_NAME = "<img src=x onerror=alert(1)>.jpg"


def infer(*flags: object) -> CompletedProcess[str]:
    return run_script(inference, "--gpu_num=-1", f"--experiment_name={FAST}", *flags)


def entries(out: Path) -> dict[str, dict[str, Any]]:
    return {entry["name"]: entry for entry in json.loads((out / "results.json").read_text())["images"]}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    shutil.copy(SAMPLES / "astronaut.jpg", folder / HOSTILE_NAME)
    (folder / "50% #1").mkdir()
    shutil.copy(SAMPLES / "gray_pair.jpg", folder / "50% #1/two faces?.jpg")
    (folder / "empty.jpg").touch()
    return folder


@pytest.fixture(scope="module")
def out(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a run with all outputs."""
    folder = tmp_path_factory.mktemp("out")
    flags = ("--export=coco,yolo,csv,cvat,labelme", "--save_crops=plain,aligned", "--crop_size=64")
    result = infer(f"--inference_dir={photos}", f"--inference_save_folder={folder}", *flags)
    assert result.returncode == 0, result.stderr
    assert f"open {folder / 'index.html'} to see them" in result.stdout
    return folder


def test_page_shows_images_and_why_others_were_skipped(out: Path) -> None:
    with Browser() as browser:
        browser.emulate(1280, 800)
        browser.open(out / "index.html")
        names = browser.evaluate("[...document.querySelectorAll('.card b')].map(node => node.textContent)")
        assert names == ["50% #1/two faces?.jpg", HOSTILE_NAME, "empty.jpg"]
        assert browser.evaluate("document.querySelectorAll('#grid rect').length") == 3
        assert browser.evaluate("document.querySelector('.skipped').textContent") == "empty file"
        assert browser.evaluate("document.getElementById('threshold').min") == "0.5"
        # Both thumbnails are loaded, and the viewer shows the full image.
        assert browser.evaluate("[...document.querySelectorAll('.card img')].map(image => image.naturalWidth)") == [
            400,
            400,
        ]
        browser.evaluate("document.querySelector('.card').click()")
        browser.settle()
        source = "document.querySelector('#viewer-stage img')"
        assert browser.evaluate(f"[{source}.naturalWidth, {source}.src.includes('thumbnails')]") == [820, False]
        assert browser.evaluate("document.querySelectorAll('.crop').length") == 2
        assert browser.problems() == []


@pytest.mark.parametrize("format_name", FORMATS)
def test_exports_contain_the_detections(format_name: str, out: Path, photos: Path) -> None:
    found = {
        image.path.as_posix(): image.faces
        for image in FORMATS[format_name].read(out / "exports" / FORMATS[format_name].file, photos)
    }
    assert found.keys() == entries(out).keys()
    for name, entry in entries(out).items():
        np.testing.assert_allclose(found[name].boxes, [face["box"] for face in entry["faces"]], atol=0.01)
        np.testing.assert_allclose(found[name].landmarks, [face["landmarks"] for face in entry["faces"]], atol=0.01)


def test_crops_are_listed_and_written(out: Path) -> None:
    faces = [face for entry in entries(out).values() for face in entry["faces"]]
    assert len(faces) == 3
    for face in faces:
        assert face["files"].keys() == {"crops", "aligned"}
        assert cv2.imread(str(out / face["files"]["aligned"])).shape == (64, 64, 3)
        x1, y1, x2, y2 = face["box"]
        height = cv2.imread(str(out / face["files"]["crops"])).shape[0]
        assert height == pytest.approx((y2 - y1) + 0.5 * max(x2 - x1, y2 - y1), abs=2)
    listed = set(json.loads((out / "results.json").read_text())["files"])
    assert {path for face in faces for path in face["files"].values()} < listed


def test_exports_can_be_added_to_finished_results(photos: Path, tmp_path: Path) -> None:
    common = (f"--inference_dir={photos}", f"--inference_save_folder={tmp_path}", "--page=False")
    assert infer(*common).returncode == 0
    assert not (tmp_path / "exports").exists()
    assert not (tmp_path / "index.html").exists()
    assert not (tmp_path / "thumbnails").exists()
    result = infer(*common, "--resume", "--export=csv")
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "exports/faces.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("method", ["blur", "pixelate", "solid"])
def test_faces_are_anonymised_in_all_images_of_a_run(method: str, photos: Path, tmp_path: Path) -> None:
    """Thumbnails and drawings are anonymised too.

    A large blurred face may still be detected as a face, so that is checked for the other methods only.
    """
    out = tmp_path / "out"
    result = infer(f"--inference_dir={photos}", f"--inference_save_folder={out}", f"--anonymize={method}", "--save_img")
    assert result.returncode == 0, result.stderr
    names = [f"anonymized/{name}" for name in entries(out)]
    assert [entry["anonymized"] for entry in entries(out).values()] == names
    before = entries(out)
    for folder in ("anonymized", "thumbnails") if method != "blur" else ():
        again = infer(f"--inference_dir={out / folder}", f"--inference_save_folder={tmp_path / folder}")
        assert again.returncode == 0, again.stderr
        found = [face for entry in entries(tmp_path / folder).values() for face in entry["faces"]]
        assert len(found) == 0, (folder, found)
    for name, entry in before.items():
        original, hidden = cv2.imread(str(photos / name)), cv2.imread(str(out / "anonymized" / name))
        assert original.shape == hidden.shape
        for face in entry["faces"]:
            x1, y1, x2, y2 = map(int, face["box"])
            assert np.abs(original[y1:y2, x1:x2].astype(int) - hidden[y1:y2, x1:x2]).mean() > 10


@pytest.fixture
def video(tmp_path: Path) -> Path:
    image = cv2.imread(str(SAMPLES / "astronaut.jpg"))
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 5, (512, 512))
    for shift in range(8):
        writer.write(np.roll(image, 4 * shift, axis=1))
    writer.release()
    return tmp_path / "clip.mp4"


def test_faces_of_a_video_have_ids_and_times(video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = infer(f"--inference_dir={video}", f"--inference_save_folder={out}", "--track", "--export=csv")
    assert result.returncode == 0, result.stderr
    frames = list(entries(out).values())
    assert [frame["seconds"] for frame in frames] == pytest.approx([number / 5 for number in range(8)])
    assert [[face["track"] for face in frame["faces"]] for frame in frames] == [[1]] * 8
    with (out / "exports/faces.csv").open() as file:
        assert [row["track"] for row in csv.DictReader(file)] == ["1"] * 8


def test_video_is_anonymised(video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = infer(f"--inference_dir={video}", f"--inference_save_folder={out}", "--anonymize=solid")
    assert result.returncode == 0, result.stderr
    if not shutil.which("ffmpeg"):
        assert "without sound, because ffmpeg is not installed" in result.stdout
    hidden = cv2.VideoCapture(str(out / "anonymized/clip.mp4"))
    assert int(hidden.get(cv2.CAP_PROP_FRAME_COUNT)) == 8
    assert {path.name for path in (out / "anonymized").iterdir()} == {"clip.mp4"}
    again = infer(f"--inference_dir={out}/anonymized/clip.mp4", f"--inference_save_folder={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert not any(entry["faces"] for entry in entries(tmp_path / "again").values())
    # The page shows one frame per second.
    assert sorted(path.name for path in (out / "thumbnails").iterdir()) == ["000000.jpg", "000005.jpg"]


@pytest.mark.parametrize("flags", [["--save_crops=plain"], ["--mask", "--save_mask"]])
def test_recognisable_faces_beside_anonymised_ones_are_refused(flags: list[str], tmp_path: Path) -> None:
    result = infer(f"--inference_save_folder={tmp_path / 'out'}", "--anonymize=blur", *flags)
    assert result.returncode == 2
    name = flags[-1].split("=")[0]
    assert result.stderr == f"error: {name} writes recognisable faces; drop it, or drop --anonymize\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--track"], "--track follows faces over the frames of a video"),
        (["--inference_dir={same}", "--export=csv,yolo"], "several images are named a.*"),
        (["--inference_save_folder={same}"], "is not a page of results"),
    ],
)
def test_user_errors_end_in_one_line(flags: list[str], message: str, tmp_path: Path) -> None:
    same = tmp_path / "same"
    same.mkdir()
    for name in ("a.jpg", "a.png"):
        cv2.imwrite(str(same / name), np.zeros((20, 20, 3), np.uint8))
    (same / "index.html").write_text("<p>my holidays</p>")
    given = [f"--inference_save_folder={tmp_path / 'out'}", *[flag.format(same=same) for flag in flags]]
    result = infer(*given)
    assert result.returncode == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
