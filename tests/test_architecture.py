"""Tests of the structure of the code: import order, and what importing a script loads."""

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
# Modules of utils that the configuration depends on; they import no other module of the project.
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
def test_modules_import_only_their_own_and_lower_layers(file: str) -> None:
    own = part_of(file.removesuffix(".py").replace("/", "."))
    assert own is not None
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for module in imported:
        part = part_of(module)
        if part is not None:
            assert ORDER.index(part) >= ORDER.index(own), f"{file} imports {module}"


@pytest.mark.parametrize(
    ("script", "flag", "message"),
    [
        ("train", "--epochs=0", "--epochs must be positive, got 0"),
        ("test", "--save_errors=-1", "--save_errors must not be negative, got -1"),
        ("inference", "--save_mask", "--save_mask needs --mask"),
        ("export", "--nms_threshold=0.4", "--nms_threshold has no effect without --with_nms"),
    ],
)
def test_flags_are_checked_before_slow_packages_are_imported(script: str, flag: str, message: str) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'matplotlib', 'onnxruntime'): sys.modules[name] = None\n"
        f"import {script}\n"
        "from utils.runtime.cli import run\n"
        f"run({script}.main)"
    )
    for flags, status, shown in (("--help", 0, "--experiment_name"), (flag, 2, message), ("--gpu_num=x", 2, "'x'")):
        command = [sys.executable, "-c", code, flags]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == status, result.stderr
        assert shown in result.stdout + result.stderr


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_of_the_configuration_can_be_built(name: str) -> None:
    assert build_backbone(ModelConfig(backbone=name)) is not None
