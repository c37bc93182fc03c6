"""Damaged and hostile checkpoints: each is loaded or rejected with a one-line error, and none of its code is run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from campaigns.harness import Tally, mutate, run_isolated
from config import EXPERIMENTS, ROOT, ModelConfig
from models.checkpoint import save_checkpoint
from models.detector import FaceDetector
from models.image_pyramid import build_model
from utils.runtime.experiment import load_config

_BIUBUG6 = ROOT.parent / "shared/weights/mobilenet0.25_Final.pth"


class _Payload:
    """The code of a hostile file: it creates a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def run_checkpoints(seed: int, count: int, folder: Path) -> Tally:
    """Every mutated checkpoint detects faces or is rejected; a flipped bit in a weight of ours is rejected."""
    path, mark = folder / "NAME/ckpt/a.pth", folder / "code was run"
    path.parent.mkdir(parents=True)
    originals = {name: file.read_bytes() for name, file in _originals(folder).items()}
    image = np.zeros((48, 64, 3), np.uint8)

    def use() -> None:
        FaceDetector.from_checkpoint(path).detect(image)

    tally, generator = Tally(), np.random.default_rng(seed)
    for number in range(count):
        name = str(generator.choice(list(originals)))
        kind = str(generator.choice(["damaged", "pickle", "weight", "hostile"], p=[0.4, 0.3, 0.2, 0.1]))
        data = {"pickle": _mutate_pickle, "weight": _flip_in_weight}.get(kind, mutate)(originals[name], generator)
        path.write_bytes(_hostile(number, mark) if kind == "hostile" else data)
        finished = run_isolated(use)
        tally.add(f"{name}, {kind} {number}", finished)
        if kind == "weight" and name.startswith("ours"):
            tally.others["flipped bits in a weight of ours refused"] += finished.verdict == "named"
            tally.require(finished.verdict == "named", f"{name} {number}: a flipped bit is used")
        tally.require(not mark.exists(), f"{name}, {kind} {number}: code was run")
    return tally


def _originals(folder: Path) -> dict[str, Path]:
    """Return our checkpoints and, if present, those of biubug6, in PyTorch's zip and legacy formats."""
    shipped = sorted(EXPERIMENTS.glob("*/ckpt/*ckpt-best.pth"))
    found = {f"ours, {path.parent.parent.name}": path for path in shipped}
    config = load_config(shipped[0].parent.parent / "config.json")
    found["ours, new"] = folder / "new.pth"
    save_checkpoint(found["ours, new"], config, build_model(config.model).state_dict(), epoch=1)
    states = {"original": build_model(ModelConfig()).state_dict()}
    if _BIUBUG6.is_file():
        states["biubug6"] = torch.load(_BIUBUG6, map_location="cpu", weights_only=True)
    for name, state in states.items():
        for is_zip in (False, True):
            found[f"{name}, {'zip' if is_zip else 'legacy'}"] = folder / f"{name}{is_zip}.pth"
            torch.save(state, folder / f"{name}{is_zip}.pth", _use_new_zipfile_serialization=is_zip)
    return found


def _mutate_pickle(data: bytes, generator: np.random.Generator) -> bytes:
    """Change a few bytes of the pickle, which describes the content of the file."""
    changed, start = bytearray(data), max(0, data.find(b"data.pkl"))
    for place in generator.integers(start, min(len(data), start + 6000), int(generator.integers(1, 6))):
        changed[place] = int(generator.integers(256))
    return bytes(changed)


def _flip_in_weight(data: bytes, generator: np.random.Generator) -> bytes:
    """Flip a bit in the values of a tensor."""
    start, end = len(data) // 2, len(data) * 3 // 4
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [part for part in archive.infolist() if "/data/" in part.filename and part.file_size > 8]
        part = parts[int(generator.integers(len(parts)))]
        header = part.header_offset
        start = header + 30 + int.from_bytes(data[header + 26 : header + 28], "little")
        start += int.from_bytes(data[header + 28 : header + 30], "little")
        end = start + part.file_size
    changed = bytearray(data)
    changed[int(generator.integers(start, end))] ^= 1 << int(generator.integers(8))
    return bytes(changed)


def _hostile(number: int, mark: Path) -> bytes:
    """Return a file that runs code if it is unpickled unsafely."""
    content = {"format": "retinaface-2", "config": {}, "model": {"a": _Payload(mark)}}
    if number % 3 == 0:
        return pickle.dumps(content)
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=number % 3 == 1)
    return buffer.getvalue()
