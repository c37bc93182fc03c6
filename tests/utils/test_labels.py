"""The label format: what is read, and which line a mistake is in."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.labels import DatasetError, LabelledImage, read_labels

FACE = "10 20 30 40 11 21 0 12 22 0 13 23 0 14 24 0 15 25 0"


def read(tmp_path: Path, text: str) -> list[LabelledImage]:
    path = tmp_path / "label.txt"
    path.write_bytes(text.encode())
    return read_labels(path, tmp_path / "images")


def test_box_becomes_corners_and_landmarks_are_points(tmp_path: Path) -> None:
    (image,) = read(tmp_path, f"# a/b c.jpg\n{FACE}\n")
    assert image.path == tmp_path / "images" / "a" / "b c.jpg"
    assert image.boxes.tolist() == [[10, 20, 40, 60]]
    assert image.landmarks.tolist() == [[[11, 21], [12, 22], [13, 23], [14, 24], [15, 25]]]
    assert image.has_landmarks.tolist() == [True]


def test_image_without_faces(tmp_path: Path) -> None:
    empty, other = read(tmp_path, f"# a.jpg\n# b.jpg\n{FACE}\n")
    assert (empty.boxes.shape, empty.landmarks.shape, empty.has_landmarks.shape) == ((0, 4), (0, 5, 2), (0,))
    assert len(other.boxes) == 1


@pytest.mark.parametrize("line", ["10 20 30 40", "10 20 30 40" + " -1" * 15, "10 20 30 40" + " -1" * 15 + " 0.9"])
def test_unknown_landmarks_are_zeros(tmp_path: Path, line: str) -> None:
    (image,) = read(tmp_path, f"# a.jpg\n{line}\n")
    assert image.boxes.tolist() == [[10, 20, 40, 60]]
    assert image.landmarks.tolist() == [[[0, 0]] * 5]
    assert image.has_landmarks.tolist() == [False]


def test_one_unknown_landmark_makes_all_of_the_face_unknown(tmp_path: Path) -> None:
    (image,) = read(tmp_path, f"# a.jpg\n{FACE.replace('15 25 0', '-1 -1 -1')}\n{FACE}\n")
    assert image.has_landmarks.tolist() == [False, True]
    assert image.landmarks[0].max() == 0


def test_faces_without_area_are_left_out(tmp_path: Path) -> None:
    (image,) = read(tmp_path, "# a.jpg\n10 20 0 5\n10 20 5 0\n10 20 -3 5\n1 2 1 1\n0 0 0 0\n")
    assert image.boxes.tolist() == [[1, 2, 2, 3]]


def test_image_named_twice_has_the_faces_of_both(tmp_path: Path) -> None:
    (image,) = read(tmp_path, "# a.jpg\n0 0 1 1\n# a.jpg\n2 2 1 1\n")
    assert image.boxes.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize("text", ["# ü.jpg\r\n1 2 3 4\r\n", "\ufeff# ü.jpg\n1 2 3 4", "\n#ü.jpg \n\n \t1  2\t3 4 \n\n"])
def test_line_ends_byte_order_mark_and_blanks_do_not_matter(tmp_path: Path, text: str) -> None:
    (image,) = read(tmp_path, text)
    assert image.path.name == "ü.jpg"
    assert image.boxes.tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 3 4\n# a.jpg\n", "label.txt:1: a face before the first"),
        ("# a.jpg\n1 2 3 4\n1 2 3\n", "label.txt:3: expected 4 numbers .* got 3"),
        ("# a.jpg\n" + "1 " * 18, "label.txt:2: .* got 18"),
        ("# a.jpg\n" + "1 " * 21, "label.txt:2: .* got 21"),
        ("# a.jpg\n1 2 three 4\n", "label.txt:2: expected numbers, got '1 2 three 4'"),
        ("# a.jpg\n\nnan 2 3 4\n", "label.txt:3: expected finite numbers, got 'nan 2 3 4'"),
        ("# a.jpg\n1 2 inf 4\n", "label.txt:2: expected finite"),
        ("", "label.txt: names no image"),
        ("\n\n", "label.txt: names no image"),
    ],
)
def test_mistake_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, text)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"label\.txt: cannot be read"):
        read_labels(tmp_path / "label.txt", tmp_path)
    (tmp_path / "label.txt").write_bytes(b"# \xff\xfe.jpg\n")
    with pytest.raises(DatasetError, match=r"label\.txt: cannot be read"):
        read_labels(tmp_path / "label.txt", tmp_path)
