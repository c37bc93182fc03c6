"""Hostile file names and paths: nothing is written outside the results, and text files can still be parsed."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from campaigns.harness import Tally, run_isolated
from config import DATA, EXPERIMENTS
from inference import main as infer
from test import main as evaluate

_FAST = EXPERIMENTS / "mobilenet0.25_anc2_casT_fpn3/ckpt/mobilenet0.25_ckpt-best.pth"
_PARTS = (
    *(
        "..",
        "a\nb",
        "c\rd",
        "'",
        '"',
        "<script>alert(1)</script>",
        "&lt;",
        "<img src=x onerror=alert(1)>",
        "\u2028",
        "\u202e",
        "-x",
        "~",
    ),
    *("%s", "{}", "$(touch hacked)", "`touch hacked`", "a,b", "a;b", "# x", "\x1b[31m", "\x7f", "COM1", " ", "."),
    *(os.fsdecode(b"\xff\xfe"), "\u00e9", "e\u0301", "\U0001f600", "\\", "C:\\a", "x" * 200, "\u00e9" * 100),
)
_EXPORTS = "coco,csv,cvat"


def run_names(seed: int, count: int, folder: Path) -> Tally:
    """Run a folder, a list and a label file with hostile names in every case."""
    tally, generator = Tally(), np.random.default_rng(seed)
    sample = DATA / "sample_widerface/images/astronaut.jpg"
    for number in range(count):
        case = folder / str(number)
        images = case / "in/images"
        images.mkdir(parents=True)
        names = [_make_name(generator) for _ in range(6)]
        for name in names:
            if not (images / name).exists():
                shutil.copy(sample, images / name)
        (case / "outside").mkdir()
        shutil.copy(sample, case / "outside/secret.jpg")
        (images / "link").symlink_to(case / "outside")
        (images / "link.jpg").symlink_to(case / "outside/secret.jpg")
        paths = [
            *(path.name for path in images.iterdir()),
            "../../outside/secret.jpg",
            str(case / "outside/secret.jpg"),
        ]
        (case / "in/list.txt").write_bytes(b"\n".join(os.fsencode(images / path) for path in paths if "\n" not in path))
        rows = (b"# " + os.fsencode(path) + b"\n10 10 90 90\n" for path in paths if not set(path) & set("\n\r\u2028"))
        (case / "in/label.txt").write_bytes(b"".join(rows))
        before = _files(folder)
        out = [case / f"out{each}" for each in range(3)]
        weights = ["--gpu_num=-1", f"--model_weight={_FAST}"]
        crops = "--save_crops=plain,aligned" if number % 2 else "--anonymize=solid"
        for source, target in ((images, out[0]), (case / "in/list.txt", out[1])):
            flags = [*weights, f"--inference_dir={source}", f"--inference_save_folder={target}", "--save_img", crops]
            tally.add(f"{names}: {source}", run_isolated(partial(infer, flags)))
            tally.add(f"{names}: export", run_isolated(partial(infer, [*flags, f"--export={_EXPORTS}"])))
        flags = [*weights, f"--dataset={case / 'in'}", f"--output_dir={out[2]}"]
        tally.add(f"{names}: test.py", run_isolated(partial(evaluate, flags)))
        written = _files(folder) - before
        elsewhere = [path for path in written if not any(path.is_relative_to(each) for each in out)]
        tally.require(not elsewhere, f"{names}: written outside the results: {elsewhere[:5]}")
        for each in out:
            _check_readable(each, tally, f"{names}: {each.name}")
        shutil.rmtree(case)
    return tally


def _make_name(generator: np.random.Generator) -> str:
    parts = [str(_PARTS[int(place)]) for place in generator.integers(len(_PARTS), size=int(generator.integers(1, 4)))]
    stem = "".join(parts).replace("/", "")
    while len(os.fsencode(stem)) > 251:
        stem = stem[:-1]
    return f"{stem}.jpg"


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if not path.is_dir()}


class _Tags(HTMLParser):
    """Counts scripts and event handlers that a name has injected."""

    def __init__(self) -> None:
        super().__init__()
        self.alerts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.alerts += any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.alerts += self.lasttag == "script" and data.strip() == "alert(1)"


def _check_readable(out: Path, tally: Tally, where: str) -> None:
    """JSON can be parsed, the table has a line for each image and face, and no name injects code into the page."""
    for path in out.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    for path in out.glob("results.jsonl"):
        entries = [json.loads(line) for line in path.read_bytes().splitlines()]
        (table,) = out.glob("*_inference_results.txt")
        lines = table.read_bytes().rstrip(b"\n").split(b"\n")
        expected = sum(1 + len(entry["faces"]) for entry in entries if "faces" in entry)
        tally.require(len(lines) == expected, f"{where}: {table.name} has {len(lines)} lines, expected {expected}")
    for path in out.glob("*.html"):
        tags = _Tags()
        tags.feed(path.read_text(encoding="utf-8"))
        tally.require(not tags.alerts, f"{where}: {path.name} runs code from a name")
