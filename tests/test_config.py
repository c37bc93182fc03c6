"""Flags, their contradictions, and the JSON form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from config import (
    BACKBONES,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    Flags,
    InferenceOptions,
    LossConfig,
    ModelConfig,
    PostprocessConfig,
    RunOptions,
    StageConfig,
    TrainConfig,
    apply_overrides,
    from_dict,
    parse_flags,
    to_dict,
    usual_stages,
)

GROUPS = (RunOptions(), InferenceOptions(), ModelConfig(), DataConfig(), TrainConfig(), PostprocessConfig())


def parse(*words: str) -> Flags:
    return parse_flags("test", GROUPS, words)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--save_img"], True),
        (["--save_img", "True"], True),
        (["--save_img=False"], False),
        (["--save_img", "no"], False),
        ([], False),
    ],
)
def test_booleans_take_every_usual_form(words: list[str], value: bool) -> None:
    assert parse(*words).apply(InferenceOptions()).save_img is value


def test_only_given_flags_change_a_configuration() -> None:
    flags = parse("--epochs", "3", "--milestones", "1,2", "--batch_sixe=4")
    assert flags.apply(TrainConfig(learning_rate=0.5)) == TrainConfig(
        learning_rate=0.5, epochs=3, milestones=(1, 2), batch_size=4
    )


@pytest.mark.parametrize(("text", "weights"), [("1,0.25", (1.0, 0.25)), ("2", (2.0,)), ("", ())])
def test_dataset_weights_are_numbers_between_commas(text: str, weights: tuple[float, ...]) -> None:
    assert parse("--dataset_weights", text).apply(DataConfig(dataset_weights=(9.0,))).dataset_weights == weights


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--unknown", "1"], "--unknown"),
        (["--im", "320"], "--im"),
        (["--epochs", "many"], "--epochs"),
        (["--save_img=perhaps"], "expected True or False"),
        (["--num_anchor", "4"], "--num_anchor"),
        (["--backbone", "vgg"], "mobilenet0.25"),
        (["--anchor_sizes", "a,b"], "16,32/64,128/256,512"),
        (["--dataset_weights", "1;2"], "expected numbers like 1,0.25"),
        (["--cache", "tape"], "--cache"),
    ],
)
def test_bad_flags_are_refused_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        parse(*words)
    error = capsys.readouterr().err
    assert exit_status.value.code == 2
    assert message in error
    assert error.count("\n") == 1


def test_help_shows_where_defaults_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags("test", (TrainConfig(epochs=12), ModelConfig), ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images (default: 12)" in text
    assert "feature extractor (default: the experiment's)" in text


def test_architecture_flags_fill_in_what_belongs_together() -> None:
    model = apply_overrides(parse("--backbone=mobilenet0.25", "--num_anchor=2", "--cascade=False"))
    assert model == usual_config("mobilenet0.25", num_anchor=2, cascade=False)
    assert (model.fpn_channels, model.activation_slope) == BACKBONES["mobilenet0.25"]
    assert apply_overrides(parse("--landmark_loss=False")).landmarks is False
    fine = apply_overrides(parse("--fine_levels=2", "--num_anchor=2"))
    assert (fine.strides, fine.anchor_sizes) == ((4, 8, 16, 32), ((8, 16), (32, 64), (64, 128), (256, 512)))
    assert apply_overrides(parse("--num_anchor=3"), fine).anchor_sizes[3] == (128, 256, 512)
    assert apply_overrides(parse("--backbone=resnet18"), fine).strides == fine.strides
    assert apply_overrides(parse("--fine_levels=0"), fine).strides == (8, 16, 32)


def test_flags_change_only_what_they_name_of_a_saved_architecture() -> None:
    saved = usual_config("mobilenet0.25", num_anchor=2, score_exponent=0.3)
    assert apply_overrides(parse("--cascade", "True"), saved) == saved
    changed = apply_overrides(parse("--backbone=resnet18"), saved)
    assert (changed.fpn_channels, changed.anchor_sizes) == (BACKBONES["resnet18"][0], saved.anchor_sizes)


def test_anchors_that_contradict_their_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="--num_anchor=3 contradicts --anchor_sizes with 2"):
        apply_overrides(parse("--num_anchor=3", "--anchor_sizes=8,16/32,64/128,256"))


def test_experiments_are_named_as_the_original_named_them() -> None:
    assert ModelConfig().name == "resnet50_tina_iou_anc3_casT_fpn3"
    single = usual_config("mobilenet0.25", num_anchor=2, cascade=False, model_version="retina")
    assert single.name == "mobilenet0.25_anc2_casF_fpn3"
    rematch = usual_config("mobilenet0.25", num_anchor=2, refinement="rematch", model_version="retina")
    assert rematch.name == "mobilenet0.25_anc2_casT-rematch_fpn3"


def test_refinement_brings_the_matching_of_its_stages() -> None:
    assert usual_stages(cascade=True) == (StageConfig(0.35), StageConfig(0.35))
    rematch = (StageConfig(0.35), StageConfig(0.5, negative_iou=0.4))
    assert usual_stages(cascade=True, refinement="rematch") == rematch
    assert [stage.background_iou for stage in rematch] == [0.35, 0.4]
    assert apply_overrides(parse("--refinement=rematch")).stages == rematch
    saved = usual_config("mobilenet0.25", refinement="rematch")
    assert apply_overrides(parse("--backbone=resnet18"), saved).stages == rematch
    assert apply_overrides(parse("--refinement=sum"), saved) == usual_config("mobilenet0.25")


def test_one_stage_refines_nothing() -> None:
    saved = usual_config("mobilenet0.25", refinement="rematch")
    single = apply_overrides(parse("--cascade=False"), saved)
    assert single == usual_config("mobilenet0.25", cascade=False)
    both = apply_overrides(parse("--cascade=True", "--refinement=rematch"), single)
    assert both == saved
    for words in (["--refinement=rematch"], ["--refinement=rematch", "--cascade=False"]):
        with pytest.raises(ConfigError, match="--refinement rematch needs a second stage"):
            apply_overrides(parse(*words), single)


def test_an_older_architecture_means_what_it_meant() -> None:
    values = to_dict(usual_config("mobilenet0.25"))
    del values["refinement"]
    for stage in values["stages"]:
        del stage["negative_iou"]
    assert from_dict(ModelConfig, values, "x") == usual_config("mobilenet0.25")


@pytest.mark.parametrize(
    "change",
    [
        lambda: ModelConfig(anchor_sizes=((16,), (32, 64), (128, 256))),
        lambda: ModelConfig(anchor_sizes=((16, 32), (64, 128))),
        lambda: ModelConfig(strides=(4, 8, 16, 32)),
        lambda: ModelConfig(fine_levels=4),
        lambda: ModelConfig(fpn_channels=30),
        lambda: ModelConfig(stages=()),
        lambda: StageConfig(match_iou=1.5),
        lambda: StageConfig(match_iou=0.4, negative_iou=0.5),
        lambda: StageConfig(negative_iou=0.0),
        lambda: ModelConfig(refinement="average"),
        lambda: ModelConfig(refinement="rematch", stages=(StageConfig(),)),
        lambda: LossConfig(classification="hinge"),
        lambda: LossConfig(box_regression="giou"),
        lambda: LossConfig(landmark_regression="l2"),
        lambda: PostprocessConfig(confidence_threshold=2),
        lambda: DataConfig(min_crop_scale=0.9, max_crop_scale=0.5),
        lambda: DataConfig(dataset_weights=(1.0, 0.0)),
        lambda: DataConfig(dataset_weights=(float("nan"),)),
        lambda: DataConfig(rotation_degrees=181),
        lambda: DataConfig(blur_probability=1.1),
        lambda: DataConfig(jpeg_probability=-0.1),
        lambda: DataConfig(cache="tape"),
        lambda: DataConfig(cache="ram", cache_side=-1),
        lambda: DataConfig(cache_side=640),
        lambda: TrainConfig(epochs=0),
        lambda: InferenceOptions(save_mask=True),
    ],
)
def test_impossible_values_are_refused(change: object) -> None:
    with pytest.raises(ConfigError):
        change()  # type: ignore[operator]


def test_json_returns_the_same_configuration(tmp_path: Path) -> None:
    config = ExperimentConfig(
        model=usual_config("mobilenet0.25", num_anchor=2, stages=(StageConfig(0.4), StageConfig(0.5, 2.0))),
        data=DataConfig(dataset_weights=(1.0, 0.25), cache="disk", cache_side=640),
        train=TrainConfig(milestones=(3, 5)),
    )
    config.save(tmp_path / "config.json")
    assert ExperimentConfig.load(tmp_path / "config.json") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_absent_fields_take_their_defaults() -> None:
    assert from_dict(ExperimentConfig, {"train": {"epochs": 2}}, "x") == ExperimentConfig(train=TrainConfig(epochs=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "here: unknown field 'modle'"),
        ({"train": {"epochs": "ten"}}, "here: train: epochs: expected int, got 'ten'"),
        ({"train": {"epochs": True}}, "expected int"),
        ({"train": {"epochs": -1}}, "here: train: --epochs must be positive"),
        ({"model": {"strides": 8}}, "here: model: strides: expected a list"),
        ({"model": {"variances": [0.1]}}, "expected 2 values"),
        ([], "expected an object"),
    ],
)
def test_malformed_json_is_refused_with_its_place(values: object, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_dict(ExperimentConfig, values, "here")
    assert message in str(refusal.value)


def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        ExperimentConfig.load(tmp_path / "config.json")


def test_json_holds_plain_values_only() -> None:
    values = to_dict(ExperimentConfig())
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {field.name for field in dataclasses.fields(ExperimentConfig)}
