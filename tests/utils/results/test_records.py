"""Records of pictures, whole and torn, and the order in which they come back."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.results.records import Record, RecordStore


def record(position: int, name: str = "") -> Record:
    return Record(position, name or f"{position}.png", {"name": name}, ["1 2 3 4 0.500000"], ["masks/a.png"])


def test_no_record(tmp_path: Path) -> None:
    parts = RecordStore(tmp_path / "parts")
    assert (parts.run, list(parts.index())) == ({}, [])
    parts.begin({"about": 1})
    assert (parts.run, list(parts.index())) == ({"about": 1}, [])


def test_records_come_back_in_the_order_of_their_positions(tmp_path: Path) -> None:
    parts = RecordStore(tmp_path / "parts")
    for rank, positions in ((0, [0, 1, 4]), (1, [2, 3]), (2, [])):
        file = parts.open(rank)
        for position in positions:
            file.add(record(position))
        file.close()
    index = parts.index()
    assert index.positions.tolist() == [0, 1, 2, 3, 4]
    assert [(each.position, each.name) for each in index] == [(number, f"{number}.png") for number in range(5)]
    assert next(iter(index)) == record(0)


def test_later_record_of_a_picture_counts(tmp_path: Path) -> None:
    parts = RecordStore(tmp_path)
    file = parts.open(0)
    for name in ("former", "later"):
        file.add(record(3, name))
    file.close()
    assert [each.name for each in parts.index()] == ["later"]


def test_record_is_on_disk_before_the_next_one(tmp_path: Path) -> None:
    file = RecordStore(tmp_path).open(0)
    file.add(record(0))
    assert [each.position for each in RecordStore(tmp_path).index()] == [0]
    file.close()


@pytest.mark.parametrize("kept_bytes", [1, 20, -1])
def test_torn_last_line_counts_as_absent_and_harms_no_other(tmp_path: Path, kept_bytes: int) -> None:
    """-1 lacks nothing but the end of the line, so that record is whole."""
    parts = RecordStore(tmp_path)
    path = tmp_path / "0.jsonl"
    path.write_bytes(record(0).line + record(1).line[:kept_bytes])
    whole = [0, 1] if kept_bytes == -1 else [0]
    assert parts.index().positions.tolist() == whole
    file = parts.open(0)
    file.add(record(2))
    file.close()
    assert [each.position for each in parts.index()] == [*whole, 2]


def test_names_that_are_no_text_come_back(tmp_path: Path) -> None:
    file = RecordStore(tmp_path).open(0)
    file.add(Record(0, "caf\udce9\n.png", problem="empty"))
    file.close()
    assert [each.name for each in RecordStore(tmp_path).index()] == ["caf\udce9\n.png"]


def test_removed_parts_are_gone(tmp_path: Path) -> None:
    parts = RecordStore(tmp_path / "parts")
    parts.begin({"about": 1})
    parts.open(0).close()
    parts.remove()
    assert list(tmp_path.iterdir()) == []


def test_parts_are_in_use_until_they_are_closed(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    parts = RecordStore(tmp_path)
    assert not parts.in_use
    file = parts.open(0)
    assert parts.in_use
    file.close()
    assert not parts.in_use
