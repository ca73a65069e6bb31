"""Any experiment on any mesh is the plainest program on one device: drawn at random, to rounding.

The oracle has one device, layers in a loop, the batch and its logits whole, and keeps every activation.
"""

import contextlib
import dataclasses
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.errors import UnsatisfiedAssumption
from ml_collections import ConfigDict

from lm import config as config_lib
from lm import experiment, main, placement, sharding, step
from lm.config import ConfigError
from lm.nn.transformer import SCANNED, UNROLLED
from tests import quickly

EXAMPLES = int(
    os.environ.get("ORACLE_EXAMPLES", "8")
)  # of each kind, of all families; 60 and more find more
DEVICES = 8
FAMILIES = {
    "gpt": ({"name": "gpt"}, {"name": "causal_lm"}),
    "bert": ({"name": "bert"}, {"name": "masked_lm"}),
    "t5": ({"name": "t5"}, {"name": "span_corruption"}),
}
# What is not the oracle's, and leaves the function as it is.
PLAIN = {
    "model": {"scan": False, "remat": "none"},
    "train": {"accumulate_steps": 1, "loss_chunk": 0},
}


@st.composite
def meshes(draw, *, experts):
    """Draw what splits eight devices; of context and stage one can be had, and with experts neither."""
    axes = ["data", "fsdp", "tensor", "expert"]
    if not experts:
        axes.append(draw(st.sampled_from(["context", "stage"])))
    drawn = [draw(st.sampled_from(axes)) for _ in range(3)]
    return {"data": 1} | {axis: 2 ** drawn.count(axis) for axis in drawn}


@st.composite
def experiments(draw, family, experts):
    """Draw the config of a run on eight devices, as a dictionary; sizes are odd where nothing splits them."""
    model, task = (dict(part) for part in FAMILIES[family])
    mesh = draw(meshes(experts=experts))
    ways = {axis: mesh.get(axis, 1) for axis in ("fsdp", "tensor", "expert", "context", "stage")}
    accumulate = draw(st.sampled_from([1, 2, 3]))
    repeats = draw(st.sampled_from([1, 2])) if ways["stage"] == 2 else 1
    layers = ways["stage"] * repeats
    rows = ways["stage"] if repeats > 1 else draw(st.integers(1, 3))  # a device's, in a part
    heads = ways["tensor"] * draw(st.integers(1, 3 if ways["tensor"] < 4 else 1))
    odd = st.integers(1, 4).map(lambda n: 2 * n + 1)
    model |= {
        "num_layers": layers * (draw(st.integers(1, 2)) if layers < 4 else 1), "num_heads": heads,
        "mlp_dim": ways["tensor"] * draw(odd),
        "remat": draw(st.sampled_from(["none", "dots", "full"])),
        "scan": ways["stage"] > 1 or draw(st.booleans()),
    }  # fmt: skip
    if family == "bert":
        model["model_dim"] = math.lcm(ways["fsdp"], heads) * draw(odd)
    else:
        model |= {"model_dim": ways["fsdp"] * draw(odd), "head_dim": 2 * draw(odd)}
    if ways["stage"] > 1:
        model |= {"stage_repeats": repeats}
    if ways["context"] > 1:
        model["context_parallel"] = draw(st.sampled_from(["ring", "gather"]))
    if family == "gpt":
        model["window"] = draw(st.sampled_from([0, 7]))
        model["num_kv_heads"] = draw(st.sampled_from([ways["tensor"], heads]))
    if experts:
        model |= {
            "num_experts": max(2, ways["expert"]), "expert_dim": model.pop("mlp_dim"),
            "experts_per_token": draw(st.integers(1, 2)),
            "shared_experts": draw(st.integers(0, 1)),
        }  # fmt: skip
    length = 2 * ways["context"] * draw(odd) if ways["context"] > 1 else draw(st.integers(9, 31))
    task |= {"packing": draw(st.sampled_from(["split", "best_fit", "pad"]))}
    if family == "t5":
        task |= {"source_length": max(length, 16)}
    else:
        task |= {"length": length, "isolate_documents": draw(st.booleans())}
    split = math.prod(mesh.get(axis, 1) for axis in ("data", "fsdp", "expert"))
    return {
        "data": {
            "source": "python_docs", "tokenizer": "byte", "batch_size": split * accumulate * rows
        },
        "task": task, "model": model, "mesh": mesh, "seed": draw(st.integers(0, 9)),
        "optim": {
            "name": "sgd", "momentum": 0.9, "peak_lr": 0.1, "schedule": "constant", "warmup": 0,
        },
        "train": {
            "num_steps": 1, "accumulate_steps": accumulate, "sample_tokens": 0,
            "loss_chunk": draw(st.sampled_from([0, 5])),
            "z_loss": draw(st.sampled_from([0.0, 1e-3])),
            "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        },
        "eval": {"max_tokens": 64},
    }  # fmt: skip


def build(config):
    config = ConfigDict(config, type_safe=False)
    return experiment.build(config_lib.complete(config, experiment.SCHEMA))


def plain(config, accumulate):
    """Return the oracle's config."""
    changed = {name: {**config[name], **fields} for name, fields in PLAIN.items()}
    changed["mesh"] = {"data": 1, "tensor": DEVICES}  # of which one device is taken
    changed["model"].pop("stage_repeats", None)
    changed["train"]["accumulate_steps"] = accumulate
    return {**config, **changed}


# Without fusion emitters sums are less exact.
QUICKLY = {"xla_backend_optimization_level": 0} | {
    name: True for name in quickly.OPTIONS if name == "xla_cpu_use_fusion_emitters"
}


def compile_quickly(function, *args):
    """Compile, of `args` or their shapes."""
    return function.lower(*args).compile(QUICKLY)


def one_step(made, mesh, params=None):
    """Return {name: [sums]}, routing, the first gradient and the parameters after a step, layers unrolled."""
    with sharding.use(mesh):
        made = dataclasses.replace(made, mesh=mesh)
        init, train_step, _, _ = experiment.jitted(made)
        state, batch = init(), placement.place_batch(mesh, made.batches[0])
        if params is not None:
            state = dataclasses.replace(state, params=params)
        routing = experts_of(made.model, state.params, batch)
        state, sums = compile_quickly(train_step, state, batch)(state, batch)
        assert bool(sums.pop("healthy"))
        sums = {name: float(total) / float(weight) for name, (total, weight) in sums.items()}
        gradient = jax.tree.map(np.asarray, trace_of(state.opt_state))
        return sums, routing, unrolled(gradient), unrolled(jax.device_get(state.params))


def experts_of(model, params, batch):
    """Return each token's experts in each layer, in order; none without experts."""
    if not getattr(model.cfg, "num_experts", 0):
        return []

    def look(params, batch):
        return model.apply({"params": params}, batch, mutable=["intermediates"])[1]

    found = jax.device_get(compile_quickly(jax.jit(look), params, batch)(params, batch))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(unrolled(found["intermediates"]))]


def trace_of(opt_state):
    """Return the momentum, which begins as the gradient."""
    is_trace = lambda part: isinstance(part, optax.TraceState)  # noqa: E731
    (found,) = filter(is_trace, jax.tree.leaves(opt_state, is_leaf=is_trace))
    return found.trace


def unrolled(tree):
    """Return a tree of scanned layers as one of layers in a loop."""
    if not isinstance(tree, dict):
        return tree
    made = {}
    for name, part in tree.items():
        if name == SCANNED:
            for number in range(len(jax.tree.leaves(part)[0])):
                layer = jax.tree.map(lambda leaf, number=number: leaf[number], part)
                made[UNROLLED.format(number)] = unrolled(layer)
        else:
            made[name] = unrolled(part)
    return made


def assert_alike(found, expected):
    """Compare losses, gradients and parameters: 1e-5 of each one's norm, gradients 2e-5 (seen: 1.8e-5).

    Where a tensor has no gradient but rounding's, of a thousandth of the largest norm.
    """
    sums, routing, *trees = found
    wanted, others, *references = expected
    jax.tree.map(np.testing.assert_array_equal, routing, others)
    for name in wanted:
        assert sums[name] == pytest.approx(wanted[name], rel=1e-5), name
    for kind, tree, reference in zip(("gradient", "parameter"), trees, references, strict=True):
        assert jax.tree.structure(tree) == jax.tree.structure(reference)
        least = 1e-3 * max(np.linalg.norm(leaf) for leaf in jax.tree.leaves(reference))
        for (path, leaf), other in zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(reference), strict=True
        ):
            error = np.linalg.norm(leaf - other) / max(np.linalg.norm(other), least)
            assert error < (2e-5 if kind == "gradient" else 1e-5), (
                kind,
                sharding.path_name(path),
                error,
            )


@contextlib.contextmanager
def written(folder, config):
    """Where what follows fails, write the experiment to a file; of many failures the last and smallest."""
    path = folder / "found.py"
    try:
        yield path
    except UnsatisfiedAssumption:
        raise
    except Exception as error:
        path.write_text(
            f"# {' '.join(str(error).split())[:200]}\nfrom ml_collections import ConfigDict\n\n\n"
            f"def get_config():\n    return ConfigDict(\n        {config!r},\n"
            "        type_safe=False,\n    )\n"
        )
        flags = f"XLA_FLAGS=--xla_force_host_platform_device_count={DEVICES}"
        error.add_note(f"{flags} python -m lm.main --config {path}\n{json.dumps(config)}")
        raise


def check(config, folder):
    """Compare one step of a config with the oracle's."""
    with written(folder, config):
        try:
            made = build(config)
        except ConfigError as error:  # a span corruption's targets have a length of their own
            assert "a row of" in str(error) and "mesh.context" in str(error), error
            assume(False)
        experts = made.cfg["model"].name != "bert" and made.cfg["model"].num_experts
        # Experts' losses are means over the rows of a part, and logged is each part's fullest expert.
        oracle = build(plain(config, config["train"]["accumulate_steps"] if experts else 1))
        one = sharding.make_mesh(sharding.Config(), jax.devices()[:1])
        with sharding.use(one):
            init = step.make_init(
                made.model, made.tx, seed=config["seed"], shape=(1, 1, 1),
                average=False, stateful=False,
            )  # fmt: skip
            params = jax.jit(init)().params
            params = jax.tree.map(jnp.asarray, unrolled(jax.device_get(params)))
        expected = one_step(oracle, one, params)
        assert_alike(one_step(made, made.mesh), expected)


SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
    derandomize="ORACLE_EXAMPLES" not in os.environ,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("found")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@settings(SETTINGS, max_examples=max(1, EXAMPLES // 3))
@given(data=st.data())
def test_any_experiment_on_any_mesh_is_the_oracle(folder, family, data):
    """A failure names a file of the smallest experiment that has it."""
    check(data.draw(experiments(family, experts=False)), folder)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "t5"])
@settings(SETTINGS, max_examples=max(1, EXAMPLES // 6))
@given(data=st.data())
def test_any_experts_on_any_mesh_are_the_oracle(folder, family, data):
    """Tokens are sent to the same experts, and then all is the same."""
    check(data.draw(experiments(family, experts=True)), folder)


def smallest():
    return {
        "data": {"source": "python_docs", "tokenizer": "byte", "batch_size": 8},
        "task": {"name": "causal_lm", "length": 9}, "mesh": {"data": 8}, "seed": 3,
        "model": {"name": "gpt", "num_layers": 1, "model_dim": 6, "num_heads": 1, "head_dim": 6},
        "optim": {"name": "sgd"}, "train": {"num_steps": 1},
    }  # fmt: skip


def test_what_is_found_is_written_as_an_experiment(tmp_path, capsys):
    with pytest.raises(AssertionError) as caught, written(tmp_path, smallest()) as path:
        raise AssertionError("differs\nby 1")
    assert str(path) in caught.value.__notes__[0]
    assert config_lib.load(path).to_dict() == smallest()
    assert main.main(["--config", str(path), "--dry_run"]) == 0
    assert "mesh: data 8;" in capsys.readouterr().out


def test_every_axis_is_drawn():
    drawn = set()

    @settings(max_examples=60, database=None, derandomize=True)
    @given(meshes(experts=False))
    def look(mesh):
        assert math.prod(mesh.values()) == DEVICES
        assert not {"context", "stage"} <= set(mesh)
        drawn.update(axis for axis, size in mesh.items() if size > 1)

    look()
    assert drawn == {"data", "fsdp", "tensor", "expert", "context", "stage"}
