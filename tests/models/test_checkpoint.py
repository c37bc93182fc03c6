"""Finding, recognising, refusing and writing checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from config import ConfigError, ExperimentConfig, Flags
from models.checkpoint import CheckpointError, load_backbone, load_checkpoint, locate_checkpoint, save_checkpoint
from models.detector import FaceDetector, load_model
from models.retinaface import RetinaFace

SMALL = usual_config("mobilenet0.25", num_anchor=2)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint of ours in an experiment's folder, with its configuration beside it."""
    config = ExperimentConfig(model=SMALL)
    path = tmp_path / "experiments/mine/ckpt/mobilenet0.25_ckpt-best.pth"
    save_checkpoint(path, config, RetinaFace(SMALL).state_dict(), epoch=3)
    config.save(path.parent.parent / "config.json")
    return path


# --------------------------------------------------------------------------------------------- published weights


def test_biubug6_detections_are_those_of_its_own_program(shared: Path) -> None:
    """Thirty pictures; as sets, boxes within 0.5 pixels and scores within 0.001."""
    reference = json.loads((shared / "reference/biubug6_mobilenet025_detections.json").read_text())["images"]
    detector = FaceDetector.from_checkpoint(
        shared / "weights/mobilenet0.25_Final.pth",
        confidence_threshold=0.02,
        nms_threshold=0.4,
        keep_top_k=750,
        clip_boxes=False,
    )
    for name, rows in reference.items():
        found = detector.detect(cv2.imread(str(shared / name)))
        expected = np.array(rows).reshape(-1, 15)
        assert len(found) == len(expected), name
        assert found.landmarks is not None
        distance = np.abs(found.boxes.numpy()[:, None] - expected[None, :, :4]).max(axis=2)
        partner = distance.argmin(axis=1)
        assert sorted(partner) == list(range(len(expected))), name
        assert distance.min(axis=1).max() < 0.5, name
        assert np.abs(found.scores.numpy() - expected[partner, 4]).max() < 1e-3, name
        assert np.abs(found.landmarks.flatten(1).numpy() - expected[partner, 5:]).max() < 0.5, name


def test_published_file_is_known_by_its_content_not_its_name(shared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "renamed.bin"
    copy.write_bytes((shared / "weights/mobilenet0.25_Final.pth").read_bytes())
    checkpoint = load_checkpoint(copy)
    assert checkpoint.kind == "biubug6"
    assert checkpoint.note is None
    assert checkpoint.model == usual_config(
        "mobilenet0.25", num_anchor=2, cascade=False, model_version="retina", score_exponent=1.0
    )
    with pytest.raises(CheckpointError, match=r"activation_slope 0\.1"):
        load_checkpoint(copy, Flags({"activation_slope": 0.0}))


def test_other_family_takes_slope_and_anchors_from_flags(shared: Path, tmp_path: Path) -> None:
    """The tensors of biubug6's two families have the same names and shapes: only the user can tell."""
    weights = shared / "weights/mobilenet0.25_Final.pth"
    state = torch.load(weights, map_location="cpu", weights_only=True)
    path = tmp_path / "own_training.pth"
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    assumed = load_checkpoint(path)
    assert assumed.note is not None
    assert "--activation_slope 0.1" in assumed.note
    sizes = ((10, 20), (32, 64), (128, 256))
    told = load_checkpoint(path, Flags({"activation_slope": 0.0, "anchor_sizes": sizes}))
    assert (told.note, told.model.activation_slope, told.model.anchor_sizes) == (None, 0.0, sizes)
    slopes = {m.negative_slope for m in load_model(told).modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes == {0.0}


def test_imagenet_backbone_loads_whole(shared: Path) -> None:
    state = load_backbone(shared / "weights/mobilenetV1X0.25_pretrain.tar", "mobilenet0.25")
    assert state.keys() == RetinaFace(SMALL).backbone.state_dict().keys()
    with pytest.raises(CheckpointError, match="backbone is resnet18"):
        load_backbone(shared / "weights/mobilenetV1X0.25_pretrain.tar", "resnet18")


# ------------------------------------------------------------------------------------------------ our own


def test_own_checkpoint_returns_what_was_saved(own: Path) -> None:
    checkpoint = load_checkpoint(own)
    assert (checkpoint.kind, checkpoint.model, checkpoint.training["epoch"]) == ("own", SMALL, 3)
    load_model(checkpoint)


def test_configuration_beside_must_agree(own: Path) -> None:
    other = usual_config("mobilenet0.25", num_anchor=3)
    ExperimentConfig(model=other).save(own.parent.parent / "config.json")
    with pytest.raises(CheckpointError, match=r"not that of .*config\.json"):
        load_checkpoint(own)


def test_first_stage_of_a_cascade_runs_alone(own: Path) -> None:
    whole, first = load_model(load_checkpoint(own)), load_model(load_checkpoint(own, Flags({"cascade": False})))
    images = torch.zeros(1, 3, 40, 64)
    with torch.inference_mode():
        torch.testing.assert_close(first.eval()(images)[-1].box_deltas, whole.eval()(images)[0].box_deltas)
    assert len(first.stages) == 1


def test_landmarks_can_be_left_out_but_not_invented(own: Path) -> None:
    without = load_checkpoint(own, Flags({"landmark_loss": False}))
    detector = FaceDetector(load_model(without), ExperimentConfig().inference)
    assert detector.detect(np.zeros((40, 64, 3), np.uint8)).landmarks is None
    save_checkpoint(own.with_name("bare.pth"), ExperimentConfig(model=without.model), without.state)
    (own.parent.parent / "config.json").unlink()
    with pytest.raises(CheckpointError, match="without landmarks"):
        load_checkpoint(own.with_name("bare.pth"), Flags({"landmark_loss": True}))


@pytest.mark.parametrize(
    ("flag", "value", "saved"),
    [
        ("backbone", "resnet18", "mobilenet0.25"),
        ("num_anchor", 3, "2"),
        ("model_version", "retina", "tina"),
        ("fpn_channels", 32, "64"),
    ],
)
def test_contradicting_flag_is_refused_with_both_values(own: Path, flag: str, value: object, saved: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        load_checkpoint(own, Flags({flag: value}))
    assert saved in str(refusal.value)
    assert f"--{flag}={value}" in str(refusal.value)


def test_fine_levels_can_be_added_where_a_detector_runs(own: Path) -> None:
    checkpoint = load_checkpoint(own, Flags({"fine_levels": 2}))
    assert checkpoint.model.anchor_sizes == ((8, 16), (32, 64), (64, 128), (256, 512))
    network, usual = load_model(checkpoint), load_model(load_checkpoint(own))
    heads = {name: value for name, value in usual.state_dict().items() if ".class_logits.weight" in name}
    for name, value in network.state_dict().items():
        if ".class_logits.weight" in name:  # levels of strides 8 and 16 enlarged, 16 and 32
            stage, level = name.split(".")[1], (0, 1, 1, 2)[int(name.split(".")[3])]
            assert torch.equal(value, heads[f"stages.{stage}.heads.{level}.class_logits.weight"])


def test_fine_levels_cannot_be_had_otherwise(tmp_path: Path) -> None:
    for fine_levels, sizes, message in (
        (2, None, "fine_levels 2, but --fine_levels=1"),
        (0, 9, "for the usual anchors"),
    ):
        model = usual_config("mobilenet0.25", num_anchor=2, fine_levels=fine_levels)
        if sizes:
            model = dataclasses.replace(model, anchor_sizes=((9, 18), (64, 128), (256, 512)))
        save_checkpoint(tmp_path / "some.pth", ExperimentConfig(model=model), RetinaFace(model).state_dict())
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "some.pth", Flags({"fine_levels": 1}))


def test_two_stages_of_a_single_stage_checkpoint_are_refused(tmp_path: Path) -> None:
    model = dataclasses.replace(SMALL, stages=SMALL.stages[:1])
    save_checkpoint(tmp_path / "a.pth", ExperimentConfig(model=model), RetinaFace(model).state_dict())
    with pytest.raises(CheckpointError, match="one stage"):
        load_checkpoint(tmp_path / "a.pth", Flags({"cascade": True}))


# ----------------------------------------------------------------------------------------------- refusals


def test_unknown_contents_are_named(tmp_path: Path) -> None:
    cases = {
        "text.pth": b"hello",
        "empty.pth": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"not a detector's checkpoint.*conv\.weight"):
        load_checkpoint(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pth")


def test_missing_left_over_and_misshapen_tensors_are_named(own: Path) -> None:
    whole = RetinaFace(SMALL).state_dict()
    name = "fpn.merge.0.1.bias"
    for state, message in (
        ({key: tensor for key, tensor in whole.items() if key != name}, "lacks " + name),
        ({**whole, "extra": torch.zeros(1)}, "has extra"),
        ({**whole, name: torch.zeros(3)}, r"of shape \(3,\), expected \(64,\)"),
    ):
        save_checkpoint(own, ExperimentConfig(model=SMALL), state)
        with pytest.raises(CheckpointError, match=message):
            load_model(load_checkpoint(own))


def test_unwritable_target_leaves_the_previous_checkpoint(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(own, ExperimentConfig(model=SMALL), {})
    assert own.read_bytes() == before
    assert list(own.parent.iterdir()) == [own]


# ----------------------------------------------------------------------------------------------- locating


def test_name_is_found_with_a_backbone_before_it(own: Path) -> None:
    experiments = own.parent.parent.parent
    assert locate_checkpoint(experiments, "mine", "ckpt-best.pth") == own
    assert locate_checkpoint(experiments, "mine", own.name) == own
    assert locate_checkpoint(experiments, "anything", str(own)) == own


def test_what_cannot_be_found_is_explained(own: Path) -> None:
    experiments = own.parent.parent.parent
    with pytest.raises(CheckpointError, match=r"no such experiment; choose --experiment_name from mine"):
        locate_checkpoint(experiments, "yours", "ckpt-best.pth")
    with pytest.raises(CheckpointError, match=r"it holds mobilenet0\.25_ckpt-best\.pth"):
        locate_checkpoint(experiments, "mine", "ckpt-last.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        locate_checkpoint(experiments, "mine", "elsewhere/ckpt-best.pth")
    own.with_name("resnet50_ckpt-best.pth").touch()
    with pytest.raises(CheckpointError, match="more than one"):
        locate_checkpoint(experiments, "mine", "ckpt-best.pth")


def test_damaged_configuration_is_a_config_error(own: Path) -> None:
    (own.parent.parent / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_checkpoint(own)
