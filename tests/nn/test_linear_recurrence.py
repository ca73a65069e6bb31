import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.test_util import check_grads

from lm.nn.linear_recurrence import Convolution, LinearRecurrence, recur

B, H, L, K, P, D = 3, 2, 19, 4, 5, 12


def example(length=L, seed=0):
    """Inputs of `recur`, the masks with documents that begin anywhere and padding on the right."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(B, H, length, width)) for width in (K, K, P)]
    log_decay = -np.abs(rng.normal(size=(B, H, length)))
    state = rng.normal(size=(B, H, K, P))
    fresh, valid = np.zeros((2, B, length), bool)
    valid[:] = True
    fresh[1, [0, length // 2, length - 1]] = True  # and row 0 goes on with what came in
    fresh[2, length // 3] = True
    valid[2, length - length // 4 :] = False
    return (*arrays, log_decay, state), fresh, valid


def steps(query, key, value, log_decay, state, *, fresh_BL, valid_BL):
    """The recurrence as it is written, token by token."""

    def step(S, inputs):
        q, k, v, log_a, fresh, valid = inputs
        S = jnp.where((fresh & valid)[:, None, None, None], 0, S)
        new = jnp.exp(log_a)[..., None, None] * S + k[..., :, None] * v[..., None, :]
        S = jnp.where(valid[:, None, None, None], new, S)
        return S, jnp.einsum("bhk,bhkp->bhp", q, S)

    by_length = [jnp.moveaxis(x, 2, 0) for x in (query, key, value, log_decay)]
    last, y = jax.lax.scan(step, jnp.asarray(state), (*by_length, fresh_BL.T, valid_BL.T))
    return jnp.moveaxis(y, 0, 2), last


def scalar(run, fresh, valid, **options):
    """A loss that uses every output, each with its own weight."""

    def loss(arrays):
        outputs = run(*arrays, fresh_BL=fresh, valid_BL=valid, **options)
        return sum(
            (x * np.random.default_rng(7 + i).normal(size=x.shape)).sum()
            for i, x in enumerate(outputs)
        )

    return loss


@functools.cache
def recurrence(length):
    """Return outputs and gradients of the recurrence in float64."""
    return values_and_gradients(steps, *example(length))


def values_and_gradients(run, arrays, fresh, valid, **options):
    def both(arrays):
        loss = scalar(run, fresh, valid, **options)
        return run(*arrays, fresh_BL=fresh, valid_BL=valid, **options), jax.grad(loss)(arrays)

    return jax.tree.leaves(jax.jit(both)(arrays))


@pytest.mark.parametrize("length", [1, 7, 16, L])
@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_chunks_equal_the_recurrence_and_its_gradient(chunk, length):
    with jax.enable_x64(True):
        ours = values_and_gradients(recur, *example(length), chunk=chunk)
        for a, b in zip(ours, recurrence(length), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, atol=1e-10)


def test_gradient_equals_finite_differences():
    with jax.enable_x64(True):
        arrays, fresh, valid = example()
        loss = jax.jit(scalar(recur, fresh, valid, chunk=8))
        check_grads(loss, (arrays,), order=1, modes=["rev"], atol=1e-7, rtol=1e-7, eps=1e-5)


@pytest.mark.parametrize("begin", [5, 8, 10])
def test_what_is_in_one_document_reaches_no_number_of_the_next(begin):
    """Bit for bit, in a chunk of both documents too, and in the gradient."""
    arrays, fresh, valid = jax.tree.map(
        lambda x: x.astype("f") if x.dtype == float else x, example()
    )
    fresh[:] = False
    fresh[:, begin] = valid[:] = True
    run = jax.jit(functools.partial(recur, fresh_BL=fresh, valid_BL=valid, chunk=8))
    y, last = run(*arrays)
    changed = [x.copy() for x in arrays]
    for x in changed[:3]:
        x[:, :, :begin] += 3
    changed[3][:, :, :begin] *= 7
    changed[4][:] += 100
    other, other_last = run(*changed)
    assert np.abs(other[:, :, :begin] - y[:, :, :begin]).min() > 0
    np.testing.assert_array_equal(other[:, :, begin:], y[:, :, begin:])
    np.testing.assert_array_equal(other_last, last)

    def after(arrays):
        y, last = run(*arrays)
        return y[:, :, begin:].sum() + last.sum()

    *gradients, of_state = jax.grad(after)(arrays)
    for x in gradients:
        np.testing.assert_array_equal(x[:, :, :begin], 0)
    np.testing.assert_array_equal(of_state, 0)


@pytest.mark.parametrize("log_decay", [0.0, -1e-21, -20.0, -1e4])
def test_extreme_decays_give_finite_values_and_gradients(log_decay):
    arrays, fresh, valid = example()
    arrays = [x.astype(np.float32) for x in arrays]
    arrays[3][:, :, ::2] = log_decay
    y, last, *gradients = values_and_gradients(recur, arrays, fresh, valid, chunk=8)
    expected, expected_last, *_ = values_and_gradients(steps, arrays, fresh, valid)
    # The last bit of a sum over a chunk is lost: of eight times -20, 1.5e-5.
    atol = 1e-4 if log_decay >= -20 else 1e-1
    np.testing.assert_allclose(y, expected, atol=atol)
    np.testing.assert_allclose(last, expected_last, atol=atol)
    assert all(np.isfinite(x).all() for x in gradients)


def batch(documents, length=L):
    """Segments and positions of one row that holds documents of these lengths."""
    segments = np.repeat(np.arange(1, len(documents) + 1), documents)
    positions = np.concatenate([np.arange(0), *map(np.arange, documents)])
    pad = (0, length - len(segments))
    return {
        "segments_BL": np.pad(segments, pad)[None],
        "positions_BL": np.pad(positions, pad)[None],
    }


def inputs(length=L):
    return np.random.default_rng(5).normal(size=(1, length, D)).astype(np.float32)


def layer(**fields):
    init = nn.initializers.normal(0.5)
    sizes = {"num_heads": H, "key_dim": K, "head_dim": P, "conv_width": 4, "chunk": 8}
    return LinearRecurrence(
        **{**sizes, "dtype": jnp.dtype("float32"), "kernel_init": init, "out_init": init, **fields}
    )


@functools.cache
def params_of(module):
    arguments = {**batch([L]), "memory": "carry"}
    make = jax.jit(lambda: module.init(jax.random.key(0), inputs(), **arguments))
    return nn.unbox(make())["params"]


def run(module, x, rows, params=None, **options):
    variables = {"params": params_of(module) if params is None else params}
    return jax.jit(functools.partial(module.apply, **rows, memory="carry", **options))(variables, x)


@pytest.mark.parametrize("conv_width", [1, 4])
def test_a_position_sees_its_document_up_to_itself_and_nothing_else(conv_width):
    """By gradient: which inputs reach which outputs."""
    module, rows = layer(conv_width=conv_width), batch([6, 3, 8])
    mixture = np.random.default_rng(2).normal(size=D)
    reach = jax.jit(jax.jacrev(lambda x: run(module, x, rows)[0] @ mixture))(inputs())
    reach = np.abs(reach[:, 0]).sum(-1)
    segments = rows["segments_BL"][0]
    seen = (segments[:, None] == segments) & np.tri(L, dtype=bool) & (segments > 0)
    np.testing.assert_array_equal(reach[:17, :17] > 0, seen[:17, :17])
    np.testing.assert_array_equal(reach[:17, 17:], 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_gates_at_their_ends_give_finite_values_and_gradients(sign, dtype):
    """Logits of +-50: decays of nearly 1 and steps of nearly 0, and the reverse."""
    module, rows = layer(dtype=jnp.dtype(dtype)), batch([6, 3, 8])
    params = {**params_of(module), "step_bias": jnp.full((H,), 50.0 * sign)}

    def loss(params, x):
        return jnp.square(run(module, x, rows, params).astype(jnp.float32)).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, inputs())
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_convolution_equals_a_loop_in_numpy():
    """With the borders of documents, a tail from the window before, and one for the next."""
    W, length = 4, 9
    rng = np.random.default_rng(0)
    x, tail = rng.normal(size=(2, length, H, K)), rng.normal(size=(2, W - 1, H, K))
    positions = np.array([[7, 8, 9, 0, 1, 2, 3, 4, 0], [1, 2, 0, 1, 0, 1, 0, 0, 0]])
    valid = np.ones((2, length), bool)
    valid[1, 6:] = False
    kernel = rng.normal(size=(W, H, K))
    y, new = Convolution(W).apply(
        {"params": {"kernel": kernel}, "carry": {"tail": tail}},
        x.astype(np.float32), valid_BL=valid, positions_BL=positions, memory="carry", fresh=False,
        mutable=["carry"],
    )  # fmt: skip
    for b in range(2):
        before = np.concatenate([tail[b], x[b]])
        for t in range(valid[b].sum()):
            reach = min(W, positions[b, t] + 1)
            expected = sum(kernel[i] * before[W - 1 + t - i] for i in range(reach))
            np.testing.assert_allclose(y[b, t], expected, atol=1e-5)
        last = before[: W - 1 + valid[b].sum()][-(W - 1) :]
        np.testing.assert_allclose(new["carry"]["tail"][b], last, atol=1e-6)


@pytest.mark.parametrize("padding", [0, 2, L])
def test_padding_holds_the_memory(padding):
    """A row of nothing but padding leaves it as it was, bit for bit."""
    module, size = layer(), L - padding
    params, x = params_of(module), inputs()
    make = functools.partial(module.init, **batch([L]), memory="carry")
    made = nn.unbox(jax.eval_shape(make, jax.random.key(0), x))["carry"]
    rng = np.random.default_rng(1)
    carry = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f"), made)

    def last(length):
        rows = {name: row[:, :length] for name, row in batch([size]).items()}
        rows["positions_BL"] = rows["positions_BL"] + 5 * (rows["segments_BL"] > 0)
        apply = functools.partial(module.apply, **rows, memory="carry", mutable=["carry"])
        return jax.jit(apply)({"params": params, "carry": carry}, x[:, :length])[1]["carry"]

    expected = last(size) if size else carry
    for a, b in zip(jax.tree.leaves(last(L)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=0 if padding == L else 1e-6)


def test_states_are_float32_and_features_near_float32_under_bfloat16():
    half, full, rows = layer(dtype=jnp.dtype("bfloat16")), layer(), batch([6, 3, 8])
    y, new = run(half, inputs().astype(jnp.bfloat16), rows, params_of(full), mutable=["carry"])
    assert y.dtype == jnp.bfloat16 and nn.unbox(new)["carry"]["state"].dtype == jnp.float32
    exact = run(full, inputs(), rows, params_of(full))
    error = np.abs(y.astype(jnp.float32) - exact)[:, :17]
    assert 0 < error.max() < 0.05 * np.abs(exact).max()


def test_heads_start_with_memories_of_many_lengths():
    module = layer(num_heads=8)
    params = params_of(module)
    size = jax.nn.softplus(params["step_bias"])
    np.testing.assert_allclose([size.min(), size.max()], [1e-3, 1e-1], rtol=1e-4)
    rate = jnp.exp(params["decay_scale"])
    np.testing.assert_allclose([rate.min(), rate.max()], [1, 16], rtol=1e-4)
    lengths = 1 / (size * rate)  # tokens after which 1/e is left
    assert (np.diff(lengths) < 0).all() and lengths[0] > 100 and lengths[-1] < 1
