"""Tests of the folder that training writes to: published detectors are kept, and own runs are resumed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import train
from config import ROOT, ExperimentConfig, RunOptions
from models.architecture import usual_config
from models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from models.retinaface import RetinaFace
from train import TrainingRun, describe_continuation, resolve
from utils.errors import ConfigError
from utils.options import parse_flags
from utils.runtime.experiment import Experiment, save_config

PUBLISHED = "mobilenet0.25_anc2_casT_fpn3"


@pytest.fixture
def experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of experiments with a published detector, which has no training state to resume."""
    monkeypatch.setattr(train, "EXPERIMENTS", tmp_path)
    shutil.copytree(ROOT / "experiments" / PUBLISHED, tmp_path / PUBLISHED)
    return tmp_path


def resolved(*flags: str) -> TrainingRun:
    return resolve(parse_flags("", train.GROUPS, flags))


def weights(experiments: Path, name: str = PUBLISHED, which: str = "best") -> Path:
    return experiments / name / f"ckpt/mobilenet0.25_ckpt-{which}.pth"


def begin(experiments: Path, name: str, config: ExperimentConfig | None = None) -> ExperimentConfig:
    """Write the files of a started run of the published architecture."""
    config = config or ExperimentConfig(model=load_checkpoint(weights(experiments)).model_config)
    shutil.copytree(experiments / PUBLISHED / "ckpt", experiments / name / "ckpt", dirs_exist_ok=True)
    save_config(config, experiments / name / "config.json")
    shutil.copy(weights(experiments), weights(experiments, name, "last"))
    return config


@pytest.mark.parametrize("named", [False, True])
def test_published_detector_is_never_overwritten(experiments: Path, named: bool) -> None:
    flags = [f"--pretrained_detector={weights(experiments)}", *([f"--experiment_name={PUBLISHED}"] if named else [])]
    training = resolved(*flags)
    assert training.experiment.folder == experiments / f"{PUBLISHED}_2"
    assert training.config.model.name == PUBLISHED
    assert training.checkpoint is not None
    (note,) = training.notes
    assert str(experiments / PUBLISHED) in note
    assert str(training.experiment.folder) in note

    begin(experiments, f"{PUBLISHED}_2")  # the same command continues there
    assert resolved(*flags).experiment == training.experiment
    weights(experiments, f"{PUBLISHED}_2", "last").unlink()
    assert resolved(*flags).experiment.folder.name == f"{PUBLISHED}_3"


def test_name_of_a_published_detector_says_the_architecture(experiments: Path) -> None:
    (experiments / PUBLISHED).rename(experiments / "published")
    training = resolved("--experiment_name=published")
    assert training.experiment.folder == experiments / "published_2"
    assert training.config.model.name == PUBLISHED
    assert resolved("--experiment_name=published", "--num_anchor=3").config.model.num_anchor == 3
    assert resolved("--experiment_name=new").config.model.backbone == "resnet50"


def test_training_that_starts_again_has_the_architecture_of_the_flags(experiments: Path) -> None:
    begin(experiments, "mine")
    with pytest.raises(ConfigError, match="mine: was trained with another architecture"):
        resolved("--experiment_name=mine", "--resume=False")
    shutil.rmtree(experiments / "mine/ckpt")
    (experiments / "mine/config.json").unlink()
    assert resolved("--experiment_name=mine", "--resume=False").config.model.backbone == "resnet50"


def test_name_of_an_own_run_is_kept(experiments: Path) -> None:
    begin(experiments, "mine")
    training = resolved("--experiment_name=mine")
    assert (training.experiment.folder, list(training.notes)) == (experiments / "mine", [])


@pytest.mark.parametrize("name", [".", "..", "../other", "a/../../b", "/tmp/elsewhere"])
def test_name_cannot_lead_out_of_the_experiments(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--experiment_name=.* leads out of experiments/"):
        RunOptions(experiment_name=name)
    assert RunOptions(experiment_name="family/child").experiment_name == "family/child"


@pytest.mark.parametrize("flag", ["--backbone=resnet18", "--num_anchor=3", "--cascade=False"])
@pytest.mark.parametrize("resume", [True, False])
def test_another_architecture_is_refused_for_an_existing_experiment(experiments: Path, flag: str, resume: bool) -> None:
    begin(experiments, "mine")
    with pytest.raises(ConfigError, match="mine: was trained with another architecture"):
        resolved("--experiment_name=mine", "--backbone=mobilenet0.25", "--num_anchor=2", flag, f"--resume={resume}")


def test_missing_configuration_is_taken_from_the_checkpoint_to_resume(experiments: Path) -> None:
    saved = begin(experiments, "mine")
    (experiments / "mine/config.json").unlink()
    training = resolved("--experiment_name=mine")
    assert training.config.model == saved.model
    assert training.config.loss == load_checkpoint(weights(experiments, "mine", "last")).experiment.loss  # type: ignore[union-attr]
    for flag in ("--resume=True", "--resume=False"):
        with pytest.raises(ConfigError, match="mine: was trained with another architecture"):
            resolved("--experiment_name=mine", "--backbone=resnet18", flag)


def test_pretrained_detector_is_checked_when_training_resumes(experiments: Path) -> None:
    begin(experiments, "mine")
    with pytest.raises(Exception, match=r"nowhere\.pth: cannot be read"):
        resolved("--experiment_name=mine", "--pretrained_detector=nowhere.pth")


def test_pretrained_detector_is_used_if_nothing_was_saved_yet(experiments: Path) -> None:
    begin(experiments, "mine")
    shutil.rmtree(experiments / "mine/ckpt")
    training = resolved("--experiment_name=mine", f"--pretrained_detector={weights(experiments)}")
    assert training.checkpoint is not None
    assert resolved("--recipe=snu_resnet_anc2", f"--pretrained_detector={weights(experiments)}").checkpoint


@pytest.mark.parametrize(
    ("flags", "epoch", "expected"),
    [
        ([], 2, []),
        (["--dataset=widerface"], 2, []),
        (["--recipe=snu_resnet_anc2"], 2, ["--recipe has no effect, because training continues"]),
        (["--dataset=other"], 2, ["--dataset was widerface/, now it is other"]),
        ([], 9, ["all 9 epochs are done"]),
        (["--dataset=other"], 9, None),
    ],
)
def test_flags_without_effect_are_named(
    experiments: Path, flags: list[str], epoch: int, expected: list[str] | None
) -> None:
    saved = begin(experiments, "mine")
    training = resolved("--experiment_name=mine", "--epochs=9", *flags)
    last = Checkpoint(
        Path("last.pth"), saved.model, {}, "own", saved, {"epoch": epoch, "optimizer": {}, "new_parameters": []}
    )
    if expected is None:
        with pytest.raises(ConfigError, match="--dataset was widerface/, not other, and all 9 epochs are done"):
            describe_continuation(training, last)
        return
    lines = describe_continuation(training, last)
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))


@pytest.mark.parametrize(("kind", "state"), [("original", {}), ("own", {"epoch": 3, "val_ap": 0.5})])
def test_weights_without_a_training_state_cannot_be_resumed(
    experiments: Path, kind: str, state: dict[str, float]
) -> None:
    saved = begin(experiments, "mine")
    with pytest.raises(ConfigError, match="holds no state to continue from; give it as --pretrained_detector"):
        describe_continuation(
            resolved("--experiment_name=mine"), Checkpoint(Path("l"), saved.model, {}, kind, saved, state)
        )


def test_folder_with_weights_of_any_backbone_is_kept(tmp_path: Path) -> None:
    config = ExperimentConfig(model=usual_config("mobilenet0.25"))
    save_checkpoint(tmp_path / "a/ckpt/resnet50_ckpt-best.pth", config, RetinaFace(config.model).state_dict())
    assert Experiment(tmp_path / "a").for_training.folder.name == "a_2"
    assert Experiment(tmp_path / "b").for_training.folder.name == "b"
