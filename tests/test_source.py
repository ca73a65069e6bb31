"""No data is run as code: a walk over all sources, and runs whose experiment file is a trap."""

import ast
import json
import re
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from lm import checkpoint, main, train
from lm import workdir as workdirs
from lm.config import ConfigError
from tools import checkpoint as checkpoint_tool
from tools import evaluate, generate, plot, verify

ROOT = Path(__file__).parent.parent
FOLDERS = ("lm", "tools", "experiments", "tests")
# (file, function, what) -> how often, and why it may.
ALLOWED = {
    ("lm/config.py", "call", "exec"): (1, "the experiment that a user names on the command line"),
    ("lm/config.py", "call", "compile"): (1, "the same"),
    ("lm/models/__init__.py", "family", "a computed import"): (1, "a name out of the folder's files"),
    ("lm/tasks/__init__.py", "config_class", "a computed import"): (1, "a name out of the folder's files"),
    ("lm/tasks/__init__.py", "kinds", "a computed import"): (1, "the module of a class that is here"),
    ("lm/tasks/__init__.py", "build", "a computed import"): (1, "the module of a class that is here"),
    ("lm/convert/architectures/__init__.py", "architecture", "a computed import"): (
        1, "a name out of the folder's files",
    ),
    ("tests/killed.py", "arm", "a computed import"): (1, "which function kills, said by the test"),
    ("tests/killed.py", "serve", "a computed import"): (1, "names in that file"),
    ("tests/test_watchdog.py", "", "a computed import"): (1, "which function hangs, said by the test"),
    ("tests/test_notebooks.py", "test_every_notebook_runs", "exec"): (1, "the notebook under test"),
    ("tests/test_notebooks.py", "test_every_notebook_runs", "compile"): (1, "the same"),
    ("tests/test_readme.py", "test_the_notebook_lines_call_what_exists", "exec"): (1, "a line of that file"),
    ("tests/test_readme.py", "test_the_notebook_lines_call_what_exists", "eval"): (1, "the README"),
    ("tests/models/test_ngram.py", "", "runpy.run_path"): (1, "the committed file that made the reference"),
    ("tests/tools/test_sweep.py", "", "exec"): (1, "what the test wrote for its stand-in of a run"),
    ("tests/data/test_mongodb.py", "", "pickle"): (1, "what is sent to a worker survives it"),
    ("tests/data/test_cleaning.py", "", "pickle"): (1, "what is sent to a worker survives it"),
    ("tests/data/cleaning/test_overlap.py", "", "pickle"): (1, "what is sent to a worker survives it"),
    (".ci/run", "", "eval"): (2, "the README's own lines"),
}  # fmt: skip
UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNNING = {"eval", "exec", "compile", "__import__"}
CALLS = {
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell", "runpy.run_path", "runpy.run_module", "yaml.unsafe_load",
    "yaml.load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "torch.load", "code.interact",
    "importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader",
}  # fmt: skip
FLAGS = {"shell": False, "allow_pickle": False, "trust_remote_code": False}  # what is fine
PLACES = {  # which argument a flag is where it has no name
    "numpy.load": (2, "allow_pickle"),
    **{f"subprocess.{name}": (8, "shell") for name in ("Popen", "run", "call", "check_call", "check_output")},
}  # fmt: skip
SHELL = {
    "eval": r"(?<![\w./-])eval(?![\w.=/-])",
    "a download that is run": r"\b(curl|wget)\b[^\n;]*\|\s*(sudo\s+)?(\S*/)?((ba|da|k|z)?sh|python[\d.]*)\b"
    r"|\b(source|(ba|da|k|z)?sh|python[\d.]*)\b[^\n;|]*(<\(|\$\(|`)\s*(curl|wget)\b",
}


class Walk(ast.NodeVisitor):
    """Counts what runs data as code in a file: `found` by (function, what)."""

    def __init__(self, text):
        self.found, self._functions, self._names = Counter(), [], {}
        self._fine = set()  # names that are called in a way that may be
        self.visit(ast.parse(text))

    def _add(self, what):
        self.found[self._functions[0] if self._functions else "", what] += 1

    def visit_FunctionDef(self, node):
        self._functions.append(node.name)
        self.generic_visit(node)
        self._functions.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Import(self, node):
        for alias in node.names:
            self._imports(alias.name)
            local = alias.asname or alias.name.partition(".")[0]
            self._names[local] = alias.name if alias.asname else local

    def visit_ImportFrom(self, node):
        for alias in node.names:
            self._imports(f"{node.module}.{alias.name}")
            self._names[alias.asname or alias.name] = f"{node.module}.{alias.name}"

    def _imports(self, name):
        for part in UNPICKLING & set(name.split(".")):
            self._add(part)

    def _name(self, node):
        """Return the dotted name of an expression, after the imports so far; "" for another."""
        if isinstance(node, ast.Call) and self._name(node.func).endswith("import_module"):
            return node.args[0].value if node.args and _is_text(node.args[0]) else ""
        if isinstance(node, ast.Name):
            return self._names.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (of := self._name(node.value)):
            return f"{of}.{node.attr}"
        return ""

    def visit_Name(self, node):
        name = self._names.get(node.id, node.id).removeprefix("builtins.")
        if name in RUNNING | CALLS and isinstance(node.ctx, ast.Load) and node not in self._fine:
            self._add(name)

    def visit_Attribute(self, node):
        name = self._name(node)
        if name in CALLS and node not in self._fine:
            self._add(name)
        if name.removeprefix("builtins.") in RUNNING:
            self._add(name.removeprefix("builtins."))
        if node.attr in {"read_pickle", "to_pickle", *UNPICKLING}:
            self._add(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node):
        name = self._name(node.func)
        keywords = {
            k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
        }
        for keyword in node.keywords:
            self._flag(keyword.arg, keyword.value)
        place, flag = PLACES.get(name.replace("np.", "numpy."), (len(node.args), ""))
        for argument in node.args[place : place + 1]:
            self._flag(flag, argument)
        if name == "torch.load" and keywords.get("weights_only") is True:
            self._fine.add(node.func)
        if name.endswith("import_module"):
            if node.args and _is_text(node.args[0]):
                self._imports(node.args[0].value)
            else:
                self._add("a computed import")
        self.generic_visit(node)

    def visit_Dict(self, node):
        for key, value in zip(node.keys, node.values, strict=True):
            if key is not None and _is_text(key):
                self._flag(key.value, value)
        self.generic_visit(node)

    def _flag(self, name, value):
        if name in FLAGS and not (isinstance(value, ast.Constant) and value.value is FLAGS[name]):
            self._add(f"{name}=True")

    def visit_Constant(self, node):
        """A program in a string is walked too: tests give some to other processes."""
        if isinstance(node.value, str) and "\n" in node.value and "import " in node.value:
            try:
                inner = Walk(node.value)
            except SyntaxError:
                return
            for (_, what), count in inner.found.items():
                for _ in range(count):
                    self._add(what)


def _is_text(node):
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def walk_shell(text):
    """Counts, as `Walk`, what runs data as code in a program of a shell, or in a file that has some."""
    lines = re.sub(r"(^|\s)#.*", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    count = {what: len(re.findall(pattern, lines)) for what, pattern in SHELL.items()}
    return Counter({("", what): n for what, n in count.items() if n})


def shell_sources():
    """(name, text) of all files with programs of a shell."""
    for folder in (*FOLDERS, ".ci"):
        for path in sorted((ROOT / folder).rglob("*")):
            if not path.is_file() or path.suffix in (".py", ".pyc"):
                continue
            if path.suffix in (".sh", ".yaml", ".yml") or path.read_bytes().startswith(b"#!"):
                yield str(path.relative_to(ROOT)), path.read_text()


def sources():
    """(name, text) of all files but this one with its examples, and of the notebooks' code cells."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path != Path(__file__):
                yield str(path.relative_to(ROOT)), path.read_text()
        for path in sorted((ROOT / folder).rglob("*.ipynb")):
            cells = json.loads(path.read_text())["cells"]
            lines = [line for c in cells if c["cell_type"] == "code" for line in c["source"]]
            code = [line for line in lines if not line.startswith(("%", "!"))]
            yield str(path.relative_to(ROOT)), "".join(f"{line.rstrip()}\n" for line in code)


def test_nothing_runs_data_as_code():
    """Each place is in the list with its reason, and the list has no other."""
    found = {
        (name, *place): count
        for name, text in sources()
        for place, count in Walk(text).found.items()
    }
    for name, text in shell_sources():
        found |= {(name, *place): count for place, count in walk_shell(text).items()}
    assert found == {place: count for place, (count, _) in ALLOWED.items()}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import pickle", "pickle"), ("import cloudpickle as c", "cloudpickle"), ("import dill", "dill"),
        ("from joblib import load", "joblib"), ("def f():\n import shelve", "shelve"),
        ("from marshal import loads", "marshal"), ("from six.moves import cPickle", "cPickle"),
        ("eval('1')", "eval"), ("map(exec, texts)", "exec"), ("compile(a, b, c)", "compile"),
        ("import builtins\nbuiltins.eval(x)", "eval"), ("from builtins import exec as e\ne(x)", "exec"),
        ("__import__('a')", "__import__"), ("import yaml\nyaml.load(x)", "yaml.load"),
        ("import yaml as y\ny.unsafe_load(x)", "yaml.unsafe_load"),
        ("import os\nos.system('ls')", "os.system"), ("from os import popen\npopen('a')", "os.popen"),
        ("run('ls', shell=True)", "shell=True"), ("run('ls', shell=yes)", "shell=True"),
        ("np.load(f, allow_pickle=True)", "allow_pickle=True"),
        ("import torch\ntorch.load(f)", "torch.load"),
        ("import torch as t\nt.load(f, weights_only=False)", "torch.load"),
        ("import importlib\nimportlib.import_module(name)", "a computed import"),
        ("from importlib import import_module as i\ni(f'a.{b}')", "a computed import"),
        ("load(x, trust_remote_code=True)", "trust_remote_code=True"), ("pd.read_pickle(f)", "read_pickle"),
        ("import runpy\nrunpy.run_path(p)", "runpy.run_path"),
        ("S = '''\nimport os\nos.system(a)\n'''", "os.system"),
        ("import importlib\nimportlib.import_module('pickle')", "pickle"),
        ("from importlib import import_module\nimport_module('yaml').load(x)", "yaml.load"),
        ("np.load(f, None, True)", "allow_pickle=True"),
        ("import numpy\nnumpy.load(f, None, yes)", "allow_pickle=True"),
        ("import subprocess as s\ns.Popen(ls, -1, None, None, None, None, None, True, True)", "shell=True"),
        ("run('ls', **{'shell': True})", "shell=True"),
        ("o = {'allow_pickle': yes}\nload(f, **o)", "allow_pickle=True"),
        ("import yaml\nmap(yaml.load, files)", "yaml.load"),
        ("from yaml import load\nread = load", "yaml.load"),
        ("import torch\ntorch.serialization.pickle.load(f)", "pickle"),
        ("import torch\nmap(torch.load, files)", "torch.load"),
    ],
)  # fmt: skip
def test_the_walk_sees(text, what):
    assert [found for _, found in Walk(text).found] == [what]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('eval "$(lines)"', "eval"), ("a && eval $b  # b is fine", "eval"),
        ("curl -fsSL https://a.b/c | sh", "a download that is run"),
        ("wget -O- a.b/c |\\\n  sudo bash -s", "a download that is run"),
        ("source <(curl a.b/c)", "a download that is run"),
        ('sh -c "$(curl -fsSL a.b/c)"', "a download that is run"),
        ("command: [bash, -c, 'curl a.b/c | python3']", "a download that is run"),
    ],
)  # fmt: skip
def test_the_walk_of_shells_sees(text, what):
    assert walk_shell(text) == {("", what): 1}


def test_the_walk_of_shells_lets_be():
    fine = "# eval\npython -m tools.evaluate --config.eval.max_tokens=9\ncurl a.b/c | tar x; sh run.sh\n"
    assert not walk_shell(fine)
    names = {name for name, _ in shell_sources()}
    assert names >= {
        ".ci/run",
        "tools/cluster/slurm.sh",
        "tools/cluster/tpu.sh",
        "tools/cluster/jobset.yaml",
    }


@pytest.mark.parametrize(
    "text",
    [
        "np.load(f, None, False)", "np.load(f, 'r')", "run(['ls'], **{'shell': False})",
        "import re\nre.compile('a')", "model.eval()", "import ast\nast.literal_eval(x)",
        "import torch\ntorch.load(f, weights_only=True)", "np.load(f, allow_pickle=False)",
        "import yaml\nyaml.safe_load(x)", "import importlib\nimportlib.import_module('lm.train')",
        "run(['ls'], shell=False)", "def f():\n '''Say what\n import pickle does.'''",
    ],
)  # fmt: skip
def test_the_walk_lets_be(text):
    assert not Walk(text).found


def test_every_entry_point_is_walked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not {"scripts", "gui-scripts", "entry-points"} & set(project["project"])
    included = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in included} <= set(FOLDERS)


TRAP = """
from pathlib import Path
Path({marker!r}).write_text("the experiment ran")
raise RuntimeError("the experiment ran")
"""


def uses(workdir, out):
    """Everything that reads a run, by name."""
    run = ["--workdir", str(workdir)]
    folder = str(workdir / "checkpoints")
    return {
        "load": lambda: checkpoint.load(workdir),
        "complete": lambda: workdirs.completer(workdir, checkpoint.load(workdir)),
        "generate": lambda: generate.main([*run, "--prompt", "the", "--max_tokens", "2"]),
        "evaluate": lambda: evaluate.main([*run, "--config.eval.max_tokens=64"]),
        "list": lambda: checkpoint_tool.main(["list", folder]),
        "verify arrays": lambda: checkpoint_tool.main(["verify", folder, "--arrays"]),
        "inspect": lambda: checkpoint_tool.main(["inspect", folder]),
        "export": lambda: checkpoint_tool.main(["export", folder, "--out", str(out / "a.safetensors")]),
        "verify": lambda: verify.main([str(workdir), "--steps", "0:2"]),
        "plot": lambda: plot.main([*run, "--out", str(out / "loss.png")]),
        "resume": lambda: train.run(checkpoint.read_config(workdir), workdir),
    }  # fmt: skip


def test_no_use_of_a_run_needs_or_runs_its_experiment_file(tiny, tmp_path, capsys):
    """It is replaced by a trap, then gone, and all that reads the run does what it does."""
    experiment, marker, run = tmp_path / "mine.py", tmp_path / "marker", tmp_path / "run"
    values = tiny(train__num_steps=2, train__fingerprint_every_steps=1).to_dict()
    experiment.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    argv = ["--config", str(experiment), "--workdir", str(run)]
    assert main.main(argv) == 0
    before = (run / "metrics.jsonl").read_bytes()
    experiment.write_text(TRAP.format(marker=str(marker)))
    for there in (True, False):
        if not there:
            experiment.unlink()
        (out := tmp_path / f"out_{there}").mkdir()
        for name, use in uses(run, out).items():
            assert not isinstance(code := use(), int) or code == 0, (name, capsys.readouterr().err)
            assert not marker.exists(), name
    assert (run / "metrics.jsonl").read_bytes() == before
    experiment.write_text(TRAP.format(marker=str(marker)))
    assert main.main(argv) == 2 and marker.exists(), "the trap works"


@pytest.fixture(scope="module")
def finished(text_file, tmp_path_factory):
    from ml_collections import ConfigDict

    workdir = tmp_path_factory.mktemp("finished")
    sections = {
        "data": {"path": (str(text_file),), "tokenizer": "byte", "batch_size": 8},
        "task": {"length": 16},
        "model": {"name": "gpt", "num_layers": 1, "model_dim": 32, "num_heads": 2},
        "train": {"num_steps": 1, "sample_tokens": 0},
        "eval": {"max_tokens": 128},
    }
    train.run(ConfigDict(sections), workdir)
    return workdir


def with_model(**values):
    return lambda config: {**config, "model": {**config["model"], **values}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_model(__class__="os.system"), r"__class__"),
        (lambda config: {**config, "__class__": "os.system"}, r"__class__"),
        (lambda config: {**config, "optim": {"__reduce__": ["os.system", ["ls"]]}}, "__reduce__"),
        (with_model(**{"py/object": "os.system"}), "py/object"),
        (with_model(name="os"), "no family of models"),
        (with_model(name="..train"), "no family of models"),
        (with_model(name="!!python/name:os.system"), "no family of models"),
        (with_model(num_layers="__import__('os').system('ls')"), "num_layers"),
        (with_model(model_dim={"__class__": "int"}), r"__class__"),
        (lambda config: "!!python/object/apply:os.system ['touch marker']\n", "not a JSON object"),
        (lambda config: ["!!python/object/apply:os.system", ["ls"]], "not a JSON object"),
    ],
)  # fmt: skip
def test_a_config_that_would_be_code_is_refused(
    finished, tmp_path, monkeypatch, capsys, change, words
):
    """By all that reads it, in a line that names it, and nothing is run."""
    monkeypatch.chdir(tmp_path)
    path = finished / "config.json"
    text = path.read_text()
    changed = change(json.loads(text))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    try:
        with pytest.raises(ConfigError, match=words):
            checkpoint.load(finished)
        for tool, more in ((generate, ("--prompt", "the")), (evaluate, ())):
            assert tool.main(["--workdir", str(finished), *more]) == 2
            assert capsys.readouterr().err.count("\n") == 1
    finally:
        path.write_text(text)
    assert not list(tmp_path.iterdir())
