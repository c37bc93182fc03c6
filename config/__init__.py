"""The options of all commands and of an experiment, as frozen dataclasses.

Every fact about an experiment (anchors, means, thresholds, loss weights, ...) is a field here and nowhere else.
`ExperimentConfig` is what training saves as `experiments/<name>/config.json` and what every other command reads.
Flags, checks and the JSON form are derived from the fields by `utils.options`.
"""

from config.experiment import (
    DataConfig,
    ExperimentConfig,
    LossConfig,
    PostprocessConfig,
    ProtocolConfig,
    TrainConfig,
)
from config.model import (
    BACKBONES,
    USUAL_LEVELS,
    ImagePyramidConfig,
    LevelConfig,
    ModelConfig,
    StageConfig,
)
from config.overrides import MatchingOverrides, ModelOverrides
from config.run import (
    DATA,
    DEFAULT_EXPERIMENT,
    EVALUATION_COMPUTE,
    EXPERIMENTS,
    RECIPES,
    ROOT,
    ComputeOptions,
    EvaluationOptions,
    ExportOptions,
    InferenceOptions,
    RunOptions,
    StartOptions,
    WeightOptions,
)
