"""Tests of code for the GPU with fake CUDA tensors, which have shapes, devices and types, but no values.

As on a real GPU, operations on tensors of different devices fail. The tests count host-device synchronisations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from config import EXPERIMENTS, ExperimentConfig, PostprocessConfig
from config.run import RECIPES
from layers.multibox_loss import MultiBoxLoss
from layers.postprocess import copy_to_cpu, filter_and_decode
from models.backend import TorchBackend
from models.image_pyramid import build_model
from models.retinaface import RetinaFace
from utils.runtime.experiment import load_config, load_recipe
from utils.structures import FaceTargets

_FOUND = 5  # number of elements that every call of nonzero finds
_SIZE = (96, 160)
ATEN = torch.ops.aten


class FakeValues(TorchDispatchMode):
    """Replaces operators that depend on values, and records casts and host-device synchronisations (`syncs`)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.syncs: list[str] = []
        self.casts: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ATEN.nonzero.default:
            self.syncs.append("nonzero")
            return args[0].new_empty((_FOUND, args[0].dim()), dtype=torch.long)
        if func is ATEN._local_scalar_dense.default:
            self.syncs.append("number")
            return _FOUND
        if func in (ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default):
            args = (args[0], [self._indices(index) for index in args[1]], *args[2:])
        result = func(*args, **kwargs)
        if func in (ATEN._to_copy.default, ATEN.lift_fresh_copy.default):
            if result.device != args[0].device:
                self.syncs.append("copy")
            elif result.dtype != args[0].dtype:
                self.casts[result.dtype] += 1
        return result

    def _indices(self, index: torch.Tensor | None) -> torch.Tensor | None:
        """Replace a one-dimensional mask by indices."""
        if index is None or index.dtype != torch.bool:
            return index
        self.syncs.append("mask")
        return index.new_empty((_FOUND,), dtype=torch.long)


@contextmanager
def fake_cuda() -> Iterator[FakeValues]:
    with FakeTensorMode(allow_non_fake_inputs=True), FakeValues() as values:
        yield values


CONFIGS = {path.stem: load_recipe(path.stem, RECIPES).experiment for path in sorted(RECIPES.glob("*.json"))} | {
    path.parent.name: load_config(path) for path in sorted(EXPERIMENTS.glob("*/config.json"))
}


def on_cuda(config: ExperimentConfig, dtype: torch.dtype = torch.float32) -> RetinaFace:
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return build_model(config.model)
    finally:
        torch.set_default_dtype(torch.float32)


def targets() -> FaceTargets:
    flags = torch.ones(3, dtype=torch.bool, device="cuda")
    landmarks = torch.rand(3, 5, 2, device="cuda")
    return FaceTargets(torch.rand(3, 4, device="cuda"), landmarks, flags, flags.clone(), counts=(2, 1))


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_is_computed_on_the_device(name: str) -> None:
    config = CONFIGS[name]
    with fake_cuda():
        model = on_cuda(config)
        outputs = model(torch.rand(2, 3, *_SIZE, device="cuda"))
        terms = MultiBoxLoss(config.loss, config.model)(outputs, targets(), _SIZE)
        assert {term.device.type for term in terms.values()} == {"cuda"}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CONFIGS),
        *((name, torch.float16) for name in ("tinaface_r50_gn_dcn", "mobilenet0.25_pretrained", "retinaface_r50")),
    ],
)
def test_detection_synchronises_twice_with_the_device(name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    with fake_cuda() as values, torch.no_grad():
        backend = TorchBackend(on_cuda(config, dtype).eval())
        images = torch.zeros(2, *_SIZE, 3, dtype=torch.uint8, device="cuda")
        values.syncs.clear()
        values.casts.clear()
        output = backend(images)
        assert not values.syncs
        # At most the outputs and, for each stage of a cascade, its deltas; not the weights of each layer.
        assert values.casts.total() <= len(vars(output)) + 2 * len(config.model.stages)
        candidates, indices, is_above = copy_to_cpu(
            *filter_and_decode(output, _SIZE, config.model, PostprocessConfig())
        )
        assert values.syncs == ["nonzero", "copy"]
        assert candidates.boxes.shape == (_FOUND, 4)
        assert {candidates.boxes.device.type, indices.device.type, is_above.device.type} == {"cpu"}
        assert candidates.boxes.dtype == candidates.scores.dtype == torch.float32
