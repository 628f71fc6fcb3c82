"""Imports point one way; what is light stays light."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "ensemble_kit"
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
STAGES = {
    "averaging",
    "calibration",
    "export",
    "foreign",
    "fusion",
    "inference",
    "selection",
    "training",
}
NO_TORCH = {
    "calibration",
    "data",
    "metrics",
    "predictions",
    "recipes",
    "runtime",
    "selection",
    "serving",
}


def tree():
    """Return the folders and files of the package as CONTRIBUTING lists them, in its order."""
    (text,) = re.findall(r"```\nensemble_kit/\n(.*?)```", CONTRIBUTING.read_text("utf-8"), re.S)
    rooms, files = [], []
    for line in text.splitlines():
        name = line.split()[0]
        if line.startswith("    "):
            files.append(f"{rooms[-1]}/{name}")
        else:
            rooms.append(name.removesuffix("/").removesuffix(".py"))
            files.append(f"{name}__init__.py" if name.endswith("/") else name)
    return rooms, files


ORDER, FILES = tree()


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


IMPORTS = {module_of(path): imports_of(path) for path in sorted(PACKAGE.rglob("*.py"))}
KIT = {
    module or "__init__": {
        name.removeprefix("ensemble_kit.") for name in names if name.startswith("ensemble_kit.")
    }
    & IMPORTS.keys()
    for module, names in IMPORTS.items()
}


def room(module):
    return module.split(".")[0]


def test_contributing_lists_every_file_once():
    assert len(FILES) >= 100
    assert sorted(FILES) == sorted(
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")
    )


def test_tests_lie_in_folders_of_the_packages_names():
    folders = {path.parent.name for path in PACKAGE.parent.glob("tests/*/test_*.py")}

    assert len(folders) >= 15
    assert folders - {"fuzz"} <= set(ORDER)


def test_a_folder_that_is_no_stage_has_a_docstring_in_its_init_and_a_stage_hands_on_its_verb():
    stages = [name for name in ORDER if (PACKAGE / name / "stage.py").is_file()]
    assert set(stages) == STAGES - {"inference"}
    for name in ORDER:
        if not (PACKAGE / name).is_dir() or name == "cli":
            continue
        body = ast.parse((PACKAGE / name / "__init__.py").read_text(encoding="utf-8")).body
        kinds = [type(node) for node in body]
        verb = [ast.Expr, ast.ImportFrom, ast.Assign]
        assert kinds == (verb if name in stages else [ast.Expr]), name
        if name in stages:
            assert body[1].module == f"ensemble_kit.{name}.stage"


@pytest.mark.parametrize("module", KIT)
def test_names_come_from_their_modules_and_not_through_the_packages_root(module):
    parts = {name.removeprefix("ensemble_kit.") for name in IMPORTS[module.replace("__init__", "")]
             if name.startswith("ensemble_kit.") and name.count(".") == 1}  # fmt: skip

    assert not [name for name in parts if name not in KIT and name not in ORDER], module


@pytest.mark.parametrize("module", KIT)
def test_imports_point_one_way(module):
    place = ORDER.index(room(module))
    for other in KIT[module]:
        assert ORDER.index(room(other)) <= place, f"{module} imports {other}"
        if room(module) in STAGES and room(other) != room(module):
            assert room(other) not in STAGES, f"the stage {module} imports the stage {other}"


def test_there_is_no_cycle():
    waiting = {module: set(others) - {module} for module, others in KIT.items()}
    while waiting:
        free = {module for module, others in waiting.items() if not others & waiting.keys()}
        assert free, f"a cycle among {sorted(waiting)}"
        waiting = {module: others for module, others in waiting.items() if module not in free}


@pytest.mark.parametrize("module", [name for name in KIT if room(name) in NO_TORCH])
def test_rooms_without_torch_never_import_it(module):
    assert not {name for name in IMPORTS[module] if name.split(".")[0] == "torch"}


def loaded_by(code):
    """Run some code in its own process; return the top-level packages it has loaded."""
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


def test_rooms_without_torch_load_none():
    modules = [name for name in KIT if room(name) in NO_TORCH | {"inference", "store"}]
    loaded = loaded_by("import " + ", ".join(f"ensemble_kit.{name}" for name in modules))

    assert "numpy" in loaded
    assert "torch" not in loaded


def test_the_public_names_are_found_where_they_are_said_to_be():
    import ensemble_kit

    for name in ensemble_kit.__all__:
        assert getattr(ensemble_kit, name).__name__ == name
    with pytest.raises(AttributeError) as caught:
        _ = ensemble_kit.nothing
    assert str(caught.value) == "module 'ensemble_kit' has no attribute 'nothing'"


@pytest.mark.parametrize(("before", "after"), [(None, "passive"), ("active", "active")])
def test_openmp_waits_asleep_unless_the_user_says_otherwise(before, after):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if before is not None:
        environment["OMP_WAIT_POLICY"] = before
    code = "import ensemble_kit, os; print(os.environ['OMP_WAIT_POLICY'])"

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )

    assert result.stdout == f"{after}\n"
