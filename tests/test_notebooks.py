"""Every notebook runs, with few steps: it imports lm and never redefines it."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "experiments" / "notebooks").glob("*.ipynb"))


def code_of(notebook):
    """Return the code of all cells, without the lines that speak to the notebook's shell."""
    cells = json.loads(notebook.read_text())["cells"]
    lines = "".join("".join(c["source"]) + "\n" for c in cells if c["cell_type"] == "code")
    return "\n".join(line for line in lines.splitlines() if not line.startswith(("%", "!")))


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_cell_may_run_again(notebook):
    first = code_of(notebook).partition("import lm")[0]
    twice = [sys.executable, "-c", f"{first}\n{first}\nprint(os.getcwd())"]
    done = subprocess.run(twice, cwd=notebook.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(notebook, tmp_path, monkeypatch):
    code = code_of(notebook)
    shortened = code.replace("num_steps = 300", "num_steps = 2")
    shortened = shortened.replace('"runs/notebook"', repr(str(tmp_path / "run")))
    assert shortened.count(str(tmp_path)) == 1 and shortened != code
    shown = types.ModuleType("IPython.display")
    shown.Image = lambda path: os.stat(path)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    monkeypatch.chdir(ROOT)
    scope: dict = {}
    exec(compile(shortened, str(notebook), "exec"), scope)
    assert scope["metrics"]["eval/loss"] > 0 and len(scope["tokens"]) <= 60
    assert "stop_tokens=tokenizer.stop_tokens" in code
