"""Damaged images, images with forged sizes, and decompression bombs, in one run of inference.py."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from campaigns.harness import Tally, mutate, run_command
from config import DATA

_MEMORY_LIMIT = 2000  # MB
_LARGEST = 65535
_FORMATS: dict[str, list[dict[str, object]]] = {
    "jpg": [{}, {"progressive": True}, {"quality": 100, "subsampling": 0}],
    "png": [{}, {"compress_level": 0}],
    "webp": [{}, {"lossless": True}, {"animated": True}],
    "tif": [{}, {"compression": "tiff_lzw"}, {"compression": "tiff_adobe_deflate"}, {"animated": True}],
    "bmp": [{}],
    "gif": [{}, {"animated": True}],
    "jp2": [{}],
    "ppm": [{}],
}
_MODES = {"jpg": ["RGB", "L", "CMYK"], "png": ["RGB", "L", "P", "RGBA", "1", "I;16"], "tif": ["RGB", "L", "CMYK"]}
# Where a format stores its width and height: the bytes before them, and their layout.
_SIZES = {
    "jpg": (rb"\xff[\xc0-\xc2]\x00.\x08", ">HH"),
    "png": (rb"IHDR", ">II"),
    "webp": (rb"\x9d\x01\x2a", "<HH"),
    "tif": (rb"\x00\x01\x04\x00\x01\x00\x00\x00", "<I"),
    "bmp": (rb"(?<=^BM.{12})\x28\x00\x00\x00", "<ii"),
    "gif": (rb"^GIF8[79]a", "<HH"),
    "jp2": (rb"ihdr", ">II"),
    "ppm": (rb"^P6\n", ""),
}


def run_images(seed: int, count: int, folder: Path) -> Tally:
    """Every image is in the results or named as skipped, nothing hangs, and memory stays below a limit."""
    tally, generator, images = Tally(), np.random.default_rng(seed), folder / "images"
    images.mkdir()
    for number in range(count):
        suffix, data = make_image(generator)
        (images / f"{number:06d}.{suffix}").write_bytes(data)
    arguments = ["inference.py", "--gpu_num=-1", f"--inference_dir={images}", f"--inference_save_folder={folder}/out"]
    finished = run_command(arguments, limit=60 + 2 * count)
    results = folder / "out/results.json"
    tally.peak_megabytes = finished.peak_megabytes
    tally.require(finished.verdict == "read", f"the run: {finished.verdict}, {finished.output[-3000:]}")
    if not results.is_file():
        tally.counts[finished.verdict] += count
        return tally
    content = json.loads(results.read_text(encoding="utf-8"))
    read, named = ({entry["name"] for entry in content[key]} for key in ("images", "skipped"))
    lost = {path.name for path in images.iterdir()} - read - named
    tally.counts.update(read=len(read), named=len(named), lost=len(lost))
    tally.require(not lost, f"neither read nor named: {sorted(lost)[:5]}")
    tally.require(finished.peak_megabytes < _MEMORY_LIMIT, f"peak memory {finished.peak_megabytes:.0f} MB")
    return tally


def make_image(generator: np.random.Generator) -> tuple[str, bytes]:
    """Return a damaged image of any format and its suffix, which may be that of another format."""
    suffix = str(generator.choice(list(_FORMATS)))
    kind = generator.choice(["damaged", "forged", "bomb"], p=[0.8, 0.15, 0.05])
    if kind == "bomb":
        width, height = (int(side) for side in generator.integers(1000, 40_000, 2))
        return "png", decompression_bomb(width, height, bool(generator.integers(2)))
    data = encode(suffix, generator)
    if kind == "forged":
        largest = int(generator.choice([_LARGEST, 30_000, 16_000, 5000]))
        return suffix, forge_size(suffix, data, largest, int(generator.choice([_LARGEST, largest])))
    shown = suffix if generator.random() < 0.9 else str(generator.choice(list(_FORMATS)))
    return shown, mutate(data, generator)


def encode(suffix: str, generator: np.random.Generator) -> bytes:
    """Encode a reduced sample image."""
    samples = sorted((DATA / "sample_widerface/images").iterdir())
    with Image.open(samples[int(generator.integers(len(samples)))]) as whole:
        side = int(generator.integers(60, 300))
        mode = str(generator.choice(_MODES.get(suffix, ["RGB"])))
        image = whole.convert("RGB").resize((side, side * 3 // 4)).convert("I" if mode == "I;16" else mode)
        image = image.convert(mode) if mode == "I;16" else image
    options = dict(_FORMATS[suffix][int(generator.integers(len(_FORMATS[suffix])))])
    if options.pop("animated", False):
        options |= {"save_all": True, "append_images": [image.rotate(angle) for angle in (90, 180)]}
    buffer = io.BytesIO()
    image.save(buffer, {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(suffix, suffix.upper()), **options)
    return buffer.getvalue()


def forge_size(suffix: str, data: bytes, width: int, height: int) -> bytes:
    """Replace the width and height in the header of an image."""
    before, layout = _SIZES[suffix]
    found = re.search(before, data, re.DOTALL)
    if found is None:
        return data
    changed, start = bytearray(data), found.end()
    if suffix == "ppm":
        return re.sub(rb"^P6\n\d+ \d+", b"P6\n%d %d" % (width, height), data)
    sizes = (width,) if suffix == "tif" else (height, width) if suffix in ("jpg", "jp2") else (width, height)
    struct.pack_into(layout, changed, start, *sizes)
    if suffix == "png":
        struct.pack_into(">I", changed, start + 13, zlib.crc32(changed[start - 4 : start + 13]))
    if suffix == "tif":  # the entry of the height follows that of the width
        struct.pack_into(layout, changed, start + 12, height)
    return bytes(changed)


def decompression_bomb(width: int, height: int, is_colour: bool = False) -> bytes:
    """Return a PNG of one colour that decompresses to about a thousand times its size."""
    row = b"\0" + bytes(3 * width if is_colour else (width + 7) // 8)
    packer, packed = zlib.compressobj(9), io.BytesIO()
    for _ in range(height):
        packed.write(packer.compress(row))
    packed.write(packer.flush())
    header = struct.pack(">IIBBBBB", width, height, 8 if is_colour else 1, 2 if is_colour else 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", packed.getvalue()), (b"IEND", b"")]
    packed_chunks = (struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed_chunks)
