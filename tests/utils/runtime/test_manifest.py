"""Tests of comparing settings, and of reading the manifest of a run."""

from __future__ import annotations

from pathlib import Path

from utils.runtime.manifest import file_digest, first_difference, read_object


def test_equal_settings_do_not_differ() -> None:
    assert first_difference({}, {}) is None
    assert first_difference({"a": [1, 2], "more": 1}, {"a": (1, 2)}) is None


def test_difference_names_the_innermost_setting() -> None:
    saved = {"detection": {"top_k": 0, "nms_threshold": 0.3}, "name": "x"}
    asked = {"detection": {"top_k": 0, "nms_threshold": 0.4}, "name": "y"}
    assert str(first_difference(saved, asked)) == "detection.nms_threshold 0.3, now it is 0.4"
    assert str(first_difference({}, {"name": "y" * 99})) == f'name null, now it is "{"y" * 56}...'


def test_invalid_json_object_is_read_as_empty(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    assert read_object(file) == {}
    for text in ("[1]", '{"a"', "", '{"settings": 3}', '{"former_files": "a.jpg"}', '{"experiment": null}'):
        file.write_text(text)
        assert read_object(file) == {}
    file.write_text('{"a": 1}')
    assert read_object(file) == {"a": 1}


def test_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert file_digest(tmp_path / "empty").startswith("e3b0c44298fc1c14")
