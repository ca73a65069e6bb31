import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lm.nn.recurrent import CELLS, FORGET, Layer, Recurrent, glorot_gates, orthogonal_gates, recur

B, L, D, H = 3, 7, 5, 4


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def example(name, *, width=H):
    """Inputs of `recur` with a reset in the middle, a padded tail and a state to start from."""
    cell = CELLS[name]
    fresh = np.zeros((L, 1, B), bool)
    valid = np.ones((L, 1, B), bool)
    fresh[3, 0, 1] = fresh[0, 0, 2] = True
    valid[5:, 0, 0] = valid[2, 0, 1] = False
    state = tuple(random((width, B), 10 + i) for i in range(cell.num_states))
    x = random((L, cell.num_slots, width, B), 1)
    return cell, (x, 0.5 * random((width, cell.num_gates, width), 2), state), (fresh, valid)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_steps(name, x_LKHB, u_DGH, state, fresh, valid):
    """The textbook loop, row by row."""
    out = np.zeros((L, H, B))
    for b in range(B):
        s = [np.array(a)[:, b] for a in state]
        for t in range(L):
            if not valid[t, 0, b]:
                out[t, :, b] = s[0]
                continue
            s = [a * (not fresh[t, 0, b]) for a in s]
            a, r = np.array(x_LKHB)[t, :, :, b], np.einsum("d,dgh->gh", s[0], np.array(u_DGH))
            if name == "rnn":
                s = [np.tanh(a[0] + r[0])]
            elif name == "lstm":
                i, f, u, o = a + r
                c = sigmoid(f) * s[1] + sigmoid(i) * np.tanh(u)
                s = [sigmoid(o) * np.tanh(c), c]
            else:
                reset, update = sigmoid(a[1] + r[0]), sigmoid(a[2] + r[1])
                new = np.tanh(a[0] + reset * (a[3] + r[2]))
                s = [(1 - update) * new + update * s[0]]
            out[t, :, b] = s[0]
    return out


def plain_scan(cell, x, u, state, fresh, valid):
    """`recur` as autodiff would have it."""

    def step(state, inputs):
        a, f, v = inputs
        start = tuple(jnp.where(f, 0, s) for s in state)
        a = a.at[cell.num_slots - cell.num_gates :].add(jnp.einsum("dgh,db->ghb", u, start[0]))
        new = cell.update(a, start)
        new = tuple(jnp.where(v, n, s) for n, s in zip(new, start, strict=True))
        return new, new[0]

    last, h = jax.lax.scan(step, state, (x, fresh, valid))
    return h, last


@pytest.mark.parametrize("name", CELLS)
def test_cell_equals_a_loop_in_numpy(name):
    cell, arrays, masks = example(name)
    h, last = recur(cell, *arrays, *masks)
    expected = numpy_steps(name, *arrays, *masks)
    np.testing.assert_allclose(h, expected, atol=1e-6)
    np.testing.assert_allclose(last[0], expected[-1], atol=1e-6)


def scalar(run, cell, masks):
    """A loss that uses every output, each with its own weight."""

    def loss(arrays):
        h, last = run(cell, *arrays, *masks)
        total = (h * random(h.shape, 5).astype(h.dtype)).sum()
        return total + sum(
            (s * random(s.shape, 6 + i).astype(s.dtype)).sum() for i, s in enumerate(last)
        )

    return loss


@pytest.mark.parametrize("name", CELLS)
def test_gradient_equals_autodiff_of_a_scan(name):
    cell, arrays, masks = example(name)
    ours = jax.jit(jax.grad(scalar(recur, cell, masks)))(arrays)
    expected = jax.jit(jax.grad(scalar(plain_scan, cell, masks)))(arrays)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("name", CELLS)
def test_gradient_equals_finite_differences_in_float64(name):
    with jax.enable_x64(True):
        cell, arrays, masks = example(name)
        assert arrays[0].dtype == jnp.float64
        loss = jax.jit(scalar(recur, cell, masks))
        check_grads(loss, (arrays,), order=1, modes=["rev"], atol=1e-8, rtol=1e-8, eps=1e-5)


@pytest.mark.parametrize("name", CELLS)
def test_each_loop_holds_one_product_so_that_the_kernel_gradient_is_taken_after(name):
    cell, arrays, masks = example(name)
    jaxpr = jax.make_jaxpr(jax.grad(scalar(recur, cell, masks)))(arrays)
    loops = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "scan"]
    products = [str(eqn.params["jaxpr"]).count("dot_general[") for eqn in loops]
    assert products == [1, 1]


def apply_layer(name, x_BLD, positions, segments):
    module = Recurrent(name, 1, H, jnp.dtype("float32"))
    args = {"segments_BL": segments, "positions_BL": positions, "memory": "carry"}

    @jax.jit
    def run():
        params = module.init(jax.random.key(0), x_BLD, **args)["params"]
        return module.apply({"params": params}, x_BLD, **args)

    return run()


@pytest.mark.parametrize("name", CELLS)
def test_documents_of_a_packed_row_do_not_meet(name):
    x = random((1, L, D), 3)
    packed = apply_layer(
        name, x, jnp.array([[0, 1, 2, 0, 1, 0, 1]]), jnp.array([[1, 1, 1, 2, 2, 3, 3]])
    )
    rows = [x[0, 0:3], x[0, 3:5], x[0, 5:7]]
    alone = apply_layer(
        name,
        jnp.stack([jnp.pad(row, ((0, 3 - len(row)), (0, 0))) for row in rows]),
        jnp.array([[0, 1, 2], [0, 1, 0], [0, 1, 0]]),
        jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 0]]),
    )
    alone = jnp.concatenate([row[: len(own)] for row, own in zip(alone, rows, strict=True)])
    np.testing.assert_allclose(packed[0], alone, atol=1e-6)


@pytest.mark.parametrize("name", CELLS)
def test_padding_holds_the_state_whatever_its_position_says(name):
    x = random((1, L, D), 3)
    segments = jnp.array([[1, 1, 1, 0, 0, 0, 0]])
    # Padding carries position 0, which must not reset.
    features = apply_layer(name, x, jnp.array([[0, 1, 2, 0, 0, 0, 0]]), segments)
    for t in range(3, L):
        np.testing.assert_array_equal(features[:, t], features[:, 2])


def test_biases_start_at_zero_but_the_forget_gate_at_one():
    for name, cell in CELLS.items():
        layer = Layer(name, H, jnp.dtype("float32"))
        state = (jnp.zeros((H, B)),) * cell.num_states
        masks = {"fresh_L1B": jnp.zeros((L, 1, B), bool), "valid_L1B": jnp.ones((L, 1, B), bool)}
        make = jax.jit(functools.partial(layer.init, **masks))
        variables = make(jax.random.key(0), random((L, D, B), 0), state)
        expected = np.zeros((cell.num_slots, H))
        if name == "lstm":
            expected[FORGET] = 1
        np.testing.assert_array_equal(variables["params"]["bias"].value, expected)


def test_the_forget_gate_is_the_one_that_keeps_the_cell():
    pre = np.full((4, 1, 1), -50.0)
    pre[FORGET] = 50.0
    _, kept = CELLS["lstm"].update(jnp.asarray(pre), (jnp.zeros((1, 1)), jnp.full((1, 1), 3.0)))
    np.testing.assert_allclose(kept, 3.0)


def test_every_recurrent_gate_starts_orthogonal():
    kernel_DGH = orthogonal_gates(jax.random.key(0), (16, 4, 16))
    for gate in range(4):
        matrix = np.asarray(kernel_DGH[:, gate])
        np.testing.assert_allclose(matrix.T @ matrix, np.eye(16), atol=1e-5)
    assert not np.allclose(kernel_DGH[:, 0], kernel_DGH[:, 1])


def test_input_kernels_start_with_the_variance_of_one_gate():
    kernel_DGH = glorot_gates(jax.random.key(0), (100, 4, 60))
    assert np.var(kernel_DGH) == pytest.approx(2 / (100 + 60), rel=0.03)
    assert np.abs(kernel_DGH).max() <= (6 / 160) ** 0.5
    assert np.mean(kernel_DGH) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", CELLS)
def test_states_are_float32_under_bfloat16(name):
    module = Recurrent(name, 1, H, jnp.dtype("bfloat16"))
    args = {
        "segments_BL": jnp.ones((B, L), int),
        "positions_BL": jnp.ones((B, L), int),
        "memory": "carry",
    }
    x = random((B, L, D), 3)
    variables = jax.jit(lambda: module.init(jax.random.key(0), x, **args))()
    y, new = jax.jit(lambda: module.apply(variables, x, mutable=["carry"], **args))()
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}
