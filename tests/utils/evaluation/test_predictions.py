"""Tests of the text format of predictions: writing, parsing and error messages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from utils.errors import UserError
from utils.evaluation.predictions import read_predictions, write_predictions

NAME = "0--Parade/0_Parade_1"
ROWS = np.array([[1.25, 2.5, 30, 40.125, 0.987654321], [-3, 0, 5, 6, 0.02]])


def read(folder: Path, content: bytes) -> np.ndarray:
    path = folder / f"{NAME}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return read_predictions(folder, [NAME])[NAME]


def test_written_file_has_the_official_format(tmp_path: Path) -> None:
    write_predictions(tmp_path, NAME, ROWS)
    assert (tmp_path / f"{NAME}.txt").read_text().splitlines() == [
        "0_Parade_1",
        "2",
        "1.250 2.500 30.000 40.125 0.987654321",
        "-3.000 0.000 5.000 6.000 0.02",
    ]
    assert np.array_equal(read_predictions(tmp_path, [NAME])[NAME], ROWS)
    assert [path.name for path in (tmp_path / NAME).parent.iterdir()] == ["0_Parade_1.txt"]


def test_integer_boxes_have_integer_corners(tmp_path: Path) -> None:
    """1.9 to 4.1 becomes 1 to 4: biubug6 truncates both corners and subtracts them."""
    write_predictions(tmp_path, NAME, np.array([[1.9, -0.5, 2.2, 3.4, 0.5]]), integer_boxes=True)
    assert (tmp_path / f"{NAME}.txt").read_text().splitlines()[2:] == ["1 0 3 2 0.5"]


def test_image_without_boxes(tmp_path: Path) -> None:
    write_predictions(tmp_path, NAME, np.zeros((0, 5)))
    assert (tmp_path / f"{NAME}.txt").read_text() == "0_Parade_1\n0\n"
    assert read_predictions(tmp_path, [NAME])[NAME].shape == (0, 5)


@pytest.mark.parametrize(
    "content", [b"", b"name", b"name\n", b"name\n0", b"name\n0\n", b"\n\n\n", b"name\r\n0\r\n\r\n"]
)
def test_empty_files_are_images_without_boxes(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content).shape == (0, 5)


def test_missing_files_are_left_out(tmp_path: Path) -> None:
    write_predictions(tmp_path, NAME, ROWS)
    assert list(read_predictions(tmp_path, ["0--Parade/other", NAME, "absent/other"])) == [NAME]


@pytest.mark.parametrize(
    "content",
    [
        b"name\n2\n1 2 3 4 0.5\n5 6 7 8 0.25\n",
        b"name\r\n2\r\n1 2 3 4 0.5 \r\n5 6 7 8 0.25 \r\n",
        b"name\n2\n1\t2  3 4 .5\n\n5 6 7 8 2.5e-1\n\n\n",
        b"name.jpg\n2 \n1 2 3 4 0.5 11 12 13 14\n5 6 7 8 0.25 9\n",
        "ü\n2\n1 2 3 4 0.5\n5 6 7 8 0.25".encode("latin-1"),
    ],
    ids=["plain", "windows", "blanks", "more columns", "latin"],
)
def test_variants_of_the_format_are_read(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content).tolist() == [[1, 2, 3, 4, 0.5], [5, 6, 7, 8, 0.25]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name\n2\n1 2 3 4 0.5\n", r"txt:2: says 2 boxes, but 1 follow"),
        (b"name\n1\n1 2 3 4 0.5\n5 6 7 8 0.25\n", r"txt:2: says 1 boxes, but 2 follow"),
        (b"name\n2\n1 2 3 4 0.5\n5 6 7\n", r"txt:4: expected finite numbers x y width height score, got '5 6 7'"),
        (b"name\n2\n1 2 3 4\n0.5 6 7 8 0.25 1\n", r"txt:3: expected finite numbers"),
        (b"name\n1\n1 2 3 4 nan\n", r"txt:3: expected finite numbers"),
        (b"name\n1\n1 inf 3 4 0.5\n", r"txt:3: expected finite numbers"),
        (b"name\n1\n1,2,3,4,0.5\n", r"txt:3: expected finite numbers .* got '1,2,3,4,0.5'"),
        (b"1 2 3 4 0.5\n5 6 7 8 0.25\n", r"txt:2: expected the number of boxes, got '5 6 7 8 0.25'"),
        (b"\xff\xd8\xff\n\x00\x01\n\x02", r"txt:2: expected the number of boxes"),
    ],
)
def test_parse_error_names_the_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / f"{NAME}.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"0_Parade_1\.txt: cannot be read"):
        read_predictions(tmp_path, [NAME])
