"""Rules about the code itself."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from config import BACKBONES, ROOT, ModelConfig
from models.backbone import build_backbone

# Each part may import itself and the parts after it.
ORDER = ["scripts", "engine", "models", "layers", "utils", "config", "declarations"]
SCRIPTS = ("train", "test", "inference", "export", "hubconf")
# Modules of utils that the configuration is made with; they import nothing of ours but each other.
DECLARATIONS = ("utils.errors", "utils.options")


def part_of(module: str) -> str | None:
    top = module.split(".")[0]
    if module in DECLARATIONS:
        return "declarations"
    return "scripts" if top in SCRIPTS else top if top in ORDER else None


def source_files() -> list[str]:
    files = [path for folder in ORDER[1:-1] for path in (ROOT / folder).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.py"), *files))


@pytest.mark.parametrize("file", source_files())
def test_imports_go_one_way(file: str) -> None:
    own = part_of(file.removesuffix(".py").replace("/", "."))
    assert own is not None
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for module in imported:
        part = part_of(module)
        if part is not None:
            assert ORDER.index(part) >= ORDER.index(own), f"{file} imports {module}"


def test_given_predictions_are_measured_without_torch() -> None:
    code = "import sys, test; print([m for m in ('torch', 'torchvision', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_mediapipe_and_tensorboard_are_not_imported_by_inference() -> None:
    code = "import sys, inference; print([m for m in ('mediapipe', 'tensorboard', 'matplotlib') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_of_the_configuration_can_be_built(name: str) -> None:
    assert build_backbone(ModelConfig(backbone=name)) is not None
