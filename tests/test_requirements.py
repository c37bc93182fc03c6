"""Tests that all imported packages are pinned, and that inference needs only those of requirements-inference.txt."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from itertools import chain

from config import ROOT

# Packages that only training, evaluation or masks need.
OPTIONAL = {"tensorboard", "mediapipe", "matplotlib", "faster-coco-eval"}
# Packages by the name under which they are imported, where it differs.
PACKAGES = {"cv2": "opencv-contrib-python", "PIL": "pillow", "markupsafe": "jinja2"}


def names(file: str) -> set[str]:
    lines = (ROOT / file).read_text().split()
    return {line.split("==")[0] for line in lines if "==" in line}


def test_optional_packages_are_listed_in_requirements_txt_only() -> None:
    assert names("requirements.txt") == OPTIONAL
    assert (ROOT / "requirements.txt").read_text().startswith("-r requirements-inference.txt\n")
    assert not names("requirements-inference.txt") & OPTIONAL


def test_all_imported_packages_are_pinned() -> None:
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set[str]()
    for file in files.stdout.split():
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module).split(".")[0])
    own = {path.stem for path in ROOT.iterdir()}
    required = {PACKAGES.get(name, name).replace("_", "-") for name in imported - own - sys.stdlib_module_names}
    assert required <= names("requirements-inference.txt") | OPTIONAL | names("requirements-dev.txt")


def test_the_file_of_hashes_has_the_pinned_versions() -> None:
    lines = (ROOT / "requirements-hashes.txt").read_text().splitlines()
    hashed = dict(line.split(" --hash=sha256:") for line in lines if not line.startswith("#"))
    pins = [(ROOT / file).read_text().split() for file in ("requirements.txt", "requirements-inference.txt")]
    assert {pin for pin in chain(*pins) if "==" in pin} <= hashed.keys()
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in hashed.values())


def test_inference_does_not_import_optional_packages() -> None:
    """Trying to import one is an error that no `except ImportError` hides."""
    optional = {name.replace("-", "_") for name in OPTIONAL}
    code = (
        "import sys\n"
        "class Refusing:\n"
        "    def find_spec(self, name, *arguments):\n"
        f"        assert name.split('.')[0] not in {optional}, name\n"
        "sys.meta_path.insert(0, Refusing())\n"
        "import inference, engine.inference, models.onnx_check, models.detector"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
