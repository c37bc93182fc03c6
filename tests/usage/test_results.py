"""Tests of several runs that write to one folder, and of names of result files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import inference
from config import ROOT, InferenceOptions
from tests.scripts import run_script
from utils.errors import UserError
from utils.evaluation.predictions import read_predictions, write_predictions
from utils.results.masks import HeadMask
from utils.results.writer import ResultWriter
from utils.runtime.files import shortened
from utils.runtime.sources import SourceError, open_source
from utils.structures import Detections

PLAIN = InferenceOptions(page=False)
DRAWINGS = replace(PLAIN, save_img=True)
IMAGE = np.full((20, 30, 3), 100, np.uint8)
FACE = Detections(torch.tensor([[10.0, 5, 20, 17]]), torch.tensor([0.9]), None)
HEAD = HeadMask((0, 0, 30, 20), (10, 5, 20, 17), np.full((20, 30), 255, np.uint8))
EXPERIMENT = "mobilenet0.25_anc2_casT_fpn3"


def write(
    folder: Path,
    names: Sequence[str],
    source: str = "photos",
    experiment: str = "exp",
    options: InferenceOptions = DRAWINGS,
    image: np.ndarray = IMAGE,
    frames_per_second: float | None = None,
) -> ResultWriter:
    settings = {"source": source}
    with ResultWriter(
        folder, experiment, settings, names=names, options=options, frames_per_second=frames_per_second
    ) as writer:
        for name in names:
            writer.add(name, image, FACE, [HEAD])
    return writer


def drawn(folder: Path) -> set[str]:
    return {path.name for path in (folder / "result_images").iterdir()}


def infer(*flags: str, cwd: Path = ROOT) -> CompletedProcess[str]:
    return run_script(inference, "--gpu_num=-1", "--backend=torch", *flags, cwd=cwd)


@pytest.mark.parametrize(("source", "experiment"), [("other", "exp"), ("photos", "other"), ("other", "other")])
def test_images_of_other_runs_are_kept(tmp_path: Path, source: str, experiment: str) -> None:
    write(tmp_path, ["a.jpg", "b.jpg"])
    write(tmp_path, ["c.jpg"], source, experiment)
    assert drawn(tmp_path) == {"a.jpg", "b.jpg", "c.jpg"}
    write(tmp_path, ["a.jpg"], options=PLAIN)
    assert drawn(tmp_path) == {"a.jpg", "b.jpg", "c.jpg"}


def test_images_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, ["a.jpg", "b.jpg"])
    assert write(tmp_path, ["a.jpg"]).start.note == "replacing the results of an earlier run"
    assert drawn(tmp_path) == {"a.jpg"}
    note = write(tmp_path, ["c.jpg"], "other").start.note
    assert (
        note == "replacing the results of an earlier run of photos, whose images stay unless these have the same names"
    )


def test_two_videos_have_two_drawings(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path, [f"{name}_000001.jpg", f"{name}_000002.jpg"], name, frames_per_second=10.0)
    assert drawn(tmp_path) == {"one.mp4", "two.mp4"}


@pytest.mark.parametrize("kind", ["result_images", "anonymized"])
def test_two_videos_of_one_stem_have_two_drawings(tmp_path: Path, kind: str) -> None:
    options = replace(PLAIN, anonymize="solid") if kind == "anonymized" else DRAWINGS
    for name in ("a.mp4", "a.avi"):
        with ResultWriter(
            tmp_path, "exp", {"source": name}, options=options, video=tmp_path / name, frames_per_second=10.0
        ) as writer:
            writer.add("a_000001.jpg", IMAGE, FACE)
    assert {path.name for path in (tmp_path / kind).iterdir()} == {"a.mp4", "a.avi.mp4"}


def test_video_of_odd_size_keeps_its_last_row_and_column(tmp_path: Path) -> None:
    write(tmp_path, ["a_000001.jpg"], frames_per_second=10.0, image=np.full((33, 47, 3), 90, np.uint8))
    read, frame = cv2.VideoCapture(str(tmp_path / "result_images/a.mp4")).read()
    assert read
    assert frame.shape == (34, 48, 3)
    assert abs(int(frame[32:, 46:].mean()) - 90) < 8


@pytest.mark.parametrize("names", [["a.gif", "a.gif.png"], ["a.gif", "a.gif.png", "a.gif.png.png", "b.gif"]])
def test_no_image_overwrites_the_drawing_of_another(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, names)
    assert len(drawn(tmp_path)) == len(names)


def test_no_image_overwrites_the_anonymised_copy_of_another(tmp_path: Path) -> None:
    options = replace(PLAIN, anonymize="solid")
    write(tmp_path, ["a.gif", "a.gif.png"], options=options)
    assert {path.name for path in (tmp_path / "anonymized").iterdir()} == {"a.gif.png", "a.gif.png.png"}


@pytest.mark.parametrize("stem", ["x" * 251, "é" * 125, "x" * 100])
@pytest.mark.parametrize("options", [DRAWINGS, replace(PLAIN, mask=True, save_mask=True)])
def test_name_too_long_for_another_suffix_is_shortened(tmp_path: Path, stem: str, options: InferenceOptions) -> None:
    write(tmp_path, [f"sub/{stem}.gif", f"sub/{stem}.jp2", "after.jpg"], options=options)
    kind = "result_images" if options.save_img else "heads"
    assert len([path for path in (tmp_path / kind).rglob("*.*") if path.is_file()]) == 3
    assert all(len(path.name.encode()) <= 255 for path in tmp_path.rglob("*"))
    assert shortened("sub/a.jpg") == "sub/a.jpg"

    write_predictions(tmp_path, f"sub/{stem}.jpeg", np.zeros((0, 5)))
    assert list(read_predictions(tmp_path, [f"sub/{stem}.jpeg"])) == [f"sub/{stem}.jpeg"]


@pytest.mark.parametrize("options", [DRAWINGS, replace(PLAIN, anonymize="solid")])
def test_long_names_of_a_video_and_of_a_checkpoint_are_shortened(tmp_path: Path, options: InferenceOptions) -> None:
    write(tmp_path, [f"{'x' * 250}_000001.jpg"], experiment="y" * 251, options=options, frames_per_second=25.0)
    (table,) = tmp_path.glob("*.txt")
    (video,) = tmp_path.glob("*/*.mp4")
    assert table.read_text().count("\n") == 2
    assert (video.name[:200], table.name[:200]) == ("x" * 200, "y" * 200)


def test_video_below_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """OpenCV would end the process."""
    folder = tmp_path / "o\udcffut"
    folder.mkdir()
    (folder / "clip.mp4").touch()
    with pytest.raises(SourceError, match="whose path is not valid UTF-8; rename it"):
        open_source(str(folder / "clip.mp4"), tmp_path, set(), 0)
    with pytest.raises(UserError, match="choose another folder"):
        ResultWriter(folder, "exp", {}, options=DRAWINGS, frames_per_second=25.0)


def test_line_break_in_a_name_is_escaped(tmp_path: Path) -> None:
    writer = write(tmp_path, ["a\nb.jpg", "c.jpg"])
    lines = (tmp_path / "exp_inference_results.txt").read_text().splitlines()
    assert lines[::2] == ["a\\nb.jpg", "c.jpg"]
    writer.summary.skipped.append(("d\ne.jpg", "empty file"))
    assert "skipped d\\ne.jpg: empty file" in writer.summary.describe(1.0)
    write_predictions(tmp_path, "a\nb", np.ones((1, 5)))
    assert read_predictions(tmp_path, ["a\nb"])["a\nb"].tolist() == [[1, 1, 1, 1, 1]]


@pytest.mark.parametrize("kind", ["folder", "file", "list", "link"])
def test_input_among_the_results_is_refused(tmp_path: Path, kind: str) -> None:
    heads = tmp_path / "out/heads"
    heads.mkdir(parents=True)
    cv2.imwrite(str(heads / "a.png"), IMAGE)
    (tmp_path / "list.txt").write_text(f"{heads}/a.png\n")
    (tmp_path / "link").symlink_to(heads, target_is_directory=True)
    place = {"folder": heads, "file": heads / "a.png", "list": tmp_path / "list.txt", "link": tmp_path / "link"}[kind]
    result = infer(f"--inference_dir={place}", f"--inference_save_folder={tmp_path}/out", "--save_img")
    assert result.returncode == 1
    assert "holds images to be read, but results are written there" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.name for path in heads.iterdir()] == ["a.png"]
    assert not (tmp_path / "out/results.json").exists()


def test_notes_about_files_are_in_the_summary(tmp_path: Path) -> None:
    """The working folder is the input, with an animation and a RAW file; the experiment name is nested."""
    photos = tmp_path / "photos"
    photos.mkdir()
    from PIL import Image

    frame = Image.fromarray(IMAGE)
    frame.save(photos / "a.gif", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    (photos / "b.cr2").touch()
    weights = ROOT / f"experiments/{EXPERIMENT}/ckpt/mobilenet0.25_ckpt-best.pth"
    flags = [f"--model_weight={weights}", "--experiment_name=family/child"]
    result = infer("--inference_dir=.", "--inference_save_folder=../out", *flags, cwd=photos)
    assert result.returncode == 0, result.stderr
    assert f"{photos}: 1 images" in result.stdout
    assert "note: a.gif: only the first of its 2 frames" in result.stdout
    assert f"skipped {photos}/b.cr2: camera RAW" in result.stdout
    assert (tmp_path / "out/family_child_inference_results.txt").read_text().startswith("a.gif\n")


def test_damaged_images_are_named_and_libraries_print_nothing(tmp_path: Path) -> None:
    sample = ROOT / "data/sample_widerface/images/astronaut.jpg"
    data = sample.read_bytes()
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cut.jpg").write_bytes(data[: len(data) // 2] + data[-2:])
    with Image.open(sample) as image:
        image.save(photos / "exif.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    result = infer(f"--inference_dir={photos}", f"--inference_save_folder={tmp_path / 'out'}", "--page=False")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "note: cut.jpg: damaged; a part of the image may be wrong (Corrupt JPEG data: premature end" in result.stdout
