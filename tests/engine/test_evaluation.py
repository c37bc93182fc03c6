"""What is predicted has been written, and what cannot be written is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.evaluation import predict_files
from tests.engine.whole import PICTURE, FindsTheWhole
from utils.runtime.images import write_image


def test_predictions_are_all_there_when_the_iterator_is_closed(tmp_path: Path) -> None:
    """As after Ctrl-C: what came out has been written."""
    for name in "abc":
        write_image(tmp_path / f"{name}.png", PICTURE)
    files = [(name, tmp_path / f"{name}.png") for name in "abc"]
    found = predict_files(FindsTheWhole(), files, tmp_path / "out", integer_boxes=False)
    names = [next(found)[0].name]
    found.close()
    assert names == ["a"]
    assert (tmp_path / "out/a.txt").read_text() == "a\n1\n0.000 0.000 64.000 40.000 1\n"


def test_predictions_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", PICTURE)
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match="out"):
        list(predict_files(FindsTheWhole(), [("a", tmp_path / "a.png")], tmp_path / "out", integer_boxes=False))
