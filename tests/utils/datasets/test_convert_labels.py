"""Tests of converting the WIDER FACE download and other label files to datasets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from config import ROOT
from tests.scripts import run_script
from utils.datasets import convert_labels
from utils.datasets.convert_labels import main, match_faces
from utils.datasets.folders import read_split
from utils.datasets.label_file import read_labels
from utils.errors import FlagError, UserError

TRAIN = """\
0--Parade/one.jpg
1
10 20 30 40 0 0 0 0 0 0
0--Parade/two.jpg
3
0 0 10 10 0 0 0 0 0 0
2 0 10 10 0 0 0 0 0 0
50 50 10 10 2 0 0 1 2 0
1--Handshaking/none.jpg
0
0 0 0 0 0 0 0 0 0 0
"""
VAL = "2--Demonstration/wide.jpg\n1\n5 6 7 8 0 0 0 0 0 0\n"
LANDMARKS = "1 2 0 3 4 0 5 6 0 7 8 0 9 10 0"


@pytest.fixture
def download(tmp_path: Path) -> Path:
    """The archives of WIDER FACE, unpacked and tiny."""
    folder = tmp_path / "download"
    for split, labels in (("train", TRAIN), ("val", VAL)):
        for name in (line for line in labels.splitlines() if line.endswith(".jpg")):
            image = folder / f"WIDER_{split}/images" / name
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(name.encode())
        (folder / "wider_face_split").mkdir(exist_ok=True)
        (folder / f"wider_face_split/wider_face_{split}_bbx_gt.txt").write_text(labels)
    (folder / "eval_tools/ground_truth").mkdir(parents=True)
    for name in ("easy", "medium", "hard", "face"):
        (folder / f"eval_tools/ground_truth/wider_{name}_val.mat").write_bytes(name.encode())
    return folder


def convert(*argv: object) -> None:
    main([str(argument) for argument in argv])


def test_download_is_converted_to_a_dataset(download: Path, tmp_path: Path) -> None:
    to = tmp_path / "data/widerface"
    command = [sys.executable, "-m", "utils.datasets.convert_labels", str(download), f"--to={to}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"{to}/train/images: link to {download}/WIDER_train/images",
        f"{to}/train/label.txt: 3 images, 3 faces, 0 with landmarks, 1 to be ignored",
        f"{to}/val/images: link to {download}/WIDER_val/images",
        f"{to}/val/label.txt: 1 images, 1 faces, 0 with landmarks",
        f"{to}/val/gt: 4 files copied from {download}/eval_tools/ground_truth",
    ]
    assert (to / "train/label.txt").read_text() == (
        "# 0--Parade/one.jpg\n10 20 30 40\n"
        "# 0--Parade/two.jpg\n0 0 10 10\n2 0 10 10\n50 50 10 10 1\n"
        "# 1--Handshaking/none.jpg\n"
    )
    assert (to / "val/gt/wider_easy_val.mat").read_bytes() == b"easy"
    (train,), (val,) = read_split([to], "train"), read_split([to], "val")
    assert [len(image.faces) for image in train] == [1, 3, 0]  # every image is found
    assert train[1].faces.ignored.tolist() == [False, False, True]
    assert val[0].faces.boxes.tolist() == [[5, 6, 12, 14]]

    again = run_script(convert_labels, download, f"--to={to}")
    assert (again.returncode, again.stdout, again.stderr.count("\n")) == (1, "", 1)
    assert again.stderr.startswith(f"error: {to}/train/images, {to}/train/label.txt, ")
    assert "exists already; add --overwrite" in again.stderr


def test_links_do_not_depend_on_the_working_folder(
    download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    convert("download", "--to", "made/here")
    assert (tmp_path / "made/here/train/images").is_symlink()
    assert (tmp_path / "made/here/train/images/0--Parade/one.jpg").read_bytes() == b"0--Parade/one.jpg"


def test_copies_are_independent_of_the_download(download: Path, tmp_path: Path) -> None:
    convert(download, "--to", tmp_path / "to", "--copy")
    images = tmp_path / "to/train/images"
    assert not images.is_symlink()
    assert sorted(path.name for path in images.rglob("*.jpg")) == ["none.jpg", "one.jpg", "two.jpg"]
    assert (images / "0--Parade/one.jpg").read_bytes() == b"0--Parade/one.jpg"


def test_missing_parts_are_skipped_with_a_message(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (download / "WIDER_val").rename(tmp_path / "away")
    labels = download / "wider_face_split/wider_face_train_bbx_gt.txt"
    labels.unlink()
    (download / "eval_tools").rename(tmp_path / "away too")
    to = tmp_path / "to"
    convert(download, "--to", to)
    assert capsys.readouterr().out.splitlines() == [
        f"{to}/train/images: link to {download}/WIDER_train/images",
        f"{to}/train/label.txt: skipped, because {labels} does not exist",
        f"{to}/val/images: skipped, because {download}/WIDER_val/images does not exist",
        f"{to}/val/label.txt: 1 images, 1 faces, 0 with landmarks",
        f"{to}/val/gt: skipped, because {download}/eval_tools/ground_truth does not exist",
    ]
    assert sorted(path.name for path in to.glob("*/*")) == ["images", "label.txt"]


def test_folder_without_any_part_is_refused_with_the_expected_paths(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        convert(tmp_path, "--to", tmp_path / "to")
    for name in (
        *("WIDER_train/images", "WIDER_val/images", "eval_tools/ground_truth"),
        *("wider_face_split/wider_face_train_bbx_gt.txt", "wider_face_split/wider_face_val_bbx_gt.txt"),
    ):
        assert f"{tmp_path}/{name}" in str(error.value)
    assert not (tmp_path / "to").exists()


def test_overwriting_replaces_labels_and_links(download: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    (to / "val").mkdir(parents=True)
    (to / "val/images").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match=r"val/images: exists already; add --overwrite, or choose another --to"):
        convert(download, "--to", to)
    assert not (to / "train").exists()  # refused before anything is written
    (to / "val/label.txt").write_text("old")
    convert(download, "--to", to, "--overwrite")
    assert (to / "val/images").resolve() == download / "WIDER_val/images"
    assert (to / "val/label.txt").read_text() == "# 2--Demonstration/wide.jpg\n5 6 7 8\n"
    convert(download, "--to", to, "--overwrite", "--copy")  # replaces the links, keeps their targets
    assert not (to / "val/images").is_symlink()
    assert (download / "WIDER_val/images/2--Demonstration/wide.jpg").is_file()


def test_folder_of_images_is_never_deleted(download: Path, tmp_path: Path) -> None:
    mine = tmp_path / "to/train/images/mine.jpg"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(UserError, match=r"train/images: is a folder; remove it .* or add --copy"):
        convert(download, "--to", tmp_path / "to", "--overwrite")
    convert(download, "--to", tmp_path / "to", "--overwrite", "--copy")
    assert mine.is_file()
    assert (mine.parent / "0--Parade/one.jpg").is_file()


@pytest.mark.parametrize(
    "labels",
    [
        f"# 0--Parade/one.jpg\n12 20 30 40 {LANDMARKS}\n# other.jpg\n10 20 30 40 {LANDMARKS}\n",
        f"# 0--Parade/one.jpg 64 48\n12 20 42 60 {LANDMARKS}\n# other.jpg 64 48\n10 20 40 60 {LANDMARKS}\n",
    ],
)
def test_landmarks_come_from_the_face_of_the_same_image(download: Path, tmp_path: Path, labels: str) -> None:
    (tmp_path / "landmarks.txt").write_text(labels)
    convert(download, "--to", tmp_path / "to", "--landmarks", tmp_path / "landmarks.txt")
    written = (tmp_path / "to/train/label.txt").read_text()
    assert f"# 0--Parade/one.jpg\n10 20 30 40 {LANDMARKS}\n# 0--Parade/two.jpg\n0 0 10 10\n2 0 10 10\n" in written
    assert LANDMARKS not in (tmp_path / "to/val/label.txt").read_text()


def test_landmarks_of_a_neighbouring_face_are_not_used(download: Path, tmp_path: Path) -> None:
    # The neighbour overlaps the face at 26/34, but the face's own match is the box without landmarks.
    labels = f"# 0--Parade/one.jpg\n14 20 30 40 {LANDMARKS}\n10 20 30 40\n# 0--Parade/two.jpg\n0 0 10 10 {LANDMARKS}\n"
    (tmp_path / "landmarks.txt").write_text(labels)
    convert(download, "--to", tmp_path / "to", "--landmarks", tmp_path / "landmarks.txt")
    assert (
        (tmp_path / "to/train/label.txt")
        .read_text()
        .startswith(f"# 0--Parade/one.jpg\n10 20 30 40\n# 0--Parade/two.jpg\n0 0 10 10 {LANDMARKS}\n2 0 10 10\n")
    )


def test_landmarks_that_match_no_face_are_refused(download: Path, tmp_path: Path) -> None:
    (tmp_path / "landmarks.txt").write_text(f"# one.jpg\n10 20 30 40 {LANDMARKS}\n")
    flags = ("--to", tmp_path / "to", "--landmarks", tmp_path / "landmarks.txt")
    with pytest.raises(UserError, match=r"landmarks\.txt: has no landmarks for any face of .*train_bbx_gt\.txt"):
        convert(download, *flags)
    labels = download / "wider_face_split/wider_face_train_bbx_gt.txt"
    labels.unlink()
    with pytest.raises(UserError, match=rf"--landmarks is for the faces of {labels}, which does not exist"):
        convert(download, *flags, "--overwrite")


def test_matching_is_one_to_one_and_prefers_the_highest_iou() -> None:
    boxes = np.array([[0, 0, 10, 10], [2, 0, 12, 10], [50, 50, 60, 60]], np.float32)
    # IoU of the first with the boxes: 9/11, 9/11; of the second: 7/13, 1; of the third: none; of the last: 1/3 at most.
    others = np.array([[1, 0, 11, 10], [2, 0, 12, 10], [30, 30, 40, 40], [50, 55, 60, 65]], np.float32)
    faces, partners = match_faces(boxes, others)
    assert dict(zip(faces.tolist(), partners.tolist(), strict=True)) == {1: 1, 0: 0}
    half = np.array([[0, 0, 10, 5]], np.float32)
    assert [indices.tolist() for indices in match_faces(boxes[:1], half)] == [[0], [0]]


@pytest.mark.parametrize(("count", "other_count"), [(0, 0), (0, 1), (1, 0)])
def test_no_faces_have_no_matches(count: int, other_count: int) -> None:
    faces, partners = match_faces(np.ones((count, 4), np.float32), np.ones((other_count, 4), np.float32))
    assert (faces.shape, partners.shape, partners.dtype.kind) == ((0,), (0,), "i")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (VAL, "# 2--Demonstration/wide.jpg\n5 6 7 8\n"),
        (f"# a.jpg 64 48\n5 6 12 14 {LANDMARKS} 0.9\n# b.jpg 64 48\n", f"# a.jpg\n5 6 7 8 {LANDMARKS}\n# b.jpg\n"),
        (f"# a.jpg\n5.25 6 7 8{' -1' * 16} 2\n", "# a.jpg\n5.25 6 7 8\n"),
    ],
)
def test_single_file_is_written_in_retinaface_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, expected: str
) -> None:
    (tmp_path / "labels.txt").write_text(text)
    to = tmp_path / "new/label.txt"
    convert(tmp_path / "labels.txt", "--to", to)
    assert to.read_text() == expected
    images = read_labels(to, tmp_path)
    known = sum(image.faces.has_landmarks.sum() for image in images)
    assert capsys.readouterr().out == f"{to}: {len(images)} images, 1 faces, {known} with landmarks\n"
    with pytest.raises(UserError, match=r"new/label\.txt: exists already; add --overwrite"):
        convert(tmp_path / "labels.txt", "--to", to)
    convert(to, "--to", to, "--overwrite")
    assert to.read_text() == expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["absent"], "absent: no such file or folder"),
        (["labels.txt"], "labels.txt is a file: --to must name the file to write"),
        (["labels.txt", "--to=out.txt", "--copy"], "labels.txt is a file: --copy, .* drop it"),
        (["labels.txt", "--to=."], r"--to \.: is a folder; name the file to write"),
        (["labels.txt", "--to=out.txt"], r"labels.txt:2: expected 4 numbers \(x y w h\) or .* got 1"),
        (["labels.txt", "--to=labels.txt/out.txt"], "labels.txt: cannot be written to"),
        (["x" * 300], r"cannot be used \(File name too long\)"),
        (["labels.txt", "--to", "x" * 300], r"cannot be used \(File name too long\)"),
        (["labels.txt", "--to="], "an empty name was given"),
        (["labels.txt", "--to=out.txt", "--landmarks="], "an empty name was given"),
    ],
)
def test_user_errors_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("labels.txt").write_text("# a.jpg\n1\n")
    with pytest.raises(UserError, match=message):
        main(argv)
    assert [path.name for path in tmp_path.iterdir()] == ["labels.txt"]


def test_unknown_flag_is_refused_in_one_line() -> None:
    with pytest.raises(FlagError, match=r"unrecognized arguments: --over \(see .* --help\)$"):
        main(["folder", "--over"])
