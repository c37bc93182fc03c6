"""Tests of finding, loading, converting and saving checkpoints."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from config import (
    USUAL_LEVELS,
    ExperimentConfig,
    ImagePyramidConfig,
    LevelConfig,
    ModelOverrides,
)
from models.architecture import usual_config
from models.checkpoint import FORMAT, load_backbone, load_checkpoint, locate_checkpoint, save_checkpoint
from models.detector import FaceDetector
from models.foreign_checkpoint import CheckpointError, describe_anchors
from models.image_pyramid import build_model
from models.initialise import load_model
from models.retinaface import RetinaFace
from utils.errors import ConfigError
from utils.options import to_dict
from utils.runtime.experiment import save_config

SMALL = usual_config("mobilenet0.25", num_anchor=2)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint of this project in the folder of an experiment, with its configuration beside it."""
    config = ExperimentConfig(model=SMALL)
    path = tmp_path / "experiments/mine/ckpt/mobilenet0.25_ckpt-best.pth"
    save_checkpoint(path, config, RetinaFace(SMALL).state_dict(), epoch=3)
    save_config(config, path.parent.parent / "config.json")
    return path


# --------------------------------------------------------------------------------------------- published weights


def test_biubug6_detections_are_those_of_its_own_program(shared: Path) -> None:
    """Thirty images: the same boxes in any order, within 0.5 pixels, and scores within 0.001."""
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


def test_published_checkpoint_is_recognised_by_its_content(shared: Path, tmp_path: Path) -> None:
    copy = tmp_path / "renamed.bin"
    copy.write_bytes((shared / "weights/mobilenet0.25_Final.pth").read_bytes())
    checkpoint = load_checkpoint(copy)
    assert checkpoint.kind == "biubug6"
    assert checkpoint.note is None
    assert checkpoint.model_config == usual_config(
        "mobilenet0.25", num_anchor=2, cascade=False, model_version="retina", score_exponent=1.0
    )
    with pytest.raises(CheckpointError, match=r"--activation_slope=0\.1"):
        load_checkpoint(copy, ModelOverrides(activation_slope=0.0))


def test_other_family_takes_slope_and_anchors_from_flags(shared: Path, tmp_path: Path) -> None:
    """Both model families of biubug6 have tensors of the same names and shapes, so flags must choose the family."""
    weights = shared / "weights/mobilenet0.25_Final.pth"
    state = torch.load(weights, map_location="cpu", weights_only=True)
    path = tmp_path / "own_training.pth"
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, path)
    assumed = load_checkpoint(path)
    assert assumed.note is not None
    assert "--activation_slope=0.1" in assumed.note
    sizes = ((10, 20), (32, 64), (128, 256))
    chosen = load_checkpoint(path, ModelOverrides(activation_slope=0.0, anchor_sizes=sizes))
    assert (chosen.note, chosen.model_config.activation_slope, describe_anchors(chosen.model_config.levels)) == (
        None,
        0.0,
        "10,20/32,64/128,256",
    )
    slopes = {m.negative_slope for m in load_model(chosen).modules() if isinstance(m, torch.nn.LeakyReLU)}
    assert slopes == {0.0}
    assert load_checkpoint(path, ModelOverrides(variances=(0.2, 0.3))).model_config.variances == (0.2, 0.3)
    with pytest.raises(CheckpointError, match=r"trained with variances 0\.1,0\.2, but --variances=0\.2,0\.3"):
        load_checkpoint(weights, ModelOverrides(variances=(0.2, 0.3)))


def test_imagenet_backbone_is_loaded_completely(shared: Path) -> None:
    state, is_imagenet = load_backbone(shared / "weights/mobilenetV1X0.25_pretrain.tar", "mobilenet0.25")
    assert is_imagenet
    assert state.keys() == RetinaFace(SMALL).backbone.state_dict().keys()
    with pytest.raises(CheckpointError, match="backbone is resnet18"):
        load_backbone(shared / "weights/mobilenetV1X0.25_pretrain.tar", "resnet18")


@pytest.mark.parametrize(
    ("prefix", "wrappers"),
    [
        ("_orig_mod.", ["model"]),
        ("module._orig_mod.", []),
        ("model.", ["state_dict"]),
        ("", ["ema"]),
        ("module.", ["ema", "module"]),
        ("", ["model", "state_dict"]),
        ("", ["state_dict", "model"]),
    ],
)
def test_wrappers_and_prefixes_of_other_programs_are_removed(prefix: str, wrappers: list[str], tmp_path: Path) -> None:
    content: dict[str, Any] = {
        f"{prefix}{name}": value for name, value in RetinaFace(SMALL).backbone.state_dict().items()
    }
    content["n_averaged"] = torch.tensor(3)
    for wrapper in reversed(wrappers):
        content = {"epoch": 3, wrapper: content}
    torch.save(content, tmp_path / "some.pth")
    state, _ = load_backbone(tmp_path / "some.pth", "mobilenet0.25")
    assert state.keys() == RetinaFace(SMALL).backbone.state_dict().keys()


# ------------------------------------------------------------------------------------------------ our own


def test_loading_a_checkpoint_inverts_saving(own: Path) -> None:
    checkpoint = load_checkpoint(own)
    assert (checkpoint.kind, checkpoint.model_config, checkpoint.training["epoch"]) == ("own", SMALL, 3)
    load_model(checkpoint)


def test_checkpoint_must_agree_with_the_configuration_beside_it(own: Path) -> None:
    other = usual_config("mobilenet0.25", num_anchor=3)
    save_config(ExperimentConfig(model=other), own.parent.parent / "config.json")
    with pytest.raises(CheckpointError, match=r"not that of .*config\.json"):
        load_checkpoint(own)


def test_first_stage_of_a_cascade_runs_alone(own: Path) -> None:
    whole, first = load_model(load_checkpoint(own)), load_model(load_checkpoint(own, ModelOverrides(cascade=False)))
    images = torch.zeros(1, 3, 40, 64)
    with torch.inference_mode():
        torch.testing.assert_close(first.eval()(images)[-1].box_deltas, whole.eval()(images)[0].box_deltas)
    assert len(first.stages) == 1


def test_landmarks_can_be_removed_but_not_added(own: Path) -> None:
    without = load_checkpoint(own, ModelOverrides(landmark_loss=False))
    detector = FaceDetector(load_model(without), ExperimentConfig().inference)
    assert detector.detect(np.zeros((40, 64, 3), np.uint8)).landmarks is None
    save_checkpoint(own.with_name("bare.pth"), ExperimentConfig(model=without.model_config), without.state)
    (own.parent.parent / "config.json").unlink()
    with pytest.raises(CheckpointError, match="without landmarks"):
        load_checkpoint(own.with_name("bare.pth"), ModelOverrides(landmark_loss=True))


@pytest.mark.parametrize(
    ("flag", "value", "saved"),
    [
        ("backbone", "resnet18", "mobilenet0.25"),
        ("num_anchor", 3, "2"),
        ("model_version", "retina", "tina"),
        ("fpn_channels", 32, "64"),
    ],
)
def test_contradicting_flag_is_refused_with_both_values(own: Path, flag: str, value: Any, saved: str) -> None:
    with pytest.raises(CheckpointError) as exc_info:
        load_checkpoint(own, ModelOverrides(**{flag: value}))
    assert saved in str(exc_info.value)
    assert f"--{flag}={value}" in str(exc_info.value)


def test_fine_levels_can_be_added_for_inference(own: Path) -> None:
    checkpoint = load_checkpoint(own, ModelOverrides(fine_levels=2, coarse_share=0.3))
    pyramid = ImagePyramidConfig(2, native_scale_weight=0.3, half_scale_weight=0.3)
    assert checkpoint.model_config == dataclasses.replace(SMALL, image_pyramid=pyramid)
    model, usual = load_model(checkpoint), load_model(load_checkpoint(own))
    assert [level.anchor_sizes for level in model.levels] == [(8, 16), (32, 64), (64, 128), (256, 512)]
    state, former = model.state_dict(), usual.state_dict()
    for name, value in former.items():
        assert torch.equal(state.pop(name), value)
    # The other tensors are copies of the finest two levels, for the upsampled image.
    assert {name.split(".")[3] for name in state} == {"0", "1"}
    for name, value in state.items():
        assert torch.equal(value, former[name.removeprefix("upsampled_")])


def test_fine_levels_halve_custom_anchors(tmp_path: Path) -> None:
    model = dataclasses.replace(SMALL, levels=(LevelConfig(8, (9, 18)), *USUAL_LEVELS[2][1:]))
    save_checkpoint(tmp_path / "some.pth", ExperimentConfig(model=model), RetinaFace(model).state_dict())
    fine = load_model(load_checkpoint(tmp_path / "some.pth", ModelOverrides(fine_levels=1)))
    assert fine.levels == (LevelConfig(4, (4.5, 9)), *model.levels)


def test_other_variances_are_refused(own: Path) -> None:
    with pytest.raises(CheckpointError, match=r"trained with variances 0\.1,0\.2, but --variances=0\.2,0\.3"):
        load_checkpoint(own, ModelOverrides(variances=(0.2, 0.3)))


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_another_number_of_fine_levels_is_refused(asked: int, tmp_path: Path) -> None:
    model = dataclasses.replace(SMALL, image_pyramid=ImagePyramidConfig(2))
    save_checkpoint(tmp_path / "some.pth", ExperimentConfig(model=model), build_model(model).state_dict())
    with pytest.raises(CheckpointError, match=f"fine_levels 2, but --fine_levels={asked}"):
        load_checkpoint(tmp_path / "some.pth", ModelOverrides(fine_levels=asked))


@pytest.mark.parametrize("saved", [(), (16, 16)])
def test_other_channels_of_the_fine_levels_are_refused(saved: tuple[int, ...], tmp_path: Path) -> None:
    model = dataclasses.replace(SMALL, image_pyramid=ImagePyramidConfig(2, upsampled_channels=saved))
    save_checkpoint(tmp_path / "some.pth", ExperimentConfig(model=model), build_model(model).state_dict())
    with pytest.raises(CheckpointError, match="not trained with this --fine_channels; drop the flag"):
        load_checkpoint(tmp_path / "some.pth", ModelOverrides(fine_channels=(16, 20)))


@torch.inference_mode()
def test_fine_levels_that_shared_the_backbone_get_a_copy_of_it(tmp_path: Path) -> None:
    """Checkpoints used to have no backbone for levels with channels of their own."""
    config = dataclasses.replace(SMALL, image_pyramid=ImagePyramidConfig(2, upsampled_channels=(16, 20)))
    model = build_model(config)
    state = model.state_dict()
    model.load_state_dict(state | {f"upsampled_{name}": state[name] for name in state if name.startswith("backbone.")})
    shared = {name: value for name, value in model.state_dict().items() if not name.startswith("upsampled_backbone.")}
    save_checkpoint(tmp_path / "some.pth", ExperimentConfig(model=config), shared)
    image = torch.rand(1, 3, 64, 64) * 255
    loaded = load_model(load_checkpoint(tmp_path / "some.pth"))
    torch.testing.assert_close(loaded.eval()(image)[-1].class_logits, model.eval()(image)[-1].class_logits)


def test_two_stages_of_a_single_stage_checkpoint_are_refused(tmp_path: Path) -> None:
    model = dataclasses.replace(SMALL, stages=SMALL.stages[:1])
    save_checkpoint(tmp_path / "a.pth", ExperimentConfig(model=model), RetinaFace(model).state_dict())
    with pytest.raises(CheckpointError, match="one stage"):
        load_checkpoint(tmp_path / "a.pth", ModelOverrides(cascade=True))


# ------------------------------------------------------------------------------------ the first checkpoint format


def save_first_format(path: Path, refinement: str = "sum") -> dict[str, Tensor]:
    """A checkpoint of the format `retinaface-1` with two upsampled levels; returns its tensors.

    There were four levels: 0 and 1 of strides 4 and 8 in the upsampled image, and 2 and 3 of strides 16 and 32.
    """
    usual = usual_config("mobilenet0.25", num_anchor=2, refinement=refinement)
    state: dict[str, Tensor] = {}
    for name, tensor in RetinaFace(usual).state_dict().items():
        part = re.fullmatch(r"(stages\.\d\.\w+)\.0\.(.+)", name)
        if part:  # tensors of all levels have the same shapes
            state |= {f"{part[1]}.{level}.{part[2]}": torch.rand(tensor.shape).to(tensor.dtype) for level in range(4)}
        elif not name.startswith("stages."):
            state[name] = tensor
    values = to_dict(ExperimentConfig(model=usual))
    del values["model"]["levels"], values["model"]["image_pyramid"]
    values["model"] |= {"anchor_sizes": [[8, 16], [32, 64], [64, 128], [256, 512]], "strides": [4, 8, 16, 32]}
    values["model"] |= {"fine_levels": 2, "context_share": 0.3, "coarse_share": 0.0}
    values["data"]["cache_side"] = 0
    torch.save({"format": "retinaface-1", "config": values, "model": state, "epoch": 3}, path)
    return state


def test_levels_of_the_first_format_are_converted(tmp_path: Path) -> None:
    """Heads of level 0 were shared by stride 4 of the upsampled image and stride 8; each has its own now."""
    former = save_first_format(tmp_path / "former.pth")
    checkpoint = load_checkpoint(tmp_path / "former.pth")
    expected = usual_config("mobilenet0.25", num_anchor=2, image_pyramid=ImagePyramidConfig(2, 0.3))
    assert (checkpoint.model_config, checkpoint.training) == (expected, {"epoch": 3})
    state = load_model(checkpoint).state_dict()
    names = {"upsampled_stages": {0: 0, 1: 1}, "stages": {0: 0, 1: 2, 2: 3}}
    for name, value in state.items():
        part = re.fullmatch(r"(\w*stages)\.(\d\.\w+)\.(\d)\.(.+)", name)
        source = f"stages.{part[2]}.{names[part[1]][int(part[3])]}.{part[4]}" if part else name
        assert torch.equal(value, former[source]), name


def test_later_stages_of_the_first_format_take_the_landmarks_of_the_first_stage(tmp_path: Path) -> None:
    save_first_format(tmp_path / "former.pth", "rematch")
    checkpoint = load_checkpoint(tmp_path / "former.pth")
    state = load_model(checkpoint).state_dict()
    for prefix, levels in (("stages", 3), ("upsampled_stages", 2)):
        for level in range(levels):
            first, second = (f"{prefix}.{stage}.heads.{level}.landmark_deltas.weight" for stage in (0, 1))
            assert torch.equal(state[first], state[second])
            assert not torch.equal(state[first.replace("landmark", "box")], state[second.replace("landmark", "box")])
    # A checkpoint of the current format keeps the landmarks of its second stage.
    state["stages.1.heads.0.landmark_deltas.weight"] += 1
    save_checkpoint(tmp_path / "new.pth", ExperimentConfig(model=checkpoint.model_config), state)
    again = load_checkpoint(tmp_path / "new.pth").state
    assert all(torch.equal(again[name], value) for name, value in state.items())


# ------------------------------------------------------------------------------------------------- errors


def test_unknown_content_is_described(tmp_path: Path) -> None:
    cases = {
        "text.pth": b"hello",
        "empty.pth": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / name)
    (tmp_path / "lfs.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"lfs\.pth: a Git LFS pointer, not the file itself: git lfs pull"):
        load_checkpoint(tmp_path / "lfs.pth")
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"not a detector's checkpoint.*conv\.weight"):
        load_checkpoint(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds a list"):
        load_checkpoint(tmp_path / "list.pth")


def test_missing_extra_and_misshapen_tensors_are_named(own: Path) -> None:
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


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda tensor: tensor.to("meta"), lambda tensor: tensor + 1j])
def test_weights_that_are_not_dense_real_numbers_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor]
) -> None:
    state = RetinaFace(SMALL).state_dict()
    name = "fpn.merge.0.0.weight"
    state[name] = change(state[name])
    config = to_dict(ExperimentConfig(model=SMALL))
    torch.save({"format": "retinaface-2", "config": config, "model": state}, tmp_path / "own.pth")
    torch.save(state, tmp_path / "foreign.pth")
    for load in (load_checkpoint, partial(load_backbone, backbone="mobilenet0.25")):
        for file in ("own.pth", "foreign.pth"):
            with pytest.raises(CheckpointError, match=rf"{name} is sparse, quantised, complex or without data"):
                load(tmp_path / file)


@pytest.mark.parametrize("value", [torch.full((64,), torch.nan), torch.tensor([*[0.0] * 63, torch.inf])])
def test_weights_that_are_not_finite_are_refused(value: Tensor, tmp_path: Path) -> None:
    name = "fpn.merge.0.1.bias"
    content = {"format": FORMAT, "config": to_dict(ExperimentConfig(model=SMALL))}
    torch.save({**content, "model": {**RetinaFace(SMALL).state_dict(), name: value}}, tmp_path / "own.pth")
    with pytest.raises(CheckpointError, match=rf"own\.pth: {name} is not finite; training diverged or"):
        load_checkpoint(tmp_path / "own.pth")
    torch.save({"stage1.0.0.weight": value}, tmp_path / "backbone.pth")
    with pytest.raises(CheckpointError, match=r"backbone\.pth: stage1\.0\.0\.weight is not finite"):
        load_backbone(tmp_path / "backbone.pth", "mobilenet0.25")


def test_failed_save_keeps_the_previous_checkpoint(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        save_checkpoint(own, ExperimentConfig(model=SMALL), {})
    assert own.read_bytes() == before
    assert list(own.parent.iterdir()) == [own]


# ----------------------------------------------------------------------------------------------- locating


def test_checkpoint_is_found_with_a_backbone_prefix(own: Path) -> None:
    experiments = own.parent.parent.parent
    assert locate_checkpoint(experiments, "mine", "ckpt-best.pth") == own
    assert locate_checkpoint(experiments, "mine", own.name) == own
    assert locate_checkpoint(experiments, "anything", str(own)) == own


def test_experiment_takes_precedence_over_the_current_folder(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiments = own.parent.parent.parent
    here = tmp_path / "here"
    here.mkdir()
    for name in ("ckpt-best.pth", "other.pth", own.name):
        (here / name).touch()
    monkeypatch.chdir(here)
    for name in ("ckpt-best.pth", own.name):
        assert locate_checkpoint(experiments, "mine", name) == own
        assert locate_checkpoint(experiments, "mine", f"./{name}").resolve() == here / name
    assert locate_checkpoint(experiments, "mine", "other.pth").resolve() == here / "other.pth"
    own.with_name("resnet50_ckpt-best.pth").touch()
    with pytest.raises(CheckpointError, match="more than one"):
        locate_checkpoint(experiments, "mine", "ckpt-best.pth")


def test_missing_checkpoint_is_explained(own: Path) -> None:
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
