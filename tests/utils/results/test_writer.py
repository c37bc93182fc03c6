"""Tests of writing results: tables, drawings, crops, exports, resuming, and files of the user."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from config import InferenceOptions
from utils.errors import UserError
from utils.results.masks import HeadMask
from utils.results.own_files import OwnFiles
from utils.results.records import Record, RecordStore
from utils.results.writer import ResultWriter
from utils.runtime.images import read_image
from utils.structures import Detections

FACE = [10.25, 5.5, 20.75, 17.0]
HEAD = HeadMask((0, 0, 30, 20), (10, 5, 20, 17), np.full((20, 30), 255, np.uint8))

PLAIN, RESUMED = InferenceOptions(page=False), InferenceOptions(page=False, resume=True)
DRAWINGS, CROPS = replace(PLAIN, save_img=True), replace(PLAIN, mask=True, save_mask=True)


def grey_image(level: int = 100) -> np.ndarray:
    """Return a grey image of 30 x 20 pixels."""
    return np.full((20, 30, 3), level, np.uint8)


def faces(count: int = 1, landmarks: bool = False) -> Detections:
    points = torch.full((count, 5, 2), 12.345) if landmarks else None
    return Detections(torch.tensor([FACE] * count).reshape(-1, 4), torch.full((count,), 0.875), points)


def write(folder: Path, names: Sequence[str], *, close: bool = True, **options: Any) -> ResultWriter:
    """Write a run that finds one face in every image; each image has its own grey level."""
    writer = ResultWriter(folder, "exp", {}, names=names, **options)
    for level, name in enumerate(names):
        writer.add(name, grey_image(level), faces(), [HEAD])
    if close:
        writer.close()
    return writer


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def files_below(folder: Path) -> set[str]:
    """Return all files except the hidden records."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {path for path in paths if not path.startswith(".records/")}


TABLES = {"results.json", "results.jsonl", "exp_inference_results.txt"}


def test_no_images_give_valid_files(tmp_path: Path) -> None:
    write(tmp_path / "new" / "folder", [])
    assert results(tmp_path / "new" / "folder") == {"images": [], "skipped": [], "files": []}
    assert (tmp_path / "new" / "folder" / "exp_inference_results.txt").read_text() == ""


def test_table_has_the_original_format_and_json_has_all_fields(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, "exp", {"source": "ü", "detection": {"top_k": 0}})
    writer.add("a.jpg", grey_image(), faces(0))
    writer.skip("b.jpg", "empty file")
    writer.add("sub/ü 日.jpg", grey_image(), faces(2, landmarks=True))
    writer.close()
    lines = (tmp_path / "exp_inference_results.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["a.jpg", "sub/ü 日.jpg", "10 5 20 17 0.875000", "10 5 20 17 0.875000"]
    assert results(tmp_path) == {
        "source": "ü",
        "detection": {"top_k": 0},
        "images": [
            {"name": "a.jpg", "width": 30, "height": 20, "faces": []},
            {
                "name": "sub/ü 日.jpg",
                "width": 30,
                "height": 20,
                "faces": [{"box": FACE, "score": 0.875, "landmarks": [[12.35, 12.35]] * 5}] * 2,
            },
        ],
        "skipped": [{"name": "b.jpg", "reason": "empty file"}],
        "files": [],
    }
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    first, last = results(tmp_path)["images"]
    assert lines == [first, {"name": "b.jpg", "skipped": "empty file"}, last]
    assert (writer.summary.images, writer.summary.faces, writer.summary.former) == (2, 2, 0)
    assert files_below(tmp_path) == TABLES


def test_masks_and_crops_are_written_to_four_folders(tmp_path: Path) -> None:
    write(tmp_path, ["sub/a.jpg"], options=CROPS)
    (image,) = results(tmp_path)["images"]
    assert image["faces"][0]["head_box"] == [0, 0, 30, 20]
    assert image["faces"][0]["face_box_in_head"] == [10, 5, 20, 17]
    files = image["faces"][0]["files"]
    sizes = {kind: read_image(tmp_path / file).shape[:2] for kind, file in files.items()}
    assert sizes == {"masks": (12, 10), "faces": (12, 10), "heads": (20, 30), "head_masks": (20, 30)}
    assert set(files.values()) == {f"{kind}/sub/a_0.png" for kind in sizes}


def test_face_outside_the_image_has_no_crops(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, "exp", {}, options=CROPS)
    writer.add("a.jpg", grey_image(), faces(), [HeadMask((30, 0, 30, 0), (0, 0, 0, 0), np.zeros((0, 0), np.uint8))])
    writer.close()
    assert results(tmp_path)["images"][0]["faces"][0]["files"] == {}


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "a.png", "b.jpg"],
        ["a.jpg", "A.png"],
        ["a.jpg", "a.png", "a.jpg.png"],
        ["a.jpg.png", "a.jpg", "a"],
        ["a_0.jpg", "a.jpg", "sub/a.jpg", "sub.a.jpg"],
        ["x.y.jpg", "x.z.jpg", "x.jpg"],
    ],
)
def test_no_image_overwrites_the_crops_of_another(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, names, options=CROPS)
    for level, image in enumerate(results(tmp_path)["images"]):
        assert read_image(tmp_path / image["faces"][0]["files"]["heads"]).max() == level
    crops = [file.lower() for file in files_below(tmp_path / "heads")]
    assert len(set(crops)) == len(names)


@pytest.mark.parametrize(
    ("name", "drawn"), [("a b.JPG", "a b.JPG"), ("ü/b.webp", "ü/b.webp"), ("c.gif", "c.gif.png"), ("d", "d.png")]
)
def test_drawings_keep_the_name_if_its_format_can_be_written(tmp_path: Path, name: str, drawn: str) -> None:
    write(tmp_path, [name], options=DRAWINGS)
    assert files_below(tmp_path / "result_images") == {drawn}
    assert read_image(tmp_path / "result_images" / drawn).shape == (20, 30, 3)


def test_second_run_replaces_its_own_files_only(tmp_path: Path) -> None:
    assert not write(tmp_path, ["a.png", "b.png"], options=replace(CROPS, save_img=True)).start.note
    users = {"notes.txt", "result_images/mine.png", "masks/b_1.png"}
    for name in users:
        (tmp_path / name).write_text("mine")
    assert write(tmp_path, ["b.png"], options=DRAWINGS).start.note == "replacing the results of an earlier run"
    assert files_below(tmp_path) == TABLES | users | {"result_images/b.png"}
    assert [image["name"] for image in results(tmp_path)["images"]] == ["b.png"]


@pytest.mark.parametrize("name", ["notes.txt", "result_images/../notes.txt", "{folder}/notes.txt", ".", "masks"])
def test_nothing_outside_the_output_folders_is_removed(tmp_path: Path, name: str) -> None:
    """Even if the records of an earlier run list such files."""
    (tmp_path / "notes.txt").write_text("mine")
    for folder in ("masks", "result_images"):
        (tmp_path / folder).mkdir()
    store = RecordStore(tmp_path / ".records" / "exp")
    store.begin({"settings": {}, "former_files": [name.format(folder=tmp_path), "masks/gone.png"]})
    shard = store.open_shard(0)
    shard.add(Record(0, "a.png", {"name": "a.png"}, files=[name.format(folder=tmp_path)]))
    shard.close()
    write(tmp_path, [])
    assert files_below(tmp_path) == TABLES | {"notes.txt"}
    assert (tmp_path / "masks").is_dir()


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_that_no_run_wrote_are_kept(tmp_path: Path, name: str) -> None:
    mine = '{\n"images": [\n],\n"files": ["masks/mine.png"]\n}\n'
    (tmp_path / name).write_text(mine)
    with pytest.raises(UserError, match=f"{name}: was not written by a run, or was edited since, and is kept"):
        ResultWriter(tmp_path, "exp", {})
    assert files_below(tmp_path) == {name}
    assert (tmp_path / name).read_text() == mine


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("result_images", DRAWINGS),
        ("thumbnails", replace(PLAIN, page=True)),
        ("heads", CROPS),
        ("crops", replace(PLAIN, save_crops=("plain",))),
        ("aligned", replace(PLAIN, save_crops=("plain", "aligned"))),
        ("anonymized", replace(PLAIN, anonymize="solid")),
    ],
)
@pytest.mark.parametrize("after_a_run", [False, True])
def test_folder_of_images_that_no_run_wrote_is_refused(
    tmp_path: Path, name: str, options: InferenceOptions, after_a_run: bool
) -> None:
    if after_a_run:
        write(tmp_path, ["a.png"], options=PLAIN)
    (tmp_path / name).mkdir()
    write(tmp_path, ["a.png"], options=options)  # an empty folder may be used
    other = tmp_path / "other"
    if after_a_run:
        write(other, ["a.png"], options=PLAIN)
    (other / name).mkdir(parents=True)
    (other / name / "a.png").write_text("mine")
    with pytest.raises(UserError, match=f"{name}: was not written by a run, or was edited since, and is kept"):
        ResultWriter(other, "exp", {}, names=["a.png"], options=options)
    assert (other / name / "a.png").read_text() == "mine"
    write(other, ["a.png"], options=PLAIN)  # which writes no images


def test_images_of_an_earlier_version_are_replaced(tmp_path: Path) -> None:
    write(tmp_path, ["a.png", "b.png"], options=DRAWINGS)
    (tmp_path / ".records/written.json").unlink()
    write(tmp_path, ["a.png"], options=DRAWINGS)
    assert files_below(tmp_path) == TABLES | {"result_images/a.png"}


def test_tables_that_the_user_edited_are_kept(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"])
    (tmp_path / "results.jsonl").write_text("edited")
    for options in (PLAIN, RESUMED):
        with pytest.raises(UserError, match=r"results\.jsonl: .* is kept"):
            ResultWriter(tmp_path, "exp", {}, names=["a.png"], options=options)
    (tmp_path / "results.jsonl").rename(tmp_path / "mine.jsonl")
    write(tmp_path, ["a.png"])
    assert (tmp_path / "mine.jsonl").read_text() == "edited"


def test_tables_that_the_user_writes_during_a_run_are_kept(tmp_path: Path) -> None:
    writer = write(tmp_path, ["a.png"], close=False)
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(UserError, match=r"results\.json: .* is kept"):
        writer.close()
    assert files_below(tmp_path) == {"results.json"}
    (tmp_path / "results.json").unlink()
    ResultWriter(tmp_path, "exp", {}, names=["a.png"], options=RESUMED).close()
    assert files_below(tmp_path) == TABLES


def test_tables_of_an_earlier_version_are_replaced(tmp_path: Path) -> None:
    """Earlier versions kept records, but no list of written files."""
    write(tmp_path, ["a.png"])
    (tmp_path / ".records/written.json").unlink()
    assert write(tmp_path, ["b.png"]).start.note == "replacing the results of an earlier run"
    assert [image["name"] for image in results(tmp_path)["images"]] == ["b.png"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_tables_of_a_run_killed_while_replacing_them_are_replaced(tmp_path: Path, is_replaced: bool) -> None:
    write(tmp_path, ["a.png"])
    replaced = OwnFiles(tmp_path)._claim({tmp_path / "results.json": tmp_path / "results.jsonl"})
    assert replaced == []
    if is_replaced:
        shutil.copy(tmp_path / "results.jsonl", tmp_path / "results.json")
    write(tmp_path, ["b.png"])
    assert [image["name"] for image in results(tmp_path)["images"]] == ["b.png"]


EXPORTS = {
    "labelme": "labelme/a.json", "yolo": "yolo/labels/a.txt", "csv": "faces.csv", "coco": "coco.json",
    "cvat": "cvat/annotations.xml",
}  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("format_name", EXPORTS)
def test_annotations_that_the_user_edited_are_kept_and_named(tmp_path: Path, format_name: str, resume: bool) -> None:
    options = replace(PLAIN, export=(format_name,))
    write(tmp_path, ["a.png", "b.png"], options=options)
    before = files_below(tmp_path)
    annotation = tmp_path / "exports" / EXPORTS[format_name]
    original = annotation.read_text()
    assert write(tmp_path, ["a.png", "b.png"], options=options).notes == []
    annotation.write_text("edited")
    names = ["a.png", "b.png"]
    if resume:
        writer = ResultWriter(tmp_path, "exp", {}, names=names, options=replace(options, resume=True))
        writer.close()
    else:
        writer = write(tmp_path, names, options=options)
    assert writer.notes == [f"{annotation}: edited, or not written by a run, and therefore kept"]
    assert annotation.read_text() == "edited"
    assert files_below(tmp_path) == before
    annotation.unlink()
    assert write(tmp_path, names, options=options).notes == []
    assert annotation.read_text() == original


def test_annotations_of_the_user_are_kept_and_counted(tmp_path: Path) -> None:
    yolo = tmp_path / "exports/yolo"
    (yolo / "labels").mkdir(parents=True)
    for name in ("data.yaml", "labels/a.txt", "labels/mine.txt"):
        (yolo / name).write_text("mine")
    (yolo / "images").mkdir()
    writer = write(tmp_path, ["a.png", "b.png"], options=replace(PLAIN, export=("yolo",)), images=tmp_path)
    (note,) = writer.notes
    assert note.endswith(" and 2 more: edited, or not written by a run, and therefore kept")
    kept = {path.relative_to(yolo).as_posix() for path in yolo.rglob("*.*") if path.read_text() == "mine"}
    assert kept == {"data.yaml", "labels/a.txt", "labels/mine.txt"}
    assert (yolo / "labels/b.txt").read_text()


def test_earlier_results_are_kept_until_the_new_ones_are_complete(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"])
    writer = write(tmp_path, ["b.png", "c.png"], close=False)
    assert [image["name"] for image in results(tmp_path)["images"]] == ["a.png"]
    writer.close()  # as an interrupted run does
    assert [image["name"] for image in results(tmp_path)["images"]] == ["b.png", "c.png"]
    assert files_below(tmp_path) == TABLES


def test_undecodable_names_are_preserved(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")  # Latin-1
    write(tmp_path, [name], options=DRAWINGS)
    assert results(tmp_path)["images"][0]["name"] == name
    assert (tmp_path / "exp_inference_results.txt").read_bytes().startswith(b"caf\xe9.png\n")
    assert (tmp_path / "result_images" / name).is_file()


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"file.*: cannot be written to"):
            ResultWriter(folder, "exp", {})
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results\.json: cannot be written"):
        ResultWriter(tmp_path, "exp", {})


def test_unwritable_file_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, "exp", {}, options=DRAWINGS)
    writer.add("a.png", grey_image(), faces())
    (tmp_path / "result_images" / "sub").touch()
    with pytest.raises(UserError, match=r"result_images/sub.*: cannot be written"):
        writer.add("sub/b.png", grey_image(), faces())
    writer.close()
    assert results(tmp_path)["files"] == ["result_images/a.png"]


def test_drawings_of_a_video_become_a_video(tmp_path: Path) -> None:
    write(tmp_path, ["my_clip_000001.jpg", "my_clip_000002.jpg"], options=DRAWINGS, frames_per_second=10.0)
    assert results(tmp_path)["files"] == ["result_images/my_clip.mp4"]
    written = cv2.VideoCapture(str(tmp_path / "result_images" / "my_clip.mp4"))
    assert written.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert [written.read()[0] for _ in range(3)] == [True, True, False]


def test_video_that_cannot_be_encoded_is_an_error(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, "exp", {}, options=DRAWINGS, frames_per_second=1e9)
    with pytest.raises(UserError, match="cannot encode it at"):
        writer.add("clip_000001.jpg", grey_image(), faces())
    writer.close()
    assert results(tmp_path)["files"] == []


def test_images_are_listed_in_the_order_of_their_positions(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, "exp", {}, names=["a.jpg", "b.jpg"])
    writer.add("b.jpg", grey_image(), faces(0), position=1)
    with pytest.raises(UserError, match="holds results of 1 of 2 images; --resume does the rest"):
        writer.close()
    resumed = ResultWriter(tmp_path, "exp", {}, names=["a.jpg", "b.jpg"], options=RESUMED)
    assert resumed.start.done.tolist() == [1]
    resumed.add("a.jpg", grey_image(), faces(0), position=0)
    resumed.close()
    assert [image["name"] for image in results(tmp_path)["images"]] == ["a.jpg", "b.jpg"]
    assert (resumed.summary.images, resumed.summary.former) == (2, 1)
    assert "2 images (1 by an earlier run), 0 faces in 1.0 s (1.0 images/s)" in resumed.summary.describe(1)
    assert files_below(tmp_path) == TABLES


def test_interrupted_run_writes_its_tables_and_can_be_resumed(tmp_path: Path) -> None:
    names = ["a.png", "b.png"]
    with pytest.raises(KeyboardInterrupt), ResultWriter(tmp_path, "exp", {}, names=names) as writer:
        writer.add("a.png", grey_image(), faces())
        raise KeyboardInterrupt
    assert [image["name"] for image in results(tmp_path)["images"]] == ["a.png"]
    with ResultWriter(tmp_path, "exp", {}, names=names, options=RESUMED) as resumed:
        resumed.add("b.png", grey_image(), faces(), position=1)
    assert [image["name"] for image in results(tmp_path)["images"]] == names


def test_new_run_removes_what_an_interrupted_one_wrote(tmp_path: Path) -> None:
    writer = ResultWriter(tmp_path, "exp", {}, options=DRAWINGS)
    writer.add("a.png", grey_image(), faces())
    del writer  # killed
    fresh = write(tmp_path, ["b.png"], options=DRAWINGS)
    assert fresh.start.note == "replacing 1 results of a run that was interrupted (--resume keeps them)"
    assert files_below(tmp_path) == TABLES | {"result_images/b.png"}


def test_resumed_run_must_have_the_same_settings(tmp_path: Path) -> None:
    ResultWriter(tmp_path, "exp", {"detection": {"top_k": 0}}, names=["a.png"])
    with pytest.raises(UserError, match=r"were made with detection\.top_k 0, now it is 5; repeat the flags"):
        ResultWriter(tmp_path, "exp", {"detection": {"top_k": 5}}, names=["a.png"], options=RESUMED)


def test_resuming_a_complete_run_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"], options=DRAWINGS)
    before = files_below(tmp_path)
    again = ResultWriter(tmp_path, "exp", {}, names=["a.png"], options=RESUMED)
    again.close()
    assert again.start.is_complete
    assert files_below(tmp_path) == before


def test_files_of_earlier_runs_are_kept_until_a_run_is_complete(tmp_path: Path) -> None:
    """Two interrupted runs follow a complete one; the fourth run removes the files of all three."""
    write(tmp_path, ["a.png"], options=DRAWINGS)
    for name in ("b.png", "c.png"):
        with pytest.raises(KeyboardInterrupt), ResultWriter(tmp_path, "exp", {}, options=DRAWINGS) as writer:
            writer.add(name, grey_image(), faces())
            raise KeyboardInterrupt
    assert files_below(tmp_path / "result_images") == {"a.png", "b.png", "c.png"}
    write(tmp_path, ["c.png", "d.png"], options=DRAWINGS)
    assert files_below(tmp_path) == TABLES | {"result_images/c.png", "result_images/d.png"}
    assert RecordStore(tmp_path / ".records/exp").run == {
        "settings": {},
        "threads": None,
        "former_files": [],
        "complete": True,
    }


def test_resumed_run_removes_the_files_of_earlier_runs(tmp_path: Path) -> None:
    write(tmp_path, ["a.png"], options=DRAWINGS)
    names = ["b.png", "c.png"]
    killed = ResultWriter(tmp_path, "exp", {}, names=names, options=DRAWINGS)
    killed.add("b.png", grey_image(), faces())
    del killed
    with ResultWriter(tmp_path, "exp", {}, names=names, options=replace(DRAWINGS, resume=True)) as resumed:
        resumed.add("c.png", grey_image(), faces(), position=1)
    assert files_below(tmp_path) == TABLES | {"result_images/b.png", "result_images/c.png"}


def test_tables_of_another_experiment_are_replaced_and_its_images_are_kept(tmp_path: Path) -> None:
    """There is one results.json in a folder, so results of both would be mixed up."""
    write(tmp_path, ["a.png", "b.png"], options=DRAWINGS)
    with pytest.raises(UserError, match='were made with experiment null, now it is "other"'):
        ResultWriter(tmp_path, "other", {"experiment": "other"}, names=["b.png"], options=RESUMED)
    writer = ResultWriter(tmp_path, "other", {"experiment": "other"}, names=["b.png"], options=DRAWINGS)
    assert writer.start.note == "replacing the results of an earlier run"
    writer.add("b.png", grey_image(), faces())
    assert files_below(tmp_path / "result_images") == {"a.png", "b.png"}
    writer.close()
    assert files_below(tmp_path / "result_images") == {"a.png", "b.png"}
    assert {path.name for path in (tmp_path / ".records").iterdir()} == {"other", "written.json"}


def test_run_of_another_experiment_that_was_interrupted_can_be_resumed(tmp_path: Path) -> None:
    names = ["a.png", "b.png"]
    with pytest.raises(KeyboardInterrupt), ResultWriter(tmp_path, "exp", {}, names=names) as writer:
        writer.add("a.png", grey_image(), faces())
        raise KeyboardInterrupt
    with ResultWriter(tmp_path, "other", {"experiment": "other"}, names=["c.png"]) as other:
        other.add("c.png", grey_image(), faces())
    assert ResultWriter(tmp_path, "exp", {}, names=names, options=RESUMED).start.done.tolist() == [0]


def test_interrupted_video_is_final(tmp_path: Path) -> None:
    """A video cannot be resumed."""
    with (
        pytest.raises(KeyboardInterrupt),
        ResultWriter(tmp_path, "exp", {}, options=DRAWINGS, frames_per_second=10.0) as writer,
    ):
        writer.add("clip_000001.jpg", grey_image(), faces())
        raise KeyboardInterrupt
    assert files_below(tmp_path) == TABLES | {"result_images/clip.mp4"}
    assert write(tmp_path, ["b.png"]).start.note == "replacing the results of an earlier run"
    assert files_below(tmp_path) == TABLES


def test_files_do_not_depend_on_interruptions_or_earlier_runs(tmp_path: Path) -> None:
    """All files are byte-identical, including the records."""
    names = ["a.png", "b.png", "c.png"]
    write(tmp_path / "uninterrupted", names, options=DRAWINGS)
    write(tmp_path / "resumed", ["d.png"], options=CROPS)
    writer = ResultWriter(tmp_path / "resumed", "exp", {}, names=names, options=DRAWINGS)
    writer.add("b.png", grey_image(1), faces(), [HEAD], position=1)
    del writer  # killed
    with ResultWriter(tmp_path / "resumed", "exp", {}, names=names, options=replace(DRAWINGS, resume=True)) as resumed:
        resumed.add("c.png", grey_image(2), faces(), [HEAD], position=2)
        resumed.add("a.png", grey_image(0), faces(), [HEAD], position=0)
    uninterrupted, interrupted = (
        {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "uninterrupted", tmp_path / "resumed")
    )
    assert interrupted == uninterrupted
    assert {".records/exp/run.json", ".records/exp/0.jsonl"} < uninterrupted.keys()
