"""The notebook, cell by cell, on a few of the real records."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "audioset.ipynb"
COMMAND = re.compile(r"^!((?:.*\\\n)*.*)$", re.MULTILINE)


def cells():
    """Return the text of each cell of code."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shell(text, names):
    """Run a command as Jupyter does, with ``{expressions}`` filled in, and print what it prints."""
    filled = re.sub(r"\{([^{}]+)\}", lambda match: str(eval(match[1], names)), text)
    done = subprocess.run(["sh", "-c", filled], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout, end="")


def python_of(cell):
    """Return a cell as Python: its commands as calls."""
    return COMMAND.sub(lambda match: f"shell({match[1]!r}, globals())", cell)


def test_every_cell_is_python_or_a_command():
    assert len(cells()) >= 8
    for cell in cells():
        compile(python_of(cell), "cell", "exec")


@pytest.mark.realdata
@pytest.mark.exhaustive
def test_the_notebook_ends_with_tags_and_a_score(real_data, tmp_path, monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENSEMBLE_KIT_DATA", str(real_data))
    monkeypatch.setenv("SHARDS", "?A*")
    monkeypatch.setenv("STEPS", "4")
    monkeypatch.setenv("ENSEMBLE_KIT_FUSE_MAX_GAP_LOSS", "1")  # after four steps GAP says little
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    names = {"shell": shell}

    for cell in cells():
        exec(compile(python_of(cell), "cell", "exec"), names)

    printed = capsys.readouterr().out
    assert "tags:\n" in printed
    assert re.search(r"^GAP@20 +0\.\d{4}$", printed, flags=re.MULTILINE)
    assert (tmp_path / "ensemble" / "report.html").is_file()
    assert "## Time and memory" in (tmp_path / "ensemble" / "README.md").read_text("utf-8")
