"""bfloat16 computation: parameters, moments, and all sums over rows, parts and devices stay float32."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lm import placement, sharding, step
from tests.models.test_conformance import LEARNED, LENGTH, VOCAB, batch_of, build
from tests.test_meshes import groups_of

ROWS = 8
MORE = {"bias": True, "positions": "learned", "norm": "layernorm", "norm_bias": True, "tied": False}
# After it a program is divided between devices and still has the types that it was written in: what XLA makes
# of it for a CPU has no sums in bfloat16.
PASS = "spmd-partitioning"


def texts(seed=0):
    rng = np.random.default_rng(seed)
    return [[list(rng.integers(1, VOCAB, LENGTH))] for _ in range(ROWS)]


def prepared(model, mesh, *, accumulate=1, tx=None):
    """Return (abstract state, placed batch, jitted step) of a model on the mesh in use."""
    tx = tx or optax.adam(1e-2)
    batch = batch_of(model, texts(), texts(1))
    init = step.make_init(model, tx, seed=0, shape=(1, ROWS, LENGTH), average=False, stateful=False)
    abstract = jax.eval_shape(init)
    placed = step.state_shardings(mesh, abstract, step.parameter_axes(model)[0])
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        abstract,
        placed,
    )
    function = functools.partial(
        step.train_step,
        model=model,
        tx=tx,
        objective=step.Objective(max_scored=LENGTH, vocab_size=VOCAB),
        seed=0,
        accumulate=accumulate,
    )
    jitted = jax.jit(function, out_shardings=(placed, None))
    return abstract, placement.place_batch(mesh, batch), jitted


@pytest.fixture
def compiled_anew():
    """What comes from the cache of compiled programs has no passes to look into."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def partitioned(model, mesh, folder, **options):
    """Return the text of a training step as it is divided between the devices, types untouched."""
    with sharding.use(mesh):
        abstract, batch, jitted = prepared(model, mesh, **options)
        jitted.lower(abstract, batch).compile(
            {
                "xla_dump_to": str(folder),
                "xla_dump_hlo_pass_re": PASS,
                "xla_dump_hlo_as_text": True,
                "xla_disable_hlo_passes": "all-reduce-promotion",
            }
        )
    (path,) = folder.glob(f"*train_step*after_{PASS}*")
    return path.read_text()


def exchanged(text, kinds):
    """Return (type, shape, name of the operation) of all that several devices exchange by `kinds`."""
    form = re.compile(rf" = \(?(\w+)\[([\d,]*)\].*? (?:{kinds})(?:-start)?\(.*op_name=\"([^\"]*)\"")
    return [
        match.groups()
        for line in text.splitlines()
        if (match := form.search(line)) and len(groups_of(line, 4)[0]) > 1
    ]


def of_type(found, *dtypes):
    return [one for one in found if one[0] in dtypes]


CASES = [
    *((name, {}, 1) for name in LEARNED if name != "t5-experts"),
    ("gpt", MORE, 2),
    *(("gpt-experts", {"capacity_factor": factor}, 1) for factor in (0.0, 1.0)),
    ("t5-experts", {"capacity_factor": 1.0}, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fields", "accumulate"), CASES)
def test_gradients_are_summed_in_float32(name, fields, accumulate, tmp_path, compiled_anew):
    """Over the devices of data and fsdp, with and without parts; kernels are sent in bfloat16."""
    model = build(name, dtype="bfloat16", num_layers=1, **fields)
    mesh = sharding.make_mesh(sharding.Config(data=2, fsdp=2), jax.devices()[:4])
    text = partitioned(model, mesh, tmp_path, accumulate=accumulate)
    sums = exchanged(text, "all-reduce|reduce-scatter")
    assert len(of_type(sums, "f32")) > 10
    assert not of_type(sums, "bf16", "f16")
    assert of_type(exchanged(text, "all-gather"), "bf16")


def equations(jaxpr):
    """Yield every operation of a program, of loops and calls in it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


WIDE = ("exp", "log", "rsqrt", "sqrt", "cumsum", "reduce_sum", "log1p")


@pytest.mark.parametrize(("name", "fields", "accumulate"), CASES)
def test_norms_softmax_and_losses_are_float32(name, fields, accumulate):
    """And the state: parameters, moments; and what a step returns. Products are of bfloat16."""
    model = build(name, dtype="bfloat16", **fields)
    mesh = sharding.make_mesh(sharding.Config(), jax.devices()[:1])
    with sharding.use(mesh):
        abstract, batch, jitted = prepared(model, mesh, accumulate=accumulate)
        made, _ = jax.eval_shape(jitted, abstract, batch)
        objective = step.Objective(max_scored=LENGTH, vocab_size=VOCAB)
        forward = jax.make_jaxpr(
            lambda params, batch: step.forward(
                model, {"params": params}, batch, objective, train=False
            )
        )(abstract.params, batch)
    found = list(equations(forward.jaxpr))
    narrow = {
        f"{e.primitive.name} {e.invars[0].aval.shape} {e.source_info.name_stack}"
        for e in found
        if e.primitive.name in WIDE and e.invars[0].aval.dtype == jnp.bfloat16
    }
    assert not narrow
    assert {e.primitive.name for e in found} >= {"exp", "log", "reduce_sum"}
    products = [e for e in found if e.primitive.name in ("dot_general", "ragged_dot_general")]
    assert any(e.invars[0].aval.dtype == jnp.bfloat16 for e in products)
    for leaf in jax.tree.leaves((abstract, made, forward.out_avals[0])):
        assert leaf.dtype != jnp.bfloat16
