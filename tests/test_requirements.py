"""Tests that inference needs only the packages of requirements-inference.txt."""

from __future__ import annotations

import subprocess
import sys

import pytest

from config import ROOT

# Packages that only training, evaluation or masks need.
OPTIONAL = {"tensorboard", "mediapipe", "matplotlib", "faster-coco-eval"}


def names(file: str) -> set[str]:
    lines = (ROOT / file).read_text().split()
    return {line.split("==")[0] for line in lines if "==" in line}


def test_optional_packages_are_listed_in_requirements_txt_only() -> None:
    assert names("requirements.txt") == OPTIONAL
    assert (ROOT / "requirements.txt").read_text().startswith("-r requirements-inference.txt\n")
    assert not names("requirements-inference.txt") & OPTIONAL


@pytest.mark.parametrize("module", ["inference", "export", "models.detector"])
def test_inference_does_not_import_optional_packages(module: str) -> None:
    blocked = "; ".join(f"sys.modules[{name.replace('-', '_')!r}] = None" for name in sorted(OPTIONAL))
    command = [sys.executable, "-c", f"import sys; {blocked}; import {module}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
