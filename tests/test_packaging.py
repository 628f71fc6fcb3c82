"""What is shipped: the recipes inside the wheel, whichever way it is built."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

PROJECT_ROOT = Path(__file__).resolve().parents[1]
RECIPES = {
    path.relative_to(PROJECT_ROOT).as_posix() for path in (PROJECT_ROOT / "models").rglob("*.toml")
}
PACKAGED = {  # modules, and the report's template
    path.relative_to(PROJECT_ROOT).as_posix()
    for path in (PROJECT_ROOT / "ensemble_kit").rglob("*.*")
    if path.is_file() and path.suffix != ".pyc"
}


def run_python(*arguments, cwd, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def only(paths):
    (path,) = paths
    return path


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The folder of an sdist and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run_python("-m", "build", "--no-isolation", "--outdir", folder, PROJECT_ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def direct_wheel(tmp_path_factory):
    """A wheel that is built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    arguments = ("--wheel", "--no-isolation", "--outdir", folder, PROJECT_ROOT)
    run_python("-m", "build", *arguments, cwd=folder)
    return only(folder.glob("*.whl"))


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_package_and_the_recipes_within_it(distributions):
    names = contents(only(distributions.glob("*.whl")))

    assert RECIPES
    assert names == PACKAGED | {f"ensemble_kit/{recipe}" for recipe in RECIPES}


def test_a_wheel_from_the_checkout_is_the_wheel_from_the_sdist(distributions, direct_wheel):
    assert contents(direct_wheel) == contents(only(distributions.glob("*.whl")))


def test_the_sdist_holds_what_the_tests_need(distributions):
    with tarfile.open(only(distributions.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    tests = {path.relative_to(PROJECT_ROOT).as_posix() for path in Path(__file__).parent.rglob(
        "*.py")}  # fmt: skip
    assert RECIPES | PACKAGED | tests | {"pyproject.toml", "LICENSE", "README.md"} <= names


def test_an_installed_wheel_finds_its_recipes(direct_wheel, tmp_path):
    with zipfile.ZipFile(direct_wheel) as archive:
        archive.extractall(tmp_path / "installed")

    code = (
        "import ensemble_kit; from ensemble_kit.recipes import reading as recipes; "
        "print(ensemble_kit.__file__); "
        "print(*(recipes.load_recipe(name).name for name in recipes.recipe_names())); "
        "from ensemble_kit.recipes.ensembles import load_ensembles; "
        "print(*{each.name.split('/')[0] for each in load_ensembles()})"
    )
    output = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))

    where, names, papers = output.splitlines()
    assert Path(where) == tmp_path / "installed" / "ensemble_kit" / "__init__.py"
    files = [f"models/{name}.toml" for name in names.split()]
    files += [f"models/{paper}/ensembles.toml" for paper in papers.split()]
    assert sorted([*files, "models/template.toml"]) == sorted(RECIPES)


def test_an_editable_install_exposes_the_package_and_nothing_else(tmp_path):
    code = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    run_python("-c", code, cwd=PROJECT_ROOT)

    names = contents(only(tmp_path.glob("*.whl")))
    with zipfile.ZipFile(only(tmp_path.glob("*.whl"))) as archive:
        text = archive.read("_editable_impl_ensemble_kit.py").decode()
    assert names == {"_editable_impl_ensemble_kit.pth", "_editable_impl_ensemble_kit.py"}
    mapped = [line for line in text.splitlines() if "map_module" in line]
    package = str(PROJECT_ROOT / "ensemble_kit" / "__init__.py")
    assert mapped == [f"F.map_module('ensemble_kit', {package!r})"]


def test_no_code_lies_among_the_recipes():
    assert not list((PROJECT_ROOT / "models").rglob("*.py"))
