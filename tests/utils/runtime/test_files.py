"""Paths that the user gives, and text files."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.errors import UserError
from utils.runtime.files import is_file, is_folder, path_exists, user_path


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 300, "File name too long"),
        ("x/" * 3000, "File name too long"),
        ("a\0b", "null byte"),
        (" ", "empty name"),
    ],
)
def test_path_that_no_file_can_have_is_refused(text: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        user_path(text)


def test_path_need_not_exist(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("gone", "gone/below", "file/below"):
        assert user_path(str(tmp_path / name)) == tmp_path / name


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "gone"])
def test_invalid_path_does_not_exist(tmp_path: Path, name: str) -> None:
    assert not (path_exists(tmp_path / name) or is_file(tmp_path / name) or is_folder(tmp_path / name))
