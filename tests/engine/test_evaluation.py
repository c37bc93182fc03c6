"""Tests of writing predictions during evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.evaluation import predict_files
from tests.engine.helpers import BLACK_IMAGE, WholeImageDetector
from utils.runtime.images import write_image


def test_yielded_predictions_are_written_when_the_iterator_is_closed(tmp_path: Path) -> None:
    """As after Ctrl-C."""
    for name in "abc":
        write_image(tmp_path / f"{name}.png", BLACK_IMAGE)
    files = [(name, tmp_path / f"{name}.png") for name in "abc"]
    found = predict_files(WholeImageDetector(), files, tmp_path / "out", integer_boxes=False)
    names = [next(found)[0].name]
    found.close()
    assert names == ["a"]
    assert (tmp_path / "out/a.txt").read_text() == "a\n1\n0.000 0.000 64.000 40.000 1\n"


def test_failure_to_write_predictions_is_raised(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", BLACK_IMAGE)
    (tmp_path / "out").touch()
    with pytest.raises(OSError, match="out"):
        list(predict_files(WholeImageDetector(), [("a", tmp_path / "a.png")], tmp_path / "out", integer_boxes=False))
