"""The architecture: imports inside `lm` go down only, and each room keeps to its outside libraries."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "lm.main": 5,
    "tools": 5,
    "lm.train": 4,
    "lm.log": 4,
    "lm.guard": 4,
    "lm.recorder": 4,
    "lm.workdir": 4,
    "lm.receipt": 4,
    "lm.trail": 4,
    "lm.experiment": 4,
    "lm.description": 4,
    "lm.initial": 4,
    "lm.complete": 4,
    "lm.convert": 4,
    "lm.fit": 3,
    "lm.anatomy": 3,
    "lm.evaluate": 3,
    "lm.generate": 3,
    "lm.checkpoint": 3,
    "lm.stored": 2,
    "lm.saving": 3,
    "lm.newest": 3,
    "lm.retention": 1,
    "lm.remote": 1,
    "lm.step": 2,
    "lm.local_steps": 2,
    "lm.exact": 2,
    "lm.models": 2,
    "lm.nn": 1,
    "lm.optim": 1,
    "lm.moments": 1,
    "lm.muon": 1,
    "lm.spikes": 1,
    "lm.losses": 1,
    "lm.tasks": 1,
    "lm.data": 1,
    "lm.command": 0,
    "lm.exits": 0,
    "lm.config": 0,
    "lm.value_types": 0,
    "lm.settings": 2,
    "lm.weights_and_biases": 0,
    "lm.sweep": 0,
    "lm.metrics": 0,
    "lm.tensorboard": 0,
    "lm.aside": 0,
    "lm.sharding": 0,
    "lm.collectives": 0,
    "lm.placement": 0,
    "lm.distributed": 0,
    "lm.peers": 0,
    "lm.signals": 0,
    "lm.preemption": 0,
    "lm.watchdog": 1,
    "lm.hardware": 0,
    "lm.startup": 0,
    "lm.fingerprint": 0,
    "lm.flags": 0,
    "lm.manifests": 0,
    "lm.augment": 0,
}
# Files of one floor that may import each other: those of one package, and these.
NEIGHBOURS = {
    ("lm.config", "lm.value_types"),
    ("lm.command", "lm.value_types"),
    ("lm.train", "lm.experiment"),
    ("lm.exact", "lm.step"),
    ("lm.train", "lm.description"),
    ("lm.description", "lm.experiment"),
    ("lm.checkpoint", "lm.saving"),
    ("lm.checkpoint", "lm.newest"),
    ("lm.train", "lm.workdir"),
    ("lm.train", "lm.receipt"),
    ("lm.train", "lm.trail"),
    ("lm.receipt", "lm.experiment"),
    ("lm.trail", "lm.experiment"),
    ("lm.workdir", "lm.receipt"),
    ("lm.train", "lm.log"),
    ("lm.train", "lm.guard"),
    ("lm.guard", "lm.experiment"),
    ("lm.guard", "lm.log"),
    ("lm.guard", "lm.recorder"),
    ("lm.recorder", "lm.experiment"),
    ("lm.guard", "lm.receipt"),
    ("lm.log", "lm.experiment"),
    ("lm.train", "lm.initial"),
    ("lm.initial", "lm.experiment"),
    ("lm.train", "lm.complete"),
    ("lm.workdir", "lm.experiment"),
    ("lm.workdir", "lm.complete"),
    ("lm.convert", "lm.experiment"),
    ("lm.optim", "lm.moments"),
    ("lm.optim", "lm.muon"),
    ("lm.sharding", "lm.config"),
    ("lm.metrics", "lm.weights_and_biases"),
    ("lm.metrics", "lm.tensorboard"),
    ("lm.metrics", "lm.aside"),
    ("lm.tensorboard", "lm.aside"),
    ("lm.aside", "lm.manifests"),
    ("lm.tensorboard", "lm.manifests"),
    ("lm.weights_and_biases", "lm.config"),
    ("lm.weights_and_biases", "lm.manifests"),
    ("lm.collectives", "lm.sharding"),
    ("lm.placement", "lm.sharding"),
    ("lm.placement", "lm.config"),
    ("lm.local_steps", "lm.step"),
    ("lm.distributed", "lm.config"),
    ("lm.peers", "lm.config"),
    ("lm.flags", "lm.config"),
    ("lm.signals", "lm.preemption"),
    ("lm.signals", "lm.exits"),
    ("lm.peers", "lm.distributed"),
    ("lm.metrics", "lm.config"),
    ("lm.command", "lm.config"),
    ("lm.command", "lm.exits"),
    ("lm.distributed", "lm.exits"),
    ("lm.peers", "lm.exits"),
    ("lm.augment", "lm.config"),
}
NO_DEVICE = {"jax", "flax", "optax", "orbax"}
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "base.py", "registry.py"}


def sources(folder="lm"):
    return sorted((ROOT / folder).rglob("*.py"))


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module):
    """The longest known prefix of a module's name."""
    parts = module.split(".")
    for size in range(len(parts), 0, -1):
        if ".".join(parts[:size]) in FLOORS:
            return ".".join(parts[:size])
    return None


def imports(path):
    """Yield (line, module) of every import, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [name if room(name) != room(node.module) else node.module for name in names]
            yield from ((node.lineno, name) for name in known)


@pytest.mark.parametrize("path", sources() + sources("tools"), ids=module_of)
def test_imports_go_down(path):
    here = room(module_of(path))
    if module_of(path) == "lm":
        assert not list(imports(path)), "lm/__init__.py imports nothing"
        return
    assert here is not None, f"{path}: a room without a floor; give it one in this test"
    for line, module in imports(path):
        there = room(module)
        if there is None or there == here:
            continue
        allowed = FLOORS[there] < FLOORS[here] or (here, there) in NEIGHBOURS
        assert allowed, f"{path}:{line}: {here} (floor {FLOORS[here]}) imports {there}"


def test_models_never_import_each_other_or_data():
    for path in sources("lm/models"):
        for line, module in imports(path):
            inside = module.startswith(("lm.models.", "lm.data"))
            assert not inside or path.name == "__init__.py", f"{path}:{line}: imports {module}"


@pytest.mark.parametrize("path", sources("lm/data") + sources("lm/tasks"), ids=module_of)
def test_workers_never_touch_a_device(path):
    for line, module in imports(path):
        assert module.split(".")[0] not in NO_DEVICE, f"{path}:{line}: imports {module}"


def test_experiments_load_without_jax():
    allowed = {"ml_collections", "lm.sweep"}
    for path in sources("experiments"):
        for line, module in imports(path):
            names = {module, ".".join(module.split(".")[:1]), ".".join(module.split(".")[:2])}
            assert names & allowed, f"{path}:{line}: imports {module}"


def test_config_and_sweep_need_little():
    import sys

    for name in ("config", "sweep"):
        for line, module in imports(ROOT / "lm" / f"{name}.py"):
            top = module.split(".")[0]
            known = top in sys.stdlib_module_names or top in ("ml_collections", "lm")
            assert known, f"lm/{name}.py:{line}: imports {module}"


def test_only_sharding_names_mesh_axes():
    for path in sources():
        if path.name in ("sharding.py", "flags.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
            assert not named, f"{path}:{node.lineno}: a mesh axis by name"


def test_files_and_functions_fit_in_the_head():
    for path in sources() + sources("tools"):
        text = path.read_text()
        assert path.name not in FORBIDDEN_NAMES, f"{path}: a name that says nothing"
        assert text.count("\n") <= 400, f"{path}: {text.count(chr(10))} lines; is it two rooms?"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                limit = 90 if (path.name, node.name) == ("train.py", "run") else 60
                assert lines <= limit, f"{path}:{node.lineno} {node.name}: {lines} lines"
