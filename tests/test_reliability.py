"""Regression tests for what campaigns found: images with forged sizes, changed checkpoints, and network access."""

from __future__ import annotations

import io
import os
import shutil
import socket
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from campaigns.images import decompression_bomb, forge_size
from config import ROOT, ExperimentConfig
from models.checkpoint import load_checkpoint, save_checkpoint
from models.foreign_checkpoint import CheckpointError
from models.image_pyramid import build_model
from tests.scripts import ScriptProcess
from utils.runtime.images import LargeImageError, UnreadableImageError, read_image, read_image_with_note
from utils.runtime.pixels import to_8_bits


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 90)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("jpg", "JPEG"), ("bmp", "BMP"), ("tif", "TIFF")])
@pytest.mark.parametrize("side", [65535, 30000])
def test_image_with_a_forged_size_is_refused_before_decoding(
    tmp_path: Path, suffix: str, kind: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cv2.imdecode", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(forge_size(suffix, encoded(kind), side, side))
    with pytest.raises(UnreadableImageError, match=f"{side}x{side} pixels"):
        read_image(path)


def test_decompression_bomb_is_refused_and_large_images_are_deferred(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(decompression_bomb(40_000, 40_000))
    with pytest.raises(UnreadableImageError, match="40000x40000 pixels are too many to decode"):
        read_image(path)
    path.write_bytes(decompression_bomb(5000, 4000))
    with pytest.raises(LargeImageError):
        read_image_with_note(path, allow_large=False)
    assert read_image(path).shape == (4000, 5000, 3)


def test_png_chunk_with_a_forged_length_is_refused(tmp_path: Path) -> None:
    """OpenCV would allocate two gigabytes for it."""
    data = bytearray(encoded("PNG"))
    struct.pack_into(">I", data, data.index(b"IDAT") - 4, 0x7FFFFFFF)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(UnreadableImageError, match="a part of the file is missing"):
        read_image(path)


def test_conversion_to_8_bits_uses_the_range_of_the_whole_image() -> None:
    """Images are converted in parts; here the brightest row is in the second part."""
    pixels = np.zeros((300, 2), np.uint16)
    pixels[-1] = 4095
    assert to_8_bits(pixels)[-1].tolist() == [255, 255]
    assert to_8_bits(pixels)[:-1].max() == 0


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("NAME") / "ckpt/a.pth"
    state = build_model(ExperimentConfig().model).state_dict()
    save_checkpoint(path, ExperimentConfig(), state, epoch=1, optimizer={"state": {0: {"momentum": torch.ones(3)}}})
    return path


def test_checkpoint_with_changed_content_is_refused(saved: Path, tmp_path: Path) -> None:
    load_checkpoint(saved)
    content = torch.load(saved, weights_only=True)
    path = tmp_path / "a.pth"
    torch.save(content, path)
    load_checkpoint(path)
    content["optimizer"]["state"][0]["momentum"][1] += 1
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"a\.pth: damaged \(its content has changed since it was written\)"):
        load_checkpoint(path)
    del content["digest"]  # as in earlier versions
    torch.save(content, path)
    load_checkpoint(path)


@pytest.mark.parametrize("name", ["new", "shipped"])
def test_flipped_bit_in_a_weight_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    """This includes checkpoints of earlier versions without a digest, because the parts of the file have checksums."""
    shipped = ROOT / "experiments/mobilenet0.25_anc2_casT_fpn3/ckpt/mobilenet0.25_ckpt-best.pth"
    data = bytearray((saved if name == "new" else shipped).read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        part = max(archive.infolist(), key=lambda part: part.file_size)
    data[part.header_offset + part.file_size // 2 + 100] ^= 1
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.pth: damaged \(.* has changed since it was written\)"):
        load_checkpoint(tmp_path / "a.pth")


# ----------------------------------------------------------------------------------------------------- network


def refuse_to_connect() -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"connects to {arguments[1:]}")

    for place, name in (
        (socket.socket, "connect"),
        (socket.socket, "connect_ex"),
        (socket, "getaddrinfo"),
        (socket, "create_connection"),
    ):
        setattr(place, name, refuse)


def run_without_network(script: str, *flags: str) -> None:
    result = ScriptProcess(script, *flags, "--gpu_num=-1", prepare=refuse_to_connect).wait()
    assert result.returncode == 0, result.stdout + result.stderr


def test_nothing_connects_to_a_network(tmp_path: Path) -> None:
    """Connecting a socket raises an error. Only `--pretrained_backbone=imagenet` may download anything."""
    fast = ROOT / "experiments/mobilenet0.25_anc2_casT_fpn3/ckpt/mobilenet0.25_ckpt-best.pth"
    images = tmp_path / "data/images"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 48), (200, 30, 90)).save(images / "a.png")
    (tmp_path / "data/label.txt").write_text("# a.png\n10 10 30 30\n")
    weights, dataset = f"--model_weight={fast}", f"--dataset={tmp_path / 'data'}"
    run_without_network("inference", weights, f"--inference_dir={images}", f"--inference_save_folder={tmp_path}/out")
    run_without_network("test", weights, dataset, f"--output_dir={tmp_path}/test")
    step = ["--backbone=mobilenet0.25", "--im_size=64", "--batch_size=1", "--num_workers=0", "--epochs=1"]
    name = f"pytest_network_{os.getpid()}"
    try:
        run_without_network("train", f"--experiment_name={name}", dataset, *step)
    finally:
        shutil.rmtree(ROOT / "experiments" / name, ignore_errors=True)
