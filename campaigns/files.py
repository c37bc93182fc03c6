"""Damaged label files, predictions and configurations: each is read, or rejected with a one-line error."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from campaigns.harness import Tally, mutate, run_isolated
from config import DATA, EXPERIMENTS, RECIPES, DataConfig, LossConfig
from layers.multibox_loss import MultiBoxLoss
from models.image_pyramid import build_model
from utils.datasets.face_dataset import FaceDataset
from utils.datasets.folders import read_split
from utils.evaluation.ground_truth import open_evaluation_set
from utils.evaluation.localisation import localisation_ap
from utils.evaluation.predictions import read_predictions, write_predictions
from utils.runtime.experiment import load_config, load_recipe

_WORDS = (
    b"nan inf -inf 1e38 -1e38 1e999 0 -1 1e-45 99999999999999999999 0x10 1_0 \xd9\xa3 \xc2\xb2 \x00 # ../x.jpg".split()
)
_SIDE = 64


def run_labels(seed: int, count: int, folder: Path) -> Tally:
    """Labels are read, cropped, matched and evaluated, or rejected with a one-line error."""
    shutil.copytree(DATA / "sample_widerface", folder / "data")
    original = (folder / "data/label.txt").read_bytes()
    label_texts = [original, _without_landmarks(original), _as_wider(original), original.decode().encode("utf-16")]
    model = build_model(load_config(EXPERIMENTS / "mobilenet0.25_anc2_casT_fpn3/config.json").model)
    loss = MultiBoxLoss(LossConfig(), model.model_config)

    def use() -> None:
        (images,) = read_split([folder / "data"], "train")
        dataset = FaceDataset(images, DataConfig(im_size=_SIDE, rotation_degrees=20), (0.0, 0.0, 0.0))
        for index in range(len(images)):
            batch = dataset[index, index]
            with torch.no_grad():
                terms = loss(model(batch.images.float()), batch.targets, (_SIDE, _SIDE))
            assert all(bool(torch.isfinite(term)) for term in terms.values()), f"{images[index].path}: {terms}"
        faces = open_evaluation_set(folder / "data", None, need_images=True)
        faces.evaluate({name: np.array([[0, 0, 9, 9, 0.5]]) for name in faces.names})

    tally, generator = Tally(), np.random.default_rng(seed)
    for number in range(count):
        data = mutate_text(label_texts[int(generator.integers(len(label_texts)))], generator)
        (folder / "data/label.txt").write_bytes(data)
        tally.add(f"labels {number}: {data[:300]!r}", run_isolated(use))
    return tally


def run_predictions(seed: int, count: int, folder: Path) -> Tally:
    """Predictions are evaluated, or rejected with a one-line error."""
    faces = open_evaluation_set(DATA / "sample_widerface", None, need_images=True)
    generator = np.random.default_rng(seed)
    for name, truth in zip(faces.names, faces.truths, strict=True):
        scores = generator.random((len(truth.boxes), 1))
        write_predictions(folder, name, np.concatenate([truth.boxes + generator.normal(0, 2, (1, 4)), scores], axis=1))
    files = sorted(folder.rglob("*.txt"))

    def use() -> None:
        predictions = read_predictions(folder, faces.names)
        measured = faces.evaluate(predictions)
        assert all(0 <= value <= 1 for value in measured.average_precisions.values()), measured.average_precisions
        localisation_ap(predictions, faces.truths)

    tally = Tally()
    for number in range(count):
        file = files[int(generator.integers(len(files)))]
        original = file.read_bytes()
        data = mutate_text(original, generator)
        file.write_bytes(data)
        tally.add(f"predictions {number}: {data[:300]!r}", run_isolated(use))
        file.write_bytes(original)
    return tally


def run_configs(seed: int, count: int, folder: Path) -> Tally:
    """Configurations of experiments and recipes build a model and a loss, or are rejected with a one-line error."""
    originals = sorted([*EXPERIMENTS.glob("*/config.json"), *RECIPES.glob("*.json")])
    tally, generator = Tally(), np.random.default_rng(seed)
    for number in range(count):
        original = originals[int(generator.integers(len(originals)))]
        text = original.read_bytes()
        data = mutate_json(text, generator) if number % 2 else mutate_text(text, generator)
        (folder / "mutated.json").write_bytes(data)
        tally.add(f"configuration {number} of {original}: {data!r}", run_isolated(partial(_build, original, folder)))
    return tally


def _build(original: Path, folder: Path) -> None:
    is_recipe = original.parent == RECIPES
    config = load_recipe("mutated", folder).experiment if is_recipe else load_config(folder / "mutated.json")
    MultiBoxLoss(config.loss, build_model(config.model).model_config)


def mutate_text(data: bytes, generator: np.random.Generator) -> bytes:
    """Damage bytes, or replace, double, drop or exchange words and lines."""
    if generator.random() < 0.4:
        return mutate(data, generator)
    lines = data.split(b"\n")
    for _ in range(int(generator.integers(1, 4))):
        place = int(generator.integers(len(lines)))
        words = lines[place].split(b" ")
        word = int(generator.integers(len(words)))
        kind = generator.integers(5)
        if kind == 0:
            words[word] = _WORDS[int(generator.integers(len(_WORDS)))]
        elif kind == 1:
            words.insert(word, _WORDS[int(generator.integers(len(_WORDS)))])
        elif kind == 2:
            del words[word]
        elif kind == 3:
            lines.insert(int(generator.integers(len(lines))), lines[place])
        elif len(lines) > 1:
            del lines[place]
            continue
        lines[place] = b" ".join(words)
    return b"\n".join(lines)


def mutate_json(text: bytes, generator: np.random.Generator) -> bytes:
    """Replace, drop or rename a value anywhere in a JSON object."""
    root = json.loads(text)
    values = [root]
    for value in values:  # grows while it is iterated over
        values += [
            part for part in (value.values() if isinstance(value, dict) else value) if isinstance(part, (dict, list))
        ]
    while not (chosen := values[int(generator.integers(len(values)))]):
        pass
    key = list(chosen)[int(generator.integers(len(chosen)))] if isinstance(chosen, dict) else 0
    odd: list[Any] = [None, True, 0, -1, 1e308, 10**30, 0.5, "", "none", [], {}, [1], [[1, 2]], math.nan, math.inf]
    if generator.random() < 0.2:
        del chosen[key]
    else:
        chosen[key] = odd[int(generator.integers(len(odd)))]
    return json.dumps(root).encode()


def _without_landmarks(data: bytes) -> bytes:
    lines = data.decode().splitlines()
    return "\n".join(line if line.startswith("#") else " ".join(line.split()[:4]) for line in lines).encode()


def _as_wider(data: bytes) -> bytes:
    blocks = [block.splitlines() for block in data.decode().split("# ") if block.strip()]
    faces = [[" ".join(line.split()[:4]) + " 0 0 0 0 0 0" for line in block[1:]] for block in blocks]
    texts = [[block[0].strip(), str(len(below)), *below] for block, below in zip(blocks, faces, strict=True)]
    return "\n".join(line for lines in texts for line in lines).encode()
