"""Tests of the text label formats: parsing, error messages, and writing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.datasets.label_file import read_labels, write_labels
from utils.datasets.labels import DatasetError, LabelledImage
from utils.structures import Faces

FACE = "10 20 30 40 11 21 0 12 22 0 13 23 0 14 24 0 15 25 0"


def read(tmp_path: Path, text: str) -> list[LabelledImage]:
    path = tmp_path / "label.txt"
    path.write_bytes(text.encode())
    return read_labels(path, tmp_path / "images")


def same(images: list[LabelledImage], others: list[LabelledImage]) -> bool:
    """Return whether both are the same images with bitwise equal faces."""
    return [image.path for image in images] == [other.path for other in others] and all(
        np.array_equal(getattr(image.faces, name), getattr(other.faces, name))
        for image, other in zip(images, others, strict=True)
        for name in ("boxes", "landmarks", "has_landmarks", "ignored")
    )


def test_box_becomes_corners_and_landmarks_are_points(tmp_path: Path) -> None:
    (image,) = read(tmp_path, f"# a/b c.jpg\n{FACE}\n")
    assert image.path == tmp_path / "images" / "a" / "b c.jpg"
    assert image.faces.boxes.tolist() == [[10, 20, 40, 60]]
    assert image.faces.landmarks.tolist() == [[[11, 21], [12, 22], [13, 23], [14, 24], [15, 25]]]
    assert image.faces.has_landmarks.tolist() == [True]


def test_image_without_faces(tmp_path: Path) -> None:
    empty, other = read(tmp_path, f"# a.jpg\n# b.jpg\n{FACE}\n")
    assert [value.shape for value in vars(empty.faces).values()] == [(0, 4), (0, 5, 2), (0,), (0,)]
    assert len(other.faces) == 1


@pytest.mark.parametrize(
    "line",
    [
        "10 20 30 40",
        "10 20 30 40" + " -1" * 15,
        "10 20 30 40" + " -1" * 15 + " 0.9",
        "10 20 30 40" + " -1.0" * 16 + " 2",
    ],
)
def test_unknown_landmarks_are_zeros(tmp_path: Path, line: str) -> None:
    (image,) = read(tmp_path, f"# a.jpg\n{line}\n")
    assert image.faces.boxes.tolist() == [[10, 20, 40, 60]]
    assert image.faces.landmarks.tolist() == [[[0, 0]] * 5]
    assert image.faces.has_landmarks.tolist() == [False]


def test_one_unknown_landmark_makes_all_of_the_face_unknown(tmp_path: Path) -> None:
    (image,) = read(tmp_path, f"# a.jpg\n{FACE.replace('15 25 0', '-1 -1 -1')}\n{FACE}\n")
    assert image.faces.has_landmarks.tolist() == [False, True]
    assert image.faces.landmarks[0].max() == 0


def test_faces_without_area_are_left_out(tmp_path: Path) -> None:
    (image,) = read(tmp_path, "# a.jpg\n10 20 0 5\n10 20 5 0\n10 20 -3 5\n1 2 1 1\n0 0 0 0\n")
    assert image.faces.boxes.tolist() == [[1, 2, 2, 3]]


def test_image_named_twice_has_the_faces_of_both(tmp_path: Path) -> None:
    (image,) = read(tmp_path, "# a.jpg\n0 0 1 1\n# a.jpg\n2 2 1 1\n")
    assert image.faces.boxes.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3]]


@pytest.mark.parametrize("text", ["# ü.jpg\r\n1 2 3 4\r\n", "\ufeff# ü.jpg\n1 2 3 4", "\n#ü.jpg \n\n \t1  2\t3 4 \n\n"])
def test_line_ends_byte_order_mark_and_blanks_do_not_matter(tmp_path: Path, text: str) -> None:
    (image,) = read(tmp_path, text)
    assert image.path.name == "ü.jpg"
    assert image.faces.boxes.tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n1 2 3 4\n# a.jpg\n", "label.txt:2: expected '# folder/image.jpg', .* the first face, got '1 2 3 4'"),
        ("image,x,y\n", "label.txt:1: expected '# folder/image.jpg', .* got 'image,x,y'"),
        ("# a.jpg\n#\n", "label.txt:2: expected '# folder/image.jpg', got '#'"),
        ("# a.jpg\n1 2 3 4\n1 2 3\n", "label.txt:3: expected 4 numbers .* got 3"),
        ("# a.jpg\n" + "1 " * 18, "label.txt:2: .* got 18"),
        ("# a.jpg\n" + "1 " * 22, r"label.txt:2: .* or 21 numbers \(with a difficulty too\), got 22"),
        ("# a.jpg\n1 2 three 4\n", "label.txt:2: expected numbers, got '1 2 three 4'"),
        ("# a.jpg\n\nnan 2 3 4\n", "label.txt:3: expected finite numbers, got 'nan 2 3 4'"),
        ("# a.jpg\n1 2 inf 4\n", "label.txt:2: expected finite"),
        ("# a.jpg\n1 2 1e39 4\n", "label.txt:2: expected finite"),
        (
            "# a.jpg\n1 2 3 4 0.98\n",
            "label.txt:2: expected 0 or 1 after x y w h in pixels, whether the face is ignored, got 0.98",
        ),
        (
            "# a.jpg 9 9\n1 2 3 4 2\n",
            "label.txt:2: expected 0 or 1 after x1 y1 x2 y2 in pixels, whether .* ignored, got 2",
        ),
        ("", "label.txt: names no image"),
        ("\n\n", "label.txt: names no image"),
    ],
)
def test_parse_error_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, text)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"label\.txt: cannot be read"):
        read_labels(tmp_path / "label.txt", tmp_path)
    (tmp_path / "label.txt").write_bytes(b"# \xff\xfe.jpg\n")
    with pytest.raises(DatasetError, match=r"label\.txt: cannot be read"):
        read_labels(tmp_path / "label.txt", tmp_path)


# ------------------------------------------------------------------------- SNU_FaceDetection's difficulty


def test_score_and_difficulty_are_ignored(tmp_path: Path) -> None:
    plain = read(tmp_path, f"# a.jpg\n{FACE}\n")
    assert same(plain, read(tmp_path, f"# a.jpg\n{FACE} 0.87\n"))
    assert same(plain, read(tmp_path, f"# a.jpg\n{FACE} 0.87 2\n"))


# ------------------------------------------------------------------------------------------------ labelv2


def test_labelv2_has_corners(tmp_path: Path) -> None:
    (image,) = read(tmp_path, "# 0--Parade/a b.jpg 1024 1385\n10 20 40 60\n")
    assert image.path == tmp_path / "images" / "0--Parade" / "a b.jpg"
    assert image.faces.boxes.tolist() == [[10, 20, 40, 60]]
    assert image.faces.has_landmarks.tolist() == [False]


def test_labelv2_means_the_same_as_retinaface(tmp_path: Path) -> None:
    landmarks = FACE.removeprefix("10 20 30 40")
    faces = ["{box}", "{box}" + landmarks, "{box}" + landmarks + " 0.9", "{box}" + " -1" * 15, "{box}" + " -1" * 16]
    sizes = "".join(face.format(box="10 20 30 40") + "\n" for face in faces)
    corners = "".join(face.format(box="10 20 40 60") + "\n" for face in faces)
    images = read(tmp_path, f"# a.JPG\n{sizes}# b.png\n# c.jpg\n5 6 7 8\n")
    assert images[0].faces.has_landmarks.tolist() == [False, True, True, False, False]
    assert same(images, read(tmp_path, f"# a.JPG 64 48\n{corners}#b.png  1 1\n# c.jpg 64\t48\n5 6 12 14\n"))


@pytest.mark.parametrize(("header", "corner"), [("# a.jpg 1024 1385", "40 60"), ("# a.jpg", "30 40")])
def test_faces_may_be_labelled_as_ignored(tmp_path: Path, header: str, corner: str) -> None:
    (image,) = read(tmp_path, f"{header}\n10 20 {corner} 0\n11 21 {corner} 1\n10 20 {corner}\n")
    right, bottom = (40, 60) if header.endswith("1385") else (41, 61)
    assert image.faces.boxes.tolist() == [[10, 20, 40, 60], [11, 21, right, bottom], [10, 20, 40, 60]]
    assert image.faces.has_landmarks.tolist() == [False, False, False]
    assert image.faces.ignored.tolist() == [False, True, False]


def test_labelv2_faces_without_area_are_left_out(tmp_path: Path) -> None:
    (image,) = read(tmp_path, "# a.jpg 64 64\n10 20 10 25\n10 20 15 20\n10 20 5 25\n1 2 2 3\n")
    assert image.faces.boxes.tolist() == [[1, 2, 2, 3]]


@pytest.mark.parametrize("name", ["day 1 2.jpg", "1024 1385.jpg", "a.jpg 1024", "a.jpg.bak 10 20", "10 20", "a 1 2"])
def test_spaces_and_digits_in_a_path_do_not_make_it_labelv2(tmp_path: Path, name: str) -> None:
    (image,) = read(tmp_path, f"# {name}\n10 20 30 40\n")
    assert image.path.name == name
    assert image.faces.boxes.tolist() == [[10, 20, 40, 60]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# a.jpg 9 9\n1 2 3 4\n# b.jpg\n", "label.txt:3: expected '# folder/image.jpg width height' as in the first"),
        ("# a.jpg\n1 2 3 4\n# b.jpg 9 9\n", "label.txt:3: expected '# folder/image.jpg' as in .*, got '# b.jpg 9 9'"),
        ("# a.jpg 9 9\n1 2 3\n", r"label.txt:2: expected 4 numbers \(x1 y1 x2 y2\) or 5 .* got 3"),
        ("# a.jpg 9 9\n" + "1 " * 21, r"label.txt:2: .* or 20 numbers \(with one more\), got 21"),
        ("# a.jpg 9 9\nb.jpg\n", "label.txt:2: expected numbers, got 'b.jpg'"),
    ],
)
def test_parse_error_in_labelv2_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, text)


# --------------------------------------------------------------------------------------------- WIDER FACE


def test_wider_faces_have_sizes_and_invalid_ones_are_ignored(tmp_path: Path) -> None:
    two, one = read(
        tmp_path,
        "0--Parade/a 1.jpg\n3\n10 20 30 40 2 0 0 0 2 0 \n1 2 3 4 0 0 0 1 0 0 \n5 6 7 8 0 0 0 0 0 1 \n"
        "0--Parade/b.jpg\n1\n0 0 1 2 0 1 1 0 1 1\n",
    )
    assert two.path == tmp_path / "images" / "0--Parade" / "a 1.jpg"
    assert two.faces.boxes.tolist() == [[10, 20, 40, 60], [1, 2, 4, 6], [5, 6, 12, 14]]
    assert two.faces.ignored.tolist() == [False, True, False]
    assert two.faces.landmarks.tolist() == [[[0, 0]] * 5] * 3
    assert two.faces.has_landmarks.tolist() == [False, False, False]
    assert one.faces.boxes.tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize("zeros", ["0 0 0 0 0 0 0 0 0 0 \n", ""])
def test_wider_image_without_faces(tmp_path: Path, zeros: str) -> None:
    first, other, last = read(tmp_path, f"a.jpg\n0\n{zeros}b.jpg\n1\n1 2 3 4 0 0 0 0 0 0\nc.jpg\n0\n{zeros}")
    assert [len(image.faces) for image in (first, other, last)] == [0, 1, 0]
    assert first.faces.landmarks.shape == (0, 5, 2)


def test_wider_faces_without_area_are_left_out(tmp_path: Path) -> None:
    (image,) = read(tmp_path, "a.jpg\n3\n5 5 0 3 0 0 0 0 0 0\n5 5 3 0 0 0 0 0 0 0\n1 2 1 1 0 0 0 0 0 0\n")
    assert image.faces.boxes.tolist() == [[1, 2, 2, 3]]


def test_wider_line_ends_byte_order_mark_and_blanks_do_not_matter(tmp_path: Path) -> None:
    (image,) = read(tmp_path, "\ufeff\r\nü.JPG \r\n\r\n 1\r\n1 2\t3 4 0 0 0 0 0 0 \r\n\r\n")
    assert image.path.name == "ü.JPG"
    assert image.faces.boxes.tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg\n", "label.txt:1: expected the number of faces in the line below a.jpg, got none"),
        ("a.jpg\nb.jpg\n", "label.txt:1: expected the number of faces in the line below a.jpg, got none"),
        ("a.jpg\n1 2 3 4 0 0 0 0 0 0\n", "label.txt:2: expected the number of faces of a.jpg, got '1 2 3 4 0 0"),
        ("a.jpg\nmany\n", "label.txt:2: expected the number of faces of a.jpg, got 'many'"),
        ("a.jpg\n-1\n", "label.txt:2: expected the number of faces of a.jpg, got '-1'"),
        ("a.jpg\n2\n" + "1 " * 10, "label.txt:2: expected 2 faces below for a.jpg, got 1"),
        ("a.jpg\n\n2\n" + "1 " * 10 + "\nb.jpg\n0\n", "label.txt:3: expected 2 faces below for a.jpg, got 1"),
        ("a.jpg\n1\n" + ("1 " * 10 + "\n") * 2, "label.txt:2: expected 1 faces below for a.jpg, got 2"),
        ("a.jpg\n0\n" + "1 " * 10, "label.txt:2: expected 0 faces below for a.jpg, got 1"),
        ("a.jpg\n1\n" + "1 " * 9, r"label.txt:3: expected 10 numbers \(x y w h blur .* pose\), got 9"),
        ("a.jpg\n1\n1 2 3 four 0 0 0 0 0 0\n", "label.txt:3: expected numbers, got '1 2 3 four"),
        ("a.jpg\n1\n1 2 3 4 0 0 0 0.9 0 0\n", "label.txt:3: expected 0 or 1 for invalid, number 8, got 0.9"),
        ("a.jpg\n0\n# b.jpg\n1 2 3 4\n", "label.txt:3: expected numbers, got '# b.jpg'"),
    ],
)
def test_parse_error_in_wider_labels_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, text)


# ------------------------------------------------------------------------------------------------ writing


def test_written_labels_are_short(tmp_path: Path) -> None:
    images = read(tmp_path, f"# a/b.jpg 64 64\n10 20 40 60\n0.1 0.2 0.3 20000000\n# c.jpg 64 64\n{FACE}\n")
    write_labels(tmp_path / "out.txt", images, tmp_path / "images")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == (
        "# a/b.jpg\n10 20 30 40\n0.1 0.2 0.2 19999999.8\n# c.jpg\n10 20 20 20 11 21 0 12 22 0 13 23 0 14 24 0 15 25 0\n"
    )


@pytest.mark.parametrize("name", ["\udcff.jpg", "a\nb.jpg", "a\rb.jpg"])
def test_name_that_could_not_be_read_back_is_refused(tmp_path: Path, name: str) -> None:
    image = LabelledImage(tmp_path / name, Faces(np.zeros((0, 4)), np.zeros((0, 5, 2)), np.zeros(0), np.zeros(0)))
    with pytest.raises(DatasetError, match="its name is not valid UTF-8 or contains a line break; rename it"):
        write_labels(tmp_path / "out.txt", [image], tmp_path)
    assert not (tmp_path / "out.txt").exists()


def test_reading_inverts_writing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    corners = random.normal(0, 300, (500, 2)).astype(np.float32)
    boxes = np.concatenate([corners, corners + random.exponential(30, (500, 2)).astype(np.float32)], axis=1)
    known, ignored = random.random(500) < 0.5, random.random(500) < 0.2
    known &= ~ignored  # only the boxes of ignored faces are written
    landmarks = np.where(known[:, None, None], random.exponential(300, (500, 5, 2)), 0).astype(np.float32)
    faces = Faces(boxes, landmarks, known, ignored)
    images = [
        LabelledImage(tmp_path / "images" / "ü 1/many.jpg", faces),
        LabelledImage(tmp_path / "images" / "one.png", faces.select(np.arange(1))),
        LabelledImage(tmp_path / "images" / "a\u2028b.jpg", faces.select(np.arange(2))),
        LabelledImage(tmp_path / "images" / "none.jpg", faces.select(np.arange(0))),
        LabelledImage(tmp_path / "elsewhere.jpg", faces.select(np.arange(1, 2))),
    ]
    write_labels(tmp_path / "label.txt", images, tmp_path / "images")
    assert same(images, read_labels(tmp_path / "label.txt", tmp_path / "images"))
