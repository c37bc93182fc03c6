"""Tests of the configuration: flags, validation, JSON, and configurations of earlier versions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from config import (
    EXPERIMENTS,
    USUAL_LEVELS,
    DataConfig,
    EvaluationOptions,
    ExperimentConfig,
    ExportOptions,
    ImagePyramidConfig,
    InferenceOptions,
    LevelConfig,
    LossConfig,
    ModelConfig,
    ModelOverrides,
    PostprocessConfig,
    RunOptions,
    StageConfig,
    StartOptions,
    TrainConfig,
    WeightOptions,
)
from models.architecture import apply_overrides, usual_config, usual_stages
from models.image_pyramid import pyramid_levels
from utils.errors import ConfigError, FlagError
from utils.options import Flags, from_dict, parse_flags, to_dict
from utils.runtime.experiment import load_config, save_config

GROUPS = (RunOptions(), InferenceOptions(), ModelOverrides(), DataConfig(), TrainConfig(), PostprocessConfig())


def parse(*argv: str) -> Flags:
    return parse_flags("test", GROUPS, argv)


def architecture(*argv: str, base: ModelConfig | None = None) -> ModelConfig:
    """Apply the flags to an architecture."""
    return apply_overrides(parse(*argv).apply(ModelOverrides()), base)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--save_img"], True),
        (["--save_img", "True"], True),
        (["--save_img=False"], False),
        (["--save_img", "no"], False),
        ([], False),
    ],
)
def test_booleans_accept_common_spellings(argv: list[str], value: bool) -> None:
    assert parse(*argv).apply(InferenceOptions()).save_img is value


def test_only_given_flags_change_a_configuration() -> None:
    flags = parse("--epochs", "3", "--milestones", "1,2", "--batch_sixe=4")
    assert flags.apply(TrainConfig(learning_rate=0.5)) == TrainConfig(
        learning_rate=0.5, epochs=3, milestones=(1, 2), batch_size=4
    )


@pytest.mark.parametrize(("text", "weights"), [("1,0.25", (1.0, 0.25)), ("2", (2.0,)), ("", ())])
def test_dataset_weights_are_comma_separated_numbers(text: str, weights: tuple[float, ...]) -> None:
    assert parse("--dataset_weights", text).apply(DataConfig(dataset_weights=(9.0,))).dataset_weights == weights


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--unknown", "1"], "--unknown"),
        (["--im", "320"], "--im"),
        (["--epochs", "many"], "--epochs"),
        (["--save_img=perhaps"], "expected True or False"),
        (["--num_anchor", "4"], "--num_anchor"),
        (["--backbone", "vgg"], "mobilenet0.25"),
        (["--anchor_sizes", "a,b"], "16,32/64,128/256,512"),
        (["--dataset_weights", "1;2"], "expected numbers like 1,0.25"),
        (["--dataset_weights", "1, ,2"], "expected numbers like 1,0.25"),
        (["--milestones", "70,0.5"], "expected integers like 70,90"),
        (["--cache", "tape"], "--cache"),
    ],
)
def test_invalid_flags_are_refused_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(FlagError) as raised:
        parse(*argv)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("anchor_sizes", "channels"), [((16.0,), 10**30), ((16.0,), 4100), ((16.0,), -4), ((1e30,), 64), ((0.0,), 64)]
)
def test_levels_that_no_memory_can_hold_are_refused(anchor_sizes: tuple[float, ...], channels: int) -> None:
    with pytest.raises(ConfigError, match=r"(channels|anchor_sizes) must be .* (up to|at most) \d+, got"):
        ModelConfig(levels=(LevelConfig(8, anchor_sizes, channels), LevelConfig(16, (64,))))


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags("test", (TrainConfig(epochs=12), ModelOverrides()), ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "passes over the training images (default: 12)" in text
    assert "Architecture (default: that of the experiment, recipe or checkpoint): --backbone" in text


def test_architecture_flags_imply_the_defaults_of_the_backbone() -> None:
    model = architecture("--backbone=mobilenet0.25", "--num_anchor=2", "--cascade=False")
    assert model == usual_config("mobilenet0.25", num_anchor=2, cascade=False)
    assert (model.fpn_channels, model.activation_slope) == (64, 0.1)
    assert architecture("--landmark_loss=False").landmarks is False


def test_fine_levels_are_levels_of_the_upsampled_image() -> None:
    fine = architecture("--fine_levels=2", "--num_anchor=2")
    assert fine.levels == USUAL_LEVELS[2]
    assert fine.image_pyramid == ImagePyramidConfig(2, native_scale_weight=0.3)
    assert [level.stride for level in pyramid_levels(fine)] == [4, 8, 16, 32]
    assert [level.anchor_sizes for level in pyramid_levels(fine)] == [(8, 16), (32, 64), (64, 128), (256, 512)]
    assert pyramid_levels(architecture("--num_anchor=3", base=fine))[3].anchor_sizes == (128, 256, 512)
    assert architecture("--backbone=resnet18", base=fine).image_pyramid == fine.image_pyramid
    assert architecture("--fine_levels=0", base=fine) == architecture("--num_anchor=2")
    assert architecture("--coarse_share=0.2", base=fine).image_pyramid == ImagePyramidConfig(2, 0.3, 0.2)
    assert architecture("--context_share=0", base=fine).image_pyramid == ImagePyramidConfig(2)
    narrow = architecture("--fine_channels=40,48", base=fine)
    assert narrow.image_pyramid == ImagePyramidConfig(2, 0.3, upsampled_channels=(40, 48))


def test_flags_change_only_their_own_fields_of_a_saved_architecture() -> None:
    saved = usual_config("mobilenet0.25", num_anchor=2, score_exponent=0.3)
    assert architecture("--cascade", "True", base=saved) == saved
    changed = architecture("--backbone=resnet18", base=saved)
    assert (changed.fpn_channels, changed.levels) == (256, saved.levels)


def test_anchors_that_contradict_their_number_are_refused() -> None:
    with pytest.raises(ConfigError, match="--num_anchor=3 contradicts --anchor_sizes with 2"):
        architecture("--num_anchor=3", "--anchor_sizes=8,16/32,64/128,256")


def test_experiment_names_follow_the_original_project() -> None:
    assert ModelConfig().name == "resnet50_tina_iou_anc3_casT_fpn3"
    single = usual_config("mobilenet0.25", num_anchor=2, cascade=False, model_version="retina")
    assert single.name == "mobilenet0.25_anc2_casF_fpn3"
    rematch = usual_config("mobilenet0.25", num_anchor=2, refinement="rematch", model_version="retina")
    assert rematch.name == "mobilenet0.25_anc2_casT-rematch_fpn3"


def test_refinement_sets_the_matching_thresholds_of_the_stages() -> None:
    assert usual_stages(cascade=True) == (StageConfig(0.35), StageConfig(0.35))
    rematch = (StageConfig(0.35), StageConfig(0.5, negative_iou=0.4))
    assert usual_stages(cascade=True, refinement="rematch") == rematch
    assert [stage.background_iou for stage in rematch] == [0.35, 0.4]
    assert architecture("--refinement=rematch").stages == rematch
    saved = usual_config("mobilenet0.25", refinement="rematch")
    assert architecture("--backbone=resnet18", base=saved).stages == rematch
    assert architecture("--refinement=sum", base=saved) == usual_config("mobilenet0.25")


def test_refinement_needs_a_second_stage() -> None:
    saved = usual_config("mobilenet0.25", refinement="rematch")
    single = architecture("--cascade=False", base=saved)
    assert single == usual_config("mobilenet0.25", cascade=False)
    both = architecture("--cascade=True", "--refinement=rematch", base=single)
    assert both == saved
    for argv in (["--refinement=rematch"], ["--refinement=rematch", "--cascade=False"]):
        with pytest.raises(ConfigError, match="--refinement rematch needs a second stage"):
            architecture(*argv, base=single)


# An architecture with upsampled levels as earlier versions saved it.
OLD_MODEL: dict[str, Any] = {
    "backbone": "mobilenet0.25",
    "model_version": "tina",
    "anchor_sizes": [[4, 8, 16], [16, 32, 64], [32, 64, 128], [128, 256, 512]],
    "fine_levels": 2,
    "activation_slope": 0.1,
    "fpn_channels": 64,
    "score_exponent": 0.9,
    "context_share": 0.25,
    "coarse_share": 0.5,
    "refinement": "rematch",
    "landmarks": True,
    "strides": [4, 8, 16, 32],
    "variances": [0.1, 0.2],
    "pixel_mean": [104.0, 117.0, 123.0],
    "stages": [
        {"match_iou": 0.35, "loss_weight": 1.0, "negative_iou": None},
        {"match_iou": 0.5, "loss_weight": 1.0, "negative_iou": 0.4},
    ],
}


def old_model(**changes: Any) -> dict[str, Any]:
    """`OLD_MODEL` with other values; None removes a field."""
    values = {**OLD_MODEL, **changes}
    return {name: value for name, value in values.items() if value is not None}


def test_architecture_of_an_earlier_version_is_converted() -> None:
    usual = [[8, 16, 32], [32, 64, 128], [128, 256, 512]]
    expected = usual_config("mobilenet0.25", refinement="rematch")
    fine = dataclasses.replace(expected, image_pyramid=ImagePyramidConfig(2, 0.25, 0.5))
    assert from_dict(ModelConfig, old_model(), "x") == fine
    for count, sizes in (
        (1, [[4, 8, 16], *usual]),
        (3, [[4, 8, 16], [16, 32, 64], [64, 128, 256], [128, 256, 512]]),
    ):
        found = from_dict(ModelConfig, old_model(fine_levels=count, anchor_sizes=sizes), "x")
        assert found == dataclasses.replace(expected, image_pyramid=ImagePyramidConfig(count, 0.25, 0.5))
    # Earlier versions saved a weight of the native scale even without upsampled levels, where it has no effect.
    plain = old_model(fine_levels=0, anchor_sizes=usual, strides=[8, 16, 32], coarse_share=None)
    assert from_dict(ModelConfig, plain, "x") == expected


def test_missing_fields_of_an_earlier_version_take_the_defaults_of_that_version() -> None:
    oldest = old_model(fine_levels=None, context_share=None, coarse_share=None, refinement=None, strides=None)
    oldest |= {"anchor_sizes": [[10, 20], [32, 64], [128, 256]], "stages": [{"match_iou": 0.35, "loss_weight": 1.0}]}
    levels = (LevelConfig(8, (10, 20)), LevelConfig(16, (32, 64)), LevelConfig(32, (128, 256)))
    assert from_dict(ModelConfig, oldest, "x") == usual_config("mobilenet0.25", cascade=False, levels=levels)
    fine = from_dict(ModelConfig, old_model(context_share=None, coarse_share=None), "x")
    assert fine.image_pyramid == ImagePyramidConfig(2, 0.3)


def test_cache_side_of_an_earlier_version_is_dropped() -> None:
    assert from_dict(DataConfig, {"cache": "ram", "cache_side": 640}, "x") == DataConfig(cache="ram")


def test_shipped_configurations_can_be_read() -> None:
    files = sorted(EXPERIMENTS.glob("*/config.json"))
    assert len(files) >= 4
    for file in files:
        model = load_config(file).model
        finest = [4] if model.two_resolutions else []
        assert [level.stride for level in model.levels] == [*finest, 8, 16, 32]


@pytest.mark.parametrize(
    "change",
    [
        lambda: LevelConfig(8, ()),
        lambda: LevelConfig(8, (16, -32)),
        lambda: LevelConfig(0, (16, 32)),
        lambda: ModelConfig(levels=()),
        lambda: ModelConfig(levels=USUAL_LEVELS[2][::2]),
        lambda: ModelConfig(levels=(LevelConfig(2, (8, 16)), LevelConfig(4, (16, 32)))),
        lambda: ModelConfig(levels=tuple(LevelConfig(stride, (16,)) for stride in (32, 64, 128, 256))),
        lambda: ModelConfig(levels=tuple(LevelConfig(stride, (16,)) for stride in (64, 128))),
        lambda: ModelConfig(anchor_ratio=0.0),
        lambda: ModelConfig(pixel_std=(1.0, 0.0, 1.0)),
        lambda: ModelConfig(backbone="resnet18", deformable_backbone=True),
        lambda: ModelConfig(backbone="mobilenet0.25", norm="group"),
        lambda: ModelConfig(norm="group", fpn_channels=128),
        lambda: ModelConfig(head="tower", levels=(LevelConfig(8, (16, 32)), LevelConfig(16, (64,)))),
        lambda: ModelConfig(image_pyramid=ImagePyramidConfig(upsampled_levels=4)),
        lambda: ImagePyramidConfig(upsampled_levels=-1),
        lambda: ImagePyramidConfig(2, upsampled_channels=(40,)),
        lambda: ImagePyramidConfig(2, upsampled_channels=(40, 42)),
        lambda: usual_config("resnet50", norm="group", image_pyramid=ImagePyramidConfig(1, upsampled_channels=(64,))),
        lambda: ImagePyramidConfig(native_scale_weight=1.5),
        lambda: ImagePyramidConfig(half_scale_weight=-0.1),
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
        lambda: DataConfig(crop_scales=()),
        lambda: DataConfig(crop_scales=(0.5, 0.0)),
        lambda: DataConfig(crop_rule="any"),
        lambda: DataConfig(dataset_weights=(1.0, 0.0)),
        lambda: DataConfig(dataset_weights=(float("nan"),)),
        lambda: DataConfig(rotation_degrees=181),
        lambda: DataConfig(blur_probability=1.1),
        lambda: DataConfig(jpeg_probability=-0.1),
        lambda: DataConfig(cache="tape"),
        lambda: TrainConfig(epochs=0),
        lambda: TrainConfig(warmup_epochs=float("inf")),
        lambda: TrainConfig(seed=10**23),
        lambda: DataConfig(crop_scales=(1.0, float("inf"))),
        lambda: ModelOverrides(anchor_sizes=((8.0, float("nan")),)),
        lambda: InferenceOptions(save_mask=True),
        lambda: InferenceOptions(crop_margin=float("inf")),
        lambda: InferenceOptions(crop_size=10**6),
        lambda: InferenceOptions(max_frames=10**20),
    ],
)
def test_invalid_values_are_refused(change: object) -> None:
    with pytest.raises(ConfigError):
        change()  # type: ignore[operator]


@pytest.mark.parametrize(
    "change",
    [
        lambda: RunOptions(experiment_name=""),
        lambda: EvaluationOptions(pred_dir=""),
        lambda: EvaluationOptions(gt_dir=" "),
        lambda: EvaluationOptions(output_dir=""),
        lambda: StartOptions(recipe=""),
        lambda: StartOptions(pretrained_detector=""),
        lambda: StartOptions(pretrained_backbone=""),
        lambda: TrainConfig(teacher=""),
        lambda: InferenceOptions(inference_save_folder=""),
        lambda: InferenceOptions(mask=True, segmenter_model=""),
        lambda: WeightOptions(model_weight=""),
        lambda: ExportOptions(output=""),
    ],
)
def test_empty_text_is_refused(change: object) -> None:
    with pytest.raises(ConfigError, match="is empty; give a value, or drop the flag"):
        change()  # type: ignore[operator]


def test_loading_a_configuration_inverts_saving(tmp_path: Path) -> None:
    config = ExperimentConfig(
        model=usual_config("mobilenet0.25", num_anchor=2, stages=(StageConfig(0.4), StageConfig(0.5, 2.0))),
        data=DataConfig(dataset_weights=(1.0, 0.25), cache="disk"),
        train=TrainConfig(milestones=(3, 5)),
    )
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_missing_fields_take_their_defaults() -> None:
    assert from_dict(ExperimentConfig, {"train": {"epochs": 2}}, "x") == ExperimentConfig(train=TrainConfig(epochs=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, "here: unknown field 'modle'"),
        ({"train": {"epochs": "ten"}}, "here: train: epochs: expected int, got 'ten'"),
        ({"train": {"epochs": True}}, "expected int"),
        ({"train": {"epochs": -1}}, "here: train: --epochs must be positive"),
        ({"model": {"strides": 8}}, "here: model: strides: expected a list"),
        (
            {"model": {"strides": [8, 16, 32], "anchor_sizes": [[16, 32]]}},
            "here: model: 1 levels of anchor_sizes for 3",
        ),
        (
            {"model": {"fine_levels": 1, "strides": [8, 16, 32]}},
            "here: model: --fine_levels=1 has strides (4, 8, 16, 32)",
        ),
        ({"model": {"levels": [{"stride": 8}]}}, "here: model: levels[0]: "),
        ({"model": {"levels": [{"stride": 8.5, "anchor_sizes": [8]}]}}, "here: model: levels[0]: stride: expected int"),
        ({"model": {"variances": [0.1]}}, "expected 2 values"),
        ([], "expected an object"),
    ],
)
def test_malformed_json_is_refused_with_its_location(values: object, message: str) -> None:
    with pytest.raises(ConfigError) as exc_info:
        from_dict(ExperimentConfig, values, "here")
    assert message in str(exc_info.value)


def test_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("not json")
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read"):
        load_config(tmp_path / "config.json")


def test_dictionary_contains_only_json_values() -> None:
    values = to_dict(ExperimentConfig())
    assert json.loads(json.dumps(values)) == values
    assert set(values) == {field.name for field in dataclasses.fields(ExperimentConfig)}
