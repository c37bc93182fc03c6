"""Tests of the annotation formats of other tools: writing, reading back, and compatibility with those tools."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from tests.scripts import run_script
from utils.datasets import convert_labels
from utils.datasets.convert_labels import convert_annotations, main
from utils.datasets.formats.annotations import AnnotatedImage, upright_size
from utils.datasets.formats.registry import FORMATS, check_names
from utils.datasets.label_file import read_labels
from utils.datasets.labels import DatasetError, FaceRow, labelled_image
from utils.errors import UserError
from utils.structures import Faces

POINTS = [[12.0, 14.5], [18.25, 14.0], [15.0, 18.0], [12.5, 22.0], [17.5, 22.0]]
MARKUP = 'sub/<img src=x onerror="alert(1)"> & ü.jpg'
NAMES = ("a.jpg", MARKUP, "none.png")


def annotated(with_scores: bool = False) -> list[AnnotatedImage]:
    """Return three images of 64 x 48: two with one face with landmarks and one without, and one without faces."""
    rows = [FaceRow([10.1, 10, 20, 30.7], POINTS), FaceRow([30, 5.25, 63.9, 47])]
    images = []
    for name in NAMES:
        faces = labelled_image(Path(name), rows if name != "none.png" else []).faces
        scores = np.linspace(0.9, 0.6, len(faces)) if with_scores else None
        images.append(AnnotatedImage(name, 64, 48, faces, scores))
    return images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The image files that `annotated` names."""
    folder = tmp_path / "images"
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(folder / name)
    return folder


def assert_same(found: Faces, expected: Faces) -> None:
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-4)
    np.testing.assert_array_equal(found.has_landmarks, expected.has_landmarks)
    np.testing.assert_allclose(found.landmarks, expected.landmarks, atol=1e-4)
    np.testing.assert_array_equal(found.ignored, expected.ignored)


@pytest.mark.parametrize("with_scores", [False, True])
@pytest.mark.parametrize("format_name", FORMATS)
def test_reading_inverts_writing(format_name: str, with_scores: bool, photos: Path, tmp_path: Path) -> None:
    target = tmp_path / FORMATS[format_name].file
    images = annotated(with_scores)
    FORMATS[format_name].write(target, images, photos)
    FORMATS[format_name].write(target, images, photos)  # the second time it is replaced
    found = {image.path.as_posix(): image.faces for image in FORMATS[format_name].read(target, photos)}
    assert found.keys() == set(NAMES)
    for image in images:
        assert_same(found[image.name], image.faces)


@pytest.mark.parametrize("format_name", FORMATS)
def test_no_images_give_a_valid_file(format_name: str, tmp_path: Path) -> None:
    FORMATS[format_name].write(tmp_path / FORMATS[format_name].file, [], None)


@pytest.mark.parametrize("format_name", ["coco", "csv", "cvat", "labelme"])
def test_ignored_faces_stay_ignored(format_name: str, tmp_path: Path) -> None:
    faces = labelled_image(Path("a.jpg"), [FaceRow([1, 2, 3, 4], None, True), FaceRow([5, 6, 7, 8])]).faces
    FORMATS[format_name].write(tmp_path / "out", [AnnotatedImage("a.jpg", 64, 48, faces)], None)
    (found,) = FORMATS[format_name].read(tmp_path / "out", None)
    assert found.faces.ignored.tolist() == [True, False]


# ------------------------------------------------------------------------------------- readers of other tools


def test_pycocotools_loads_and_evaluates(tmp_path: Path) -> None:
    """Our detections have a box AP and a keypoint AP of 1 against themselves."""
    pycocotools = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    FORMATS["coco"].write(tmp_path / "coco.json", annotated(with_scores=True), None)
    truth = pycocotools.COCO(str(tmp_path / "coco.json"))
    assert truth.loadCats(truth.getCatIds())[0]["keypoints"][2] == "nose"
    assert [image["file_name"] for image in truth.loadImgs(truth.getImgIds())] == list(NAMES)
    for kind in ("bbox", "keypoints"):
        measured = evaluation.COCOeval(truth, truth.loadRes(truth.loadAnns(truth.getAnnIds())), kind)
        measured.params.kpt_oks_sigmas = np.full(5, 0.05)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
        assert measured.stats[0] == pytest.approx(1.0), kind


def test_yolo_passes_the_checks_of_ultralytics(photos: Path, tmp_path: Path) -> None:
    """Its checks: an image for every label, 5 + 5 * 3 columns, all of them in [0, 1], class 0, no duplicates."""
    FORMATS["yolo"].write(tmp_path / "yolo", annotated(), photos)
    data = dict(line.split(": ", 1) for line in (tmp_path / "yolo/data.yaml").read_text().splitlines() if ": " in line)
    assert data["kpt_shape"] == "[5, 3]"
    assert data["flip_idx"] == "[1, 0, 2, 4, 3]"
    lines = (tmp_path / "yolo" / data["train"]).read_text(encoding="utf-8").splitlines()
    assert lines == [f"./images/{name}" for name in NAMES]
    for line, count in zip(lines, (2, 2, 0), strict=True):
        image = str(tmp_path / "yolo" / line)
        assert Path(image).is_file()
        label = Path("/labels/".join(image.rsplit("/images/", 1)).rsplit(".", 1)[0] + ".txt")
        rows = np.array([row.split() for row in label.read_text().splitlines()], np.float32).reshape(-1, 20)
        assert len(np.unique(rows, axis=0)) == len(rows) == count
        assert not rows[:, 0].any()
        points = rows[:, 5:].reshape(-1, 5, 3)
        assert (rows[:, 1:5] >= 0).all() and (rows[:, 1:5] <= 1).all()
        assert (points[..., :2] >= 0).all() and (points[..., :2] <= 1).all()
        assert set(np.unique(points[..., 2])) <= {0, 2}


def test_yolo_clips_faces_at_the_border(tmp_path: Path) -> None:
    outside = labelled_image(Path("a.jpg"), [FaceRow([-10, -10, 32, 24], POINTS), FaceRow([70, 5, 80, 9])]).faces
    FORMATS["yolo"].write(tmp_path / "yolo", [AnnotatedImage("a.jpg", 64, 48, outside)], None)
    (line,) = (tmp_path / "yolo/labels/a.txt").read_text().splitlines()
    assert line.startswith("0 0.25 0.25 0.5 0.5 0.1875 ")


def test_cvat_has_the_fields_that_its_importer_needs(tmp_path: Path) -> None:
    """Names of images, numbers in attributes, and groups that tie the points to the boxes."""
    FORMATS["cvat"].write(tmp_path / "cvat", annotated(with_scores=True), None)
    root = ElementTree.parse(tmp_path / "cvat/annotations.xml").getroot()
    assert root.findtext("version") == "1.1"
    images = root.findall("image")
    assert [image.attrib["name"] for image in images] == list(NAMES)
    boxes, points = list(root.iter("box")), list(root.iter("points"))
    assert [box.attrib["group_id"] for box in boxes] == ["1", "2", "3", "4"]
    assert [point.attrib["group_id"] for point in points] == ["1", "3"]
    assert all({"xtl", "ytl", "xbr", "ybr", "occluded", "z_order", "label"} <= box.attrib.keys() for box in boxes)
    labels = json.loads((tmp_path / "cvat/labels.json").read_text())
    known = {label["name"]: {attribute["name"] for attribute in label["attributes"]} for label in labels}
    assert {each.attrib["label"] for each in [*boxes, *points]} == known.keys()
    assert {attribute.attrib["name"] for attribute in root.iter("attribute")} == known["face"]


def test_csv_has_a_row_per_face_and_per_image_without_faces(tmp_path: Path) -> None:
    FORMATS["csv"].write(tmp_path / "faces.csv", annotated(with_scores=True), None)
    with (tmp_path / "faces.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["a.jpg", "a.jpg", MARKUP, MARKUP, "none.png"]
    assert rows[0]["x1"] == "10.1"
    assert rows[0]["nose_y"] == "18.0"
    assert (rows[1]["nose_y"], rows[4]["x1"]) == ("", "")


def test_labelme_refers_to_the_images(photos: Path, tmp_path: Path) -> None:
    FORMATS["labelme"].write(tmp_path / "labelme", annotated(), photos)
    for name in NAMES:
        file = (tmp_path / "labelme" / name).with_suffix(".json")
        content = json.loads(file.read_text())
        assert (file.parent / content["imagePath"]).resolve() == (photos / name).resolve()
        assert (content["imageWidth"], content["imageHeight"], content["imageData"]) == (64, 48, None)


# ----------------------------------------------------------------------------------- files edited with other tools


def test_corrected_cvat_points_without_group_belong_to_the_box_around_them(tmp_path: Path) -> None:
    (tmp_path / "annotations.xml").write_text(
        '<annotations><image id="0" name="a.jpg" width="64" height="48">'
        '<box label="Face" xtl="0" ytl="0" xbr="30" ybr="30"/><box label="Face" xtl="40" ytl="0" xbr="60" ybr="30"/>'
        '<points label="landmarks" points="2,2;4,2;3,3;2,4;4,4"/></image></annotations>'
    )
    (image,) = FORMATS["cvat"].read(tmp_path, None)
    assert image.faces.has_landmarks.tolist() == [True, False]


def test_labelme_corners_may_be_in_any_order(tmp_path: Path) -> None:
    shape = {"label": "face", "points": [[20, 30], [10, 5]], "shape_type": "rectangle", "group_id": None}
    other = {"label": "dog", "points": [[1, 2], [3, 4]], "shape_type": "rectangle"}
    (tmp_path / "a.json").write_text(json.dumps({"shapes": [shape, other], "imagePath": "..\\images\\a.PNG"}))
    (image,) = FORMATS["labelme"].read(tmp_path, None)
    assert image.path.as_posix() == "a.PNG"
    assert image.faces.boxes.tolist() == [[10, 5, 20, 30]]


@pytest.mark.parametrize(
    ("format_name", "file", "content", "message"),
    [
        ("coco", "x.json", "{", "not annotations in COCO's form"),
        ("coco", "x.json", '{"images": [], "annotations": [{"category_id": 3}]}', "not annotations in COCO's form"),
        ("csv", "x.csv", "image,x1\n", "expected a column x2"),
        ("csv", "x.csv", "image,x1,y1,x2,y2\na.jpg,1,2,three,4\n", r"x\.csv:2: could not convert"),
        (
            "csv",
            "x.csv",
            "image,x1,y1,x2,y2,ignored\na.jpg,1,2,3,4,0.98\n",
            "x.csv:2: expected 0 or 1 for ignored, got 0.98",
        ),
        ("cvat", "x.xml", "<annotations>", "not annotations in CVAT's form"),
        ("cvat", "x.xml", "<annotations><track/></annotations>", "export it as 'CVAT for images 1.1'"),
        ("labelme", "x.json", "[]", "not in labelme's form"),
        ("yolo", "labels/a.txt", "0 1 2\n", r"a\.txt:1: expected '0 x y w h'"),
        ("yolo", "labels/a.txt", "3 .5 .5 .1 .1\n", r"a\.txt:1: expected class 0, the face, got 3"),
        ("yolo", "labels/b.txt", "0 .5 .5 .1 .1\n", "there is no image"),
    ],
)
def test_malformed_files_are_refused(
    format_name: str, file: str, content: str, message: str, photos: Path, tmp_path: Path
) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    with pytest.raises(DatasetError, match=message):
        FORMATS[format_name].read(tmp_path if format_name == "yolo" else path, photos)


def test_file_without_the_class_face_is_refused(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    annotations = [{"category_id": number, "image_id": 0, "bbox": [0, 0, 1, 1]} for number in (1, 2)]
    content = {"categories": categories, "images": [{"id": 0, "file_name": "a.jpg"}], "annotations": annotations}
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="none of its labels is 'face': cat, dog; rename"):
        FORMATS["coco"].read(tmp_path / "x.json", None)


def test_images_that_would_share_a_file_are_refused() -> None:
    check_names(["coco", "csv", "cvat"], ["a.jpg", "a.png"])
    check_names(["yolo"], ["a.jpg", "b/a.jpg"])
    with pytest.raises(UserError, match=r"--export yolo: several images are named a\.\*"):
        check_names(["coco", "yolo"], ["a.jpg", "a.png"])


@pytest.mark.parametrize("format_name", ["labelme", "yolo"])
@pytest.mark.parametrize("name", ["../other/b.jpg", "sub/../../other/b.jpg", "{root}/other/b.jpg"])
def test_no_annotation_is_written_outside_its_folder(format_name: str, name: str, photos: Path, tmp_path: Path) -> None:
    name = name.format(root=tmp_path)
    (tmp_path / "other").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "other/b.jpg")
    for suffix in (".json", ".txt"):
        (tmp_path / f"other/b{suffix}").write_text("mine")
    label = tmp_path / "label.txt"
    label.write_text(f"# a.jpg\n10 10 10 20\n# {name}\n10 10 10 20\n")
    with pytest.raises(UserError, match=r"other/b\.jpg: is outside the folder of the images"):
        main([str(label), f"--to={format_name}", f"--output={tmp_path}/deep/out/x", f"--images={photos}"])
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"b.jpg", "b.json", "b.txt"}
    assert (tmp_path / "other/b.json").read_text() == (tmp_path / "other/b.txt").read_text() == "mine"
    assert not list(tmp_path.glob("deep/**/b.*"))


def test_path_with_parent_folders_may_stay_inside_the_folder() -> None:
    check_names(["yolo"], ["a.jpg", "x/../b.jpg"])
    with pytest.raises(UserError, match=r"several images are named a\.\*"):
        check_names(["yolo"], ["a.jpg", "x/../a.jpg"])


def test_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert upright_size(tmp_path / "a.jpg") == (20, 30)
    with pytest.raises(DatasetError, match="give --images"):
        upright_size(tmp_path / "b.jpg")


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("format_name", FORMATS)
def test_labels_can_be_converted_to_every_format_and_back(format_name: str, photos: Path, tmp_path: Path) -> None:
    label = tmp_path / "label.txt"
    label.write_text(
        "# a.jpg\n10 10 10 20 12 14 0 18 14 0 15 18 0 12 22 0 18 22 0\n30 5 33 42\n# none.png\n# sub/b.jpg\n0 0 7 8\n"
    )
    Image.new("RGB", (64, 48)).save(photos / "sub/b.jpg")
    there = tmp_path / "there" / FORMATS[format_name].file
    there.parent.mkdir()
    main([str(label), f"--to={format_name}", f"--output={there}"])
    main([str(there), f"--from={format_name}", f"--to={tmp_path / 'back.txt'}", f"--images={photos}"])
    found, expected = ({i.path: i.faces for i in read_labels(p, Path())} for p in (tmp_path / "back.txt", label))
    assert found.keys() == expected.keys()
    for path, faces in expected.items():
        assert_same(found[path], faces)


@pytest.mark.parametrize("character", ["\n", "\r", "\x01", "\x0b", "\x1c", "\x85", "\u2028", "\uffff", "\udcff"])
def test_any_character_may_be_in_a_name(character: str, tmp_path: Path) -> None:
    faces = labelled_image(Path("a"), [FaceRow([1, 2, 3, 4])]).faces
    for name, format in FORMATS.items():
        format.write(tmp_path / format.file, [AnnotatedImage(f"a{character}b.jpg", 64, 48, faces)], None)
        if name != "yolo":  # needs the image to read its size
            (image,) = format.read(tmp_path / format.file, None)
            assert len(image.faces) == 1
    listed = (tmp_path / "yolo/train.txt").read_text(encoding="utf-8", errors="surrogateescape")
    assert len(listed.splitlines()) == 1


def test_normalised_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("image,x1,y1,x2,y2\na.jpg,0.1,0.2,0.3,0.4\n")
    result = run_script(convert_labels, tmp_path / "x.csv", "--from=csv", f"--to={tmp_path / 'label.txt'}")
    assert result.returncode == 1
    assert result.stderr == f"error: {tmp_path}/x.csv: its boxes are normalised to 0..1; expected pixels of the image\n"
    assert not (tmp_path / "label.txt").exists()


def test_command_prints_a_summary(photos: Path, tmp_path: Path) -> None:
    FORMATS["cvat"].write(tmp_path / "cvat", annotated(), None)
    flags = ["--from=cvat", f"--to={tmp_path / 'label.txt'}"]
    result = run_script(convert_labels, tmp_path / "cvat/annotations.xml", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert "3 images, 4 faces, 2 with landmarks" in result.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--from=cvat"], "--to must be a form, or name the file or folder to write"),
        (["--to=coco"], "--output must name the file or folder to write"),
        (["--to=coco", "--output=x", "--copy"], "--landmarks and --copy do nothing"),
        (["--to=coco", "--output=x"], "give --images"),
    ],
)
def test_command_refuses_invalid_flags(flags: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "label.txt").write_text("# a.jpg\n1 2 3 4\n")
    with pytest.raises(UserError, match=message):
        main([str(tmp_path / "label.txt"), *flags])


def test_ignored_faces_are_counted_separately(tmp_path: Path) -> None:
    (tmp_path / "faces.csv").write_text("image,x1,y1,x2,y2,ignored\na.jpg,1,2,3,4,0\na.jpg,5,6,9,9,1\n")
    found = convert_annotations(
        tmp_path / "faces.csv", tmp_path / "label.txt", source_format="csv", target_format=None, images=None
    )
    assert found == "1 images, 1 faces, 0 with landmarks, 1 to be ignored"
