"""Imports point one way; what is light stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ensemble_kit"
# A module may import those of its level or below it. Within a level there is no cycle, and stages
# do not import each other at all: they meet in files.
LEVELS = [
    {"errors"},
    {
        "array_files",
        "candidates",
        "challenge_csv",
        "checkpoints",
        "data",
        "draws",
        "files",
        "jobs",
        "metrics",
        "metrics_log",
        "model_card",
        "onnx_file",
        "onnx_names",
        "onnx_record",
        "prediction_rows",
        "predictions",
        "progress",
        "provenance",
        "recipe_tables",
        "recipes",
        "runs",
        "row_files",
        "runtime",
        "selections",
        "size_gate",
        "signature",
        "triton",
        "workspace",
    },
    {"layers"},
    {
        "averages",
        "catalogue",
        "ensemble",
        "fused_weights",
        "imported",
        "imported_checks",
        "loading",
        "means",
        "onnx_graph",
        "onnx_model",
        "onnx_import",
        "onnx_imported",
        "onnx_weights",
        "parity",
        "parts",
        "recalibration",
        "rounding",
        "storage",
        "submodel",
    },
    {
        "averaging",
        "evaluation",
        "export",
        "fusion",
        "importing",
        "prediction",
        "report",
        "selection",
        "training",
        "verification",
    },
    {"pipeline"},
    {"cli", "__main__"},
]
STAGES = 4


def module_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(path):
    """Return every module that a file names in an import, wherever in it that stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# The package's own __init__ is left out: it holds the version, and lends the names of all levels.
IMPORTS = {module_of(path): imports_of(path) for path in sorted(PACKAGE.rglob("*.py"))}
KIT = {
    module: {name.removeprefix("ensemble_kit.") for name in names} & (IMPORTS.keys() - {""})
    for module, names in IMPORTS.items()
    if module
}


def level_of(module):
    (level,) = (number for number, names in enumerate(LEVELS) if module.split(".")[0] in names)
    return level


def test_every_module_has_a_level_and_every_level_its_modules():
    assert len(KIT) >= 50
    assert {module.split(".")[0] for module in KIT} == set().union(*LEVELS)


@pytest.mark.parametrize("module", KIT)
def test_imports_point_one_way(module):
    for other in KIT[module]:
        assert level_of(other) <= level_of(module), f"{module} imports {other}"
        if level_of(module) == STAGES and other.split(".")[0] != module.split(".")[0]:
            assert level_of(other) < STAGES, f"the stage {module} imports the stage {other}"


def test_there_is_no_cycle():
    waiting = {module: set(others) - {module} for module, others in KIT.items()}
    while waiting:
        free = {module for module, others in waiting.items() if not others & waiting.keys()}
        assert free, f"a cycle among {sorted(waiting)}"
        waiting = {module: others for module, others in waiting.items() if module not in free}


@pytest.mark.parametrize(
    "module", [name for name in KIT if name.split(".")[0] in {"data", "metrics"}]
)
def test_data_and_metrics_never_import_torch(module):
    assert not {name for name in IMPORTS[module] if name.split(".")[0] == "torch"}


def loaded_by(code):
    """Run some code in a process of its own; return the top-level packages it has loaded."""
    ending = "; import sys; print('LOADED', *{name.split('.')[0] for name in sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code + ending],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return set(result.stdout.rpartition("LOADED")[2].split())


HEAVY = {"torch", "onnx", "onnxruntime", "onnxscript", "pydantic", "numpy", "safetensors", "rich"}


@pytest.mark.parametrize(
    "code",
    [
        "import ensemble_kit",
        "from ensemble_kit.cli import main; main(['--help'], standalone_mode=False)",
        "from ensemble_kit.cli.main import COMMANDS, main; "
        "[main([name, '--help'], standalone_mode=False) for name in COMMANDS]",
    ],
    ids=["package", "help", "help of every command"],
)
def test_the_package_and_its_help_load_nothing_heavy(code):
    loaded = loaded_by(code)

    assert "ensemble_kit" in loaded
    assert not loaded & HEAVY


def test_what_reads_data_and_runs_the_artefact_needs_no_torch():
    loaded = loaded_by(
        "import ensemble_kit.data.dataset, ensemble_kit.data.synthetic, ensemble_kit.metrics, "
        "ensemble_kit.serving.session, ensemble_kit.selection.stage, ensemble_kit.store.tensor_files"
    )

    assert "numpy" in loaded
    assert "torch" not in loaded


def test_the_public_names_are_found_where_they_are_said_to_be():
    import ensemble_kit

    for name in ensemble_kit.__all__:
        assert getattr(ensemble_kit, name).__name__ == name
    with pytest.raises(AttributeError) as caught:
        _ = ensemble_kit.nothing
    assert str(caught.value) == "module 'ensemble_kit' has no attribute 'nothing'"
