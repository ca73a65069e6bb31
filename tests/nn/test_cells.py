"""Cells against a loop in numpy, the handmade gradient against autodiff and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lm.nn import cells
from lm.nn.cells import CELLS, FORGET, Weights, recur

B, L, D, H = 3, 7, 5, 4


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def example(name, *, begin=False, factors=False):
    """Inputs of `recur` with resets, a padded tail and a state to start from."""
    cell = CELLS[name]
    fresh = np.zeros((L, 1, B), bool)
    valid = np.ones((L, 1, B), bool)
    fresh[3, 0, 1] = fresh[0, 0, 2] = fresh[6, 0, 2] = True
    valid[5:, 0, 0] = valid[2, 0, 1] = False
    kernel, recurrent = (0.5 * random((d, cell.num_gates, H), 2 + i) for i, d in enumerate((D, H)))
    weights = Weights(kernel, recurrent, 0.5 * random((cell.num_slots, H), 4))
    state = tuple(random((H, B), 10 + i) for i in range(cell.num_states))
    arrays = {"x": random((L, D, B), 1), "weights": weights, "state": state}
    if begin:
        arrays["begin"] = tuple(random((L, H, B), 20 + i) for i in range(cell.num_states))
    rest = {"fresh_L1B": jnp.asarray(fresh), "valid_L1B": jnp.asarray(valid)}
    if factors:
        rest["factors_HB"] = 2 * jnp.asarray(np.random.default_rng(5).integers(0, 2, (H, B)), "f")
    return cell, arrays, rest


def ours(cell, arrays, rest):
    arrays = dict(arrays)
    return recur(
        cell, arrays.pop("x"), arrays.pop("weights"), arrays.pop("state"), **arrays, **rest
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_cell(name, a, r, s):
    """The textbook step: `a` of the input and biases [K, H], `r` recurrent [G, H], state `s`."""
    if name == "rnn":
        return [np.tanh(a[0] + r[0])]
    if name == "lstm":
        i, f, u, o = a + r
        c = sigmoid(f) * s[1] + sigmoid(i) * np.tanh(u)
        return [sigmoid(o) * np.tanh(c), c]
    reset, update = sigmoid(a[1] + r[0]), sigmoid(a[2] + r[1])
    new = np.tanh(a[0] + reset * (a[3] + r[2]))
    return [(1 - update) * new + update * s[0]]


def numpy_loop(name, arrays, rest):
    """Return every state at every position, row by row: arrays [L, H, B]."""
    x, weights, begin = np.array(arrays["x"]), arrays["weights"], arrays.get("begin")
    factors = np.array(rest.get("factors_HB", np.ones((H, B))))
    out = [np.zeros((L, H, B)) for _ in arrays["state"]]
    for b in range(B):
        s = [np.array(a)[:, b] for a in arrays["state"]]
        for t in range(L):
            if rest["valid_L1B"][t, 0, b]:
                if rest["fresh_L1B"][t, 0, b]:
                    s = [np.array(a)[t, :, b] for a in begin] if begin else [0 * a for a in s]
                a = np.array(weights.bias)
                a[: weights.kernel.shape[1]] += np.einsum("d,dgh->gh", x[t, :, b], weights.kernel)
                r = np.einsum("d,dgh->gh", s[0] * factors[:, b], weights.recurrent)
                s = numpy_cell(name, a, r, s)
            for stack, value in zip(out, s, strict=True):
                stack[t, :, b] = value
    return out


def plain_scan(cell, arrays, rest):
    """`recur` as autodiff would have it."""
    weights, apart = arrays["weights"], cell.num_slots - cell.num_gates
    x_LGHB = jnp.einsum("ldb,dgh->lghb", arrays["x"], weights.kernel)
    x_LKHB = jnp.pad(x_LGHB, ((0, 0), (0, apart), (0, 0), (0, 0)))
    x_LKHB += weights.bias[None, :, :, None]

    def step(state, inputs):
        a, fresh, valid, begin = inputs
        begin = begin or (0.0,) * len(state)
        start = tuple(jnp.where(fresh, s0, s) for s0, s in zip(begin, state, strict=True))
        h = start[0] * rest["factors_HB"] if "factors_HB" in rest else start[0]
        a = a.at[apart:].add(jnp.einsum("dgh,db->ghb", weights.recurrent, h))
        new = cell.update(cell.gates(a), start)
        new = tuple(jnp.where(valid, n, s) for n, s in zip(new, start, strict=True))
        return new, new

    inputs = (x_LKHB, rest["fresh_L1B"], rest["valid_L1B"], arrays.get("begin"))
    last, states = jax.lax.scan(step, arrays["state"], inputs)
    return states[0], last, states[1:]


OPTIONS = [{}, {"begin": True}, {"factors": True}, {"begin": True, "factors": True}]
every_cell = pytest.mark.parametrize("name", CELLS)
options = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: "-".join(options) or "plain"
)


@pytest.fixture
def columns(request, monkeypatch):
    """The size of chunks: 2 and 3 positions do not divide the length, 512 columns are all of it."""
    monkeypatch.setattr(cells, "CPU_CHUNK", request.param)


@every_cell
@options
@pytest.mark.parametrize("columns", [3 * B, 512], indirect=True)
def test_cell_equals_a_loop_in_numpy(name, options, columns):
    cell, arrays, rest = example(name, **options)
    h, last, others = jax.jit(functools.partial(ours, cell))(arrays, rest)
    expected = numpy_loop(name, arrays, rest)
    for got, wanted in zip((h, *others), expected, strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-6)
    for got, wanted in zip(last, expected, strict=True):
        np.testing.assert_allclose(got, wanted[-1], atol=1e-6)


def scalar(run, cell, rest):
    """A loss that uses every output, each with its own weight."""

    def loss(arrays):
        outputs = jax.tree.leaves(run(cell, arrays, rest))
        return sum(
            (y * random(y.shape, 30 + i).astype(y.dtype)).sum() for i, y in enumerate(outputs)
        )

    return loss


@every_cell
@options
@pytest.mark.parametrize("columns", [2 * B, 512], indirect=True)
def test_gradient_equals_autodiff_of_a_scan(name, options, columns):
    cell, arrays, rest = example(name, **options)
    got = jax.jit(jax.grad(scalar(ours, cell, rest)))(arrays)
    expected = jax.jit(jax.grad(scalar(plain_scan, cell, rest)))(arrays)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@every_cell
@pytest.mark.parametrize("columns", [3 * B], indirect=True)
def test_gradient_equals_finite_differences_in_float64(name, columns):
    with jax.enable_x64(True):
        cell, arrays, rest = example(name, begin=True)
        assert arrays["x"].dtype == jnp.float64
        loss = jax.jit(scalar(ours, cell, rest))
        check_grads(loss, (arrays,), order=1, modes=["rev"], atol=1e-8, rtol=1e-8, eps=1e-5)


def loops(jaxpr):
    """Yield (products in its own body, the loop) of every loop, with those inside."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            body = eqn.params["jaxpr"].jaxpr
            yield sum(inner.primitive.name == "dot_general" for inner in body.eqns)
            yield from loops(body)


@every_cell
def test_a_step_holds_one_product_and_the_kernels_gradients_are_taken_after(name):
    cell, arrays, rest = example(name)
    jaxpr = jax.make_jaxpr(jax.grad(scalar(ours, cell, rest)))(arrays)
    # Of the chunks: of the input; of its gradient and of both kernels'. Of the steps in them: one.
    assert list(loops(jaxpr.jaxpr)) == [1, 1, 3, 1]


def test_on_several_devices_a_row_is_one_chunk(monkeypatch):
    assert cells._num_chunks(256, 32) == 16
    assert cells._num_chunks(7, 1000) == 7
    monkeypatch.setattr(cells.sharding, "mesh_size", lambda: 2)
    assert cells._num_chunks(256, 32) == 1


def test_the_forget_gate_is_the_one_that_keeps_the_cell():
    pre = np.full((4, 1, 1), -50.0)
    pre[FORGET] = 50.0
    cell = CELLS["lstm"]
    state = (jnp.zeros((1, 1)), jnp.full((1, 1), 3.0))
    np.testing.assert_allclose(cell.update(cell.gates(jnp.asarray(pre)), state)[1], 3.0)
