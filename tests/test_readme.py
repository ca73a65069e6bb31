"""The README and BUILD.md are true: every file, link, command, flag and setting they name exists."""

import ast
import re
from pathlib import Path

import pytest

from lm import command, train
from lm import config as config_lib

ROOT = Path(__file__).parent.parent
README, BUILD = ((ROOT / name).read_text() for name in ("README.md", "BUILD.md"))
COMMANDS = re.findall(r"python -m ((?:lm|tools)\.\w+)([^\n`]*)", README + BUILD)


def test_every_link_leads_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", README + BUILD)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_tree_names_every_module_and_nothing_else():
    tree = README.split("## Where things are")[1].split("```")[1]
    for path in (ROOT / "lm").iterdir():
        if path.suffix == ".py" and path.name != "__init__.py":
            assert f"  {path.name} " in tree, path
    for name in re.findall(r"^  (\w+\.py)", tree, re.MULTILINE):
        assert (ROOT / "lm" / name).exists(), name
    parts = ("nn", "models", "tasks", "convert", "convert/architectures", "data", "data/cleaning")
    for base in (*(ROOT / "lm" / part for part in parts), ROOT / "experiments", ROOT / "tools"):
        for path in base.glob("*.py"):
            assert path.name == "__init__.py" or re.search(rf"\b{path.stem}\b", tree), path


def test_the_set_up_is_two_lines_that_make_or_reuse_an_environment():
    lines = re.findall(r"^python3 -m venv \.venv.*$", README, re.MULTILINE)
    assert len(lines) == 2
    assert lines[0].endswith(
        "pip install -e . && python -m lm.main --config experiments/gpt_tiny.py"
    )
    assert lines[1].endswith("pip install -e '.[test]' && pytest")


@pytest.mark.parametrize(("module", "flags"), COMMANDS, ids=lambda value: str(value).strip()[:60])
def test_every_command_names_a_tool_and_flags_it_has(module, flags):
    path = ROOT / (module.replace(".", "/") + ".py")
    assert path.exists() or module == "tools.X", module
    assignments, rest = command.split_flags(flags.split())
    for flag in rest:
        if flag.startswith("--") and module != "tools.X":
            assert f'"{flag.split("=")[0]}"' in path.read_text(), f"{module} has no {flag}"
    settings = [a for a in assignments if not a.startswith("SECTION")]
    config_lib.override(config_lib.ConfigDict(), settings, train.SCHEMA)
    for named in re.findall(r"experiments/\w+\.py", flags):
        assert (ROOT / named).exists(), named


def test_the_notebook_lines_call_what_exists():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    imported = {}
    exec("import lm.checkpoint, lm.config, lm.train", imported)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            assert callable(eval(ast.unparse(node.func), imported)), ast.unparse(node)
