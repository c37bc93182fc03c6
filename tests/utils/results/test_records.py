"""Tests of the records of processed images: order, truncated lines, sorting and locking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from utils.results.records import Record, RecordStore


def record(position: int, name: str = "") -> Record:
    return Record(position, name or f"{position}.png", {"name": name}, ["1 2 3 4 0.500000"], ["masks/a.png"])


def add(store: RecordStore, rank: int, *positions: int) -> None:
    """Let one process append the records of these images."""
    shard = store.open_shard(rank)
    for position in positions:
        shard.add(record(position))
    shard.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_no_record(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records")
    assert (store.run, list(store.index()), store.in_use) == ({}, [], False)
    store.begin({"settings": {"a": 1}})
    assert (store.run, list(store.index())) == ({"settings": {"a": 1}}, [])


def test_records_are_read_in_the_order_of_their_positions(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records")
    for rank, positions in ((0, [0, 1, 4]), (1, [2, 3]), (2, [])):
        add(store, rank, *positions)
    index = store.index()
    assert index.positions.tolist() == [0, 1, 2, 3, 4]
    assert [(each.position, each.name) for each in index] == [(number, f"{number}.png") for number in range(5)]
    assert next(iter(index)) == record(0)


def test_last_record_of_an_image_is_used(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    shard = store.open_shard(0)
    for name in ("former", "later"):
        shard.add(record(3, name))
    shard.close()
    assert [each.name for each in store.index()] == ["later"]


def test_record_is_on_disk_before_the_next_one(tmp_path: Path) -> None:
    shard = RecordStore(tmp_path).open_shard(0)
    shard.add(record(0))
    assert [each.position for each in RecordStore(tmp_path).index()] == [0]
    shard.close()


@pytest.mark.parametrize("kept_bytes", [1, 20, -1])
def test_truncated_last_line_is_ignored(tmp_path: Path, kept_bytes: int) -> None:
    """-1 removes only the line break, so the record is complete."""
    store = RecordStore(tmp_path)
    path = tmp_path / "0.jsonl"
    path.write_bytes(record(0).line + record(1).line[:kept_bytes])
    whole = [0, 1] if kept_bytes == -1 else [0]
    assert store.index().positions.tolist() == whole
    add(store, 0, 2)
    assert [each.position for each in store.index()] == [*whole, 2]


def test_undecodable_names_are_preserved(tmp_path: Path) -> None:
    shard = RecordStore(tmp_path).open_shard(0)
    shard.add(Record(0, "caf\udce9\n.png", problem="empty"))
    shard.close()
    assert [each.name for each in RecordStore(tmp_path).index()] == ["caf\udce9\n.png"]


def test_new_run_begins_without_records(tmp_path: Path) -> None:
    store = RecordStore(tmp_path / "records")
    store.begin({"settings": {"a": 1}})
    add(store, 0, 0, 1)
    add(store, 1, 2)
    store.begin({"settings": {"a": 2}})
    assert [path.name for path in store.folder.iterdir()] == ["run.json"]
    assert (store.run, len(store.index())) == ({"settings": {"a": 2}}, 0)


def test_complete_run_is_marked_and_has_no_former_files(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    store.begin({"settings": {"a": 1}, "former_files": ["masks/a.png"]})
    store.mark_complete()
    assert store.run == {"settings": {"a": 1}, "former_files": [], "complete": True}


@pytest.mark.parametrize(
    "shards", [[[0, 1, 2, 3, 4]], [[0, 1, 4], [2, 3]], [[3, 4], [], [2], [0, 1]], [[4], [0], [1], [2], [3]]]
)
def test_sorted_records_do_not_depend_on_the_number_of_processes(tmp_path: Path, shards: Sequence[list[int]]) -> None:
    store = RecordStore(tmp_path)
    for rank, positions in enumerate(shards):
        add(store, rank, *positions)
    store.compact()
    assert contents(tmp_path) == {"0.jsonl": b"".join(record(position).line for position in range(5))}
    store.compact()
    assert contents(tmp_path) == {"0.jsonl": b"".join(record(position).line for position in range(5))}


def test_sorting_drops_earlier_records_and_truncated_lines(tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    former, later = record(1, "former"), record(1, "later")
    (tmp_path / "0.jsonl").write_bytes(former.line + b"\n" + later.line + record(2).line[:9])
    (tmp_path / "1.jsonl").write_bytes(record(0).line)
    store.compact()
    assert contents(tmp_path) == {"0.jsonl": record(0).line + later.line}


def test_sorting_no_records_leaves_an_empty_file(tmp_path: Path) -> None:
    RecordStore(tmp_path).compact()
    assert contents(tmp_path) == {"0.jsonl": b""}


def test_records_are_in_use_until_they_are_closed(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    store = RecordStore(tmp_path)
    assert not store.in_use
    shard = store.open_shard(0)
    assert store.in_use
    shard.close()
    assert not store.in_use
