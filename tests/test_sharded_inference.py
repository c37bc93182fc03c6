"""Tests that inference.py in several processes, or killed and resumed, writes the same files as one process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import inference as script
from config import ROOT
from inference import inference
from tests.scripts import run_processes, run_script
from utils.errors import UserError
from utils.results.records import RecordStore
from utils.results.writer import ResultWriter

FAST = "mobilenet0.25_anc2_casT_fpn3"  # the default takes seconds to become an ONNX graph
RECORDS = f".records/{FAST}"
COUNT = 19  # two blocks of eight, and a third that is not full


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one face in two sizes, neither of them square, and two files that are not images."""
    folder = tmp_path_factory.mktemp("images")
    face = cv2.imread(str(ROOT / "data/sample_widerface/images/astronaut.jpg"))[:256, 100:356]
    for number in range(COUNT):
        image = np.roll(cv2.resize(face, (128, 96 if number % 5 else 112)), 3 * number, axis=1)
        cv2.imwrite(str(folder / f"{number:02d}.png"), image)
    for number in (3, 17):
        (folder / f"{number:02d}.png").write_bytes(b"not an image")
    return folder


def flags(images: Path, out: Path, *more: str) -> list[str]:
    places = (f"--inference_dir={images}", f"--inference_save_folder={out}")
    return ["--gpu_num=-1", f"--experiment_name={FAST}", *places, "--save_img", *more]


def torchrun(processes: int, images: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [*launcher, "inference.py", *flags(images, out, *more)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def infer(images: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return run_script(script, *flags(images, out, *more))


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of all files, including the hidden records."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def truncate_records(out: Path, whole_lines: int) -> None:
    """Truncate the records as if the process had been killed in the middle of a line."""
    path = out / RECORDS / "0.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:whole_lines]) + lines[whole_lines][:25])


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of one uninterrupted process."""
    out = tmp_path_factory.mktemp("uninterrupted")
    result = infer(images, out)
    assert result.returncode == 0, result.stderr
    found = contents(out)
    assert {f"{RECORDS}/run.json", f"{RECORDS}/0.jsonl"} < found.keys()
    # Drawings and thumbnails, tables, the page, records and the digests of the written files.
    assert len(found) == 2 * (COUNT - 2) + 3 + 1 + 3
    return found


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_write_the_files_of_one(
    processes: int, images: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    """There are three blocks of images, so one of four processes has no work."""
    result = run_processes("inference", processes, *flags(images, tmp_path))
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == uninterrupted
    assert result.stdout.count(f"{COUNT - 2} images, ") == 1
    for number in (3, 17):
        assert result.stdout.count(f"skipped {number:02d}.png: ") == 1


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes as Linux shows them")
@pytest.mark.parametrize(("killed", "resumed_by"), [("one", 1), ("all", 2)])
def test_killed_processes_can_be_resumed(
    killed: str, resumed_by: int, images: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    process = torchrun(2, images, tmp_path)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("result_images/*.png")) and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    for pid in workers[1:] if killed == "one" else [process.pid, *workers]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    if RecordStore(tmp_path / RECORDS).run.get("complete"):
        pytest.skip("the run ended before it could be killed")
    assert not (tmp_path / "results.json").exists()
    if resumed_by == 1:
        result = infer(images, tmp_path, "--resume")
        assert result.returncode == 0, result.stderr
    else:
        again = run_processes("inference", resumed_by, *flags(images, tmp_path, "--resume"))
        assert again.returncode == 0, again.stderr
    assert contents(tmp_path) == uninterrupted


def test_interrupted_run_can_be_resumed(
    images: Path, uninterrupted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within a block, with a truncated last line: complete records are kept, and the rest is done once."""
    added = 0
    original = ResultWriter._add_record

    def stop_after_six(self: ResultWriter, record: object) -> None:
        nonlocal added
        if added == 6:
            raise KeyboardInterrupt
        added += 1
        original(self, record)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(ResultWriter, "_add_record", stop_after_six)
        with pytest.raises(KeyboardInterrupt):
            inference(flags(images, tmp_path))
    assert (tmp_path / "results.jsonl").read_text().count("\n") == 6
    truncate_records(tmp_path, 5)
    kept = tmp_path / "result_images/02.png"
    written_at = kept.stat().st_mtime_ns
    (tmp_path / "result_images/.0123456789abcdef.tmp").touch()  # of an image that was being written
    found = inference(flags(images, tmp_path, "--resume"))
    assert len(found.result_bboxes) == COUNT - 2 - 4  # 00 to 04 were done, of which 03 is not an image
    assert kept.stat().st_mtime_ns == written_at
    assert contents(tmp_path).keys() == uninterrupted.keys()


@pytest.mark.parametrize(
    ("change", "setting"),
    [("--confidence_threshold=0.4", "detection.confidence_threshold 0.5"), ("--save_img=False", "options.save_img")],
)
def test_results_with_other_settings_are_not_resumed(
    images: Path, tmp_path: Path, change: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inference(flags(images, tmp_path))
    finished = contents(tmp_path)
    with pytest.raises(UserError, match=f"--resume: the results in .* were made with {setting}"):
        inference(flags(images, tmp_path, "--resume", change))
    assert contents(tmp_path) == finished
    capsys.readouterr()
    assert inference(flags(images, tmp_path, "--resume")).result_bboxes == []
    done = f"{COUNT - 2} images are done already; 2 that could not be read are tried again"
    assert done in capsys.readouterr().out
    assert contents(tmp_path) == finished
    inference(flags(images, tmp_path, change))
    assert "replacing the results of an earlier run" in capsys.readouterr().out


def test_images_that_could_not_be_read_are_tried_again(images: Path, tmp_path: Path) -> None:
    """As when a network drive was away: none of the images, then all but one, then that one as well."""
    shown, away, out = tmp_path / "images", tmp_path / "away", tmp_path / "out"
    shutil.copytree(images, away)
    for number in (3, 17):
        (away / f"{number:02d}.png").unlink()
    names = sorted(path.name for path in away.iterdir())
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{shown / name}\n" for name in names))
    whole = tmp_path / "whole"
    shutil.copytree(away, shown)
    assert infer(listed, whole).returncode == 0
    shutil.rmtree(shown)
    shown.mkdir()

    none = infer(listed, out)
    assert none.returncode == 1
    assert "no image could be read" in none.stderr
    shutil.copytree(away, shown, dirs_exist_ok=True)
    (shown / names[4]).unlink()
    all_but_one = infer(listed, out, "--resume")
    assert all_but_one.returncode == 0, all_but_one.stderr
    assert f"0 images are done already; {len(names)} that could not be read are tried again" in all_but_one.stdout
    again = infer(listed, out, "--resume")
    assert again.returncode == 0, again.stderr
    assert f"{len(names) - 1} images are done already; 1 that could not be read is tried again" in again.stdout
    shutil.copy(away / names[4], shown)
    assert infer(listed, out, "--resume").returncode == 0
    assert contents(out) == contents(whole)
    assert "all images are done already" in infer(listed, out, "--resume").stdout


def test_results_of_another_list_of_images_are_not_resumed(images: Path, tmp_path: Path) -> None:
    lists = tmp_path / "list.txt"
    lists.write_text(f"{images}/00.png\n{images}/01.png\n")
    inference(flags(lists, tmp_path / "out"))
    lists.write_text(f"{images}/00.png\n{images}/02.png\n")
    with pytest.raises(UserError, match="were made with paths_sha256"):
        inference(flags(lists, tmp_path / "out", "--resume"))


def test_video_in_several_processes_is_refused_in_one_line(tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    result = run_processes("inference", 2, *flags(clip, tmp_path / "out"))
    assert result.returncode == 1
    assert result.stderr.count("error: ") == 1
    assert "2 processes cannot share a video or camera; start one" in result.stderr
    assert "cannot be resumed; drop --resume" in infer(clip, tmp_path / "out", "--resume").stderr
    assert not (tmp_path / "out").exists()
