"""Layers: documents apart in both directions, states in and out, dropouts, how parameters start."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.nn.cells import CELLS, FORGET
from lm.nn.recurrent import Layer, Recurrent, glorot_gates, hand_over, orthogonal_gates

B, L, D, H = 3, 7, 5, 4
FLOAT32 = jnp.dtype("float32")

cells = pytest.mark.parametrize("name", CELLS)
directions = pytest.mark.parametrize("bidirectional", [False, True], ids=["one", "two"])


def random(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def rows(*lengths, length=L):
    """Return (segments, positions) [1, L] of a row that holds documents of these lengths."""
    segments = [k + 1 for k, size in enumerate(lengths) for _ in range(size)]
    positions = [place for size in lengths for place in range(size)]
    padding = [0] * (length - len(segments))
    return {
        "segments_BL": jnp.array([segments + padding]),
        "positions_BL": jnp.array([positions + padding]),
    }


def build(name, num_layers=2, **fields):
    return Recurrent(name, num_layers, H, FLOAT32, **fields)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(module, variables, x, rows, begin=None, rngs=None, train=False):
    return module.apply(variables, x, **rows, begin=begin, rngs=rngs, train=train)


@functools.cache
def init(module):
    """Return parameters, the biases moved off their start."""
    row = rows(L)
    variables = jax.jit(lambda: module.init(jax.random.key(0), random((1, L, D), 0), **row))()
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype("f"), nn.unbox(variables)
    )


@cells
@directions
def test_documents_of_a_packed_row_do_not_meet(name, bidirectional):
    module = build(name, bidirectional=bidirectional)
    x, row = random((1, L, D), 3), rows(3, 2, 1)
    packed, states = apply(module, init(module), x, row)
    start = 0
    for size in (3, 2, 1):
        own = slice(start, start + size)
        alone, own_states = apply(module, init(module), x[:, own], rows(size, length=size))
        np.testing.assert_allclose(packed[:, own], alone, atol=1e-6)
        for a, b in zip(jax.tree.leaves(states), jax.tree.leaves(own_states), strict=True):
            np.testing.assert_allclose(a[:, own], b, atol=1e-6)
        start += size


@cells
def test_the_second_direction_is_a_layer_over_each_document_reversed(name):
    module = build(name, num_layers=1, bidirectional=True)
    params = init(module)["params"]
    x, row = random((1, L, D), 3), rows(3, 3)
    features, ((_, (h, *_)),) = apply(module, {"params": params}, x, row)
    assert features.shape == (1, L, 2 * H)
    one = build(name, num_layers=1)
    turned = jnp.array([2, 1, 0, 5, 4, 3, 6])
    expected, _ = apply(one, {"params": {"layer_0": params["layer_0_backward"]}}, x[:, turned], row)
    np.testing.assert_allclose(features[:, :6, H:], expected[:, turned][:, :6], atol=1e-6)
    np.testing.assert_allclose(h[:, :6], features[:, :6, H:], atol=1e-6)
    forward, _ = apply(one, {"params": {"layer_0": params["layer_0"]}}, x, row)
    np.testing.assert_allclose(features[:, :6, :H], forward[:, :6], atol=1e-6)


@cells
def test_features_of_two_directions_depend_on_their_whole_document_and_only_on_it(name):
    module = build(name, bidirectional=True)
    row, variables = rows(3, 2), init(module)

    def features(x):
        return module.apply(variables, x, **row)[0][0].sum(-1)

    reach = np.abs(jax.jit(jax.jacrev(features))(random((1, L, D), 3))[:, 0]).sum(-1)
    expected = np.asarray(row["segments_BL"][0][:, None] == row["segments_BL"][0][None])
    real = np.asarray(row["segments_BL"][0] > 0)
    assert ((reach > 0) == expected)[real].all()


@cells
@directions
def test_padding_changes_nothing(name, bidirectional):
    module = build(name, bidirectional=bidirectional)
    x, row = random((1, L, D), 3), rows(3)
    features, _ = apply(module, init(module), x, row)
    changed, _ = apply(module, init(module), x.at[:, 3:].set(9.0), row)
    np.testing.assert_array_equal(features[:, :3], changed[:, :3])
    alone, _ = apply(module, init(module), x[:, :3], rows(3, length=3))
    np.testing.assert_allclose(features[:, :3], alone, atol=1e-6)


@cells
def test_padding_holds_the_state_whatever_its_position_says(name):
    module = build(name, num_layers=1)
    features, states = apply(module, init(module), random((1, L, D), 3), rows(3))
    for array in (features, *jax.tree.leaves(states)):
        for t in range(3, L):
            np.testing.assert_array_equal(array[:, t], array[:, 2])


@cells
def test_a_document_goes_on_from_the_states_that_are_handed_over(name):
    """Of a document cut in two: the second part, begun with the states of the first, ends as the whole."""
    module = build(name)
    x = random((1, L, D), 3)
    whole, _ = apply(module, init(module), x, rows(L))
    _, states = apply(module, init(module), x[:, :4], rows(4, length=4))
    begin = hand_over(
        states, source_segments_BS=jnp.ones((1, 4), int), segments_BL=jnp.ones((1, 3), int)
    )
    rest, _ = apply(module, init(module), x[:, 4:], rows(3, length=3), begin)
    np.testing.assert_allclose(rest, whole[:, 4:], atol=1e-6)


def test_each_segment_is_handed_its_own_last_and_first_state():
    states = (((jnp.arange(14.0).reshape(1, 7, 2),), (100 + jnp.arange(14.0).reshape(1, 7, 2),)),)
    source = jnp.array([[1, 1, 1, 2, 4, 4, 0]])
    target = jnp.array([[1, 2, 2, 3, 4, 0]])
    (((first,), (second,)),) = hand_over(states, source_segments_BS=source, segments_BL=target)
    np.testing.assert_array_equal(first[0, :5, 0], [4, 6, 6, 0, 10])
    np.testing.assert_array_equal(second[0, :5, 0], [100, 106, 106, 0, 108])


@cells
@directions
def test_gradients_reach_what_a_row_begins_from_at_its_first_tokens_alone(name, bidirectional):
    module, row = build(name, bidirectional=bidirectional), rows(3, 2)
    num_states, ways = CELLS[name].num_states, 1 + bidirectional
    begin = tuple(
        tuple(tuple(random((1, L, H), i + 10 * d) for i in range(num_states)) for d in range(ways))
        for _ in range(2)
    )

    variables = init(module)  # not while tracing: they are kept for other tests

    def loss(begin):
        return (module.apply(variables, random((1, L, D), 3), **row, begin=begin)[0] ** 2).sum()

    for layer in jax.jit(jax.grad(loss))(begin):
        for way, places in zip(layer, ([0, 3], [2, 4]), strict=False):
            for gradient in way:
                reached = np.flatnonzero(np.abs(gradient[0]).sum(-1))
                np.testing.assert_array_equal(reached, places)


def run_dropped(module, x, key=0, train=True):
    row = {"segments_BL": jnp.ones(x.shape[:2], int), "positions_BL": jnp.ones(x.shape[:2], int)}
    rngs = {"dropout": jax.random.key(key)}
    return apply(module, init(module), x, row, rngs=rngs, train=train)[0]


@pytest.mark.parametrize("locked", [False, True], ids=["position", "row"])
def test_a_locked_mask_is_one_a_row_for_all_its_positions(locked):
    dropped = np.asarray(
        run_dropped(build("rnn", dropout=0.5, locked=locked), random((B, L, D), 3)) == 0
    )
    same = (dropped == dropped[:, :1]).all(axis=1)
    assert same.all() == locked
    assert 0 < dropped[:, 0].sum() < dropped[:, 0].size
    assert not np.array_equal(dropped[0], dropped[1])  # each row has its own


def test_hidden_dropout_keeps_the_mean_and_leaves_the_first_step_alone():
    """From zeros there is nothing to drop; for a small state an Elman layer is nearly linear."""
    x = 0.1 * random((64, 2, D), 3)
    total = sum(
        np.asarray(run_dropped(build("rnn", 1, hidden_dropout=0.5), x, key), float)
        for key in range(64)
    )
    expected = np.asarray(run_dropped(build("rnn", 1), x), float)
    np.testing.assert_allclose(total[:, 0] / 64, expected[:, 0], atol=1e-6)
    assert np.abs(total / 64 - expected)[:, 1].mean() < 0.1 * np.abs(expected[:, 1]).mean()


@cells
def test_hidden_dropout_uses_one_mask_a_row_for_all_steps(name):
    """The state is carried, and only its part in the product is dropped: an Elman layer shows which."""
    module = build(name, num_layers=1, hidden_dropout=0.5)
    x = random((B, L, D), 3)
    features = run_dropped(module, x)
    assert not np.allclose(features, run_dropped(module, x, train=False), atol=1e-3)
    if name != "rnn":
        return
    params = jax.tree.map(np.asarray, init(module)["params"]["layer_0"])
    x_BLH = np.einsum("bld,dh->blh", x, params["kernel"][:, 0]) + params["bias"][0]
    pre_BLH = np.arctanh(np.asarray(features, np.float64)) - x_BLH
    found = []
    for b in range(B):
        before, after = np.asarray(features)[b, :-1], pre_BLH[b, 1:]
        masked, *_ = np.linalg.lstsq(before, after, rcond=None)  # U with the rows that were dropped
        kept = np.round(masked / params["recurrent"][:, 0]).astype(int)
        assert (kept == kept[:, :1]).all()
        assert set(kept[:, 0]) <= {0, 2}
        found.append(tuple(kept[:, 0]))
    assert len(set(found)) > 1


@cells
def test_weight_dropout_zeroes_elements_of_the_recurrent_kernel_only(name):
    module = build(name, num_layers=1, weight_dropout=0.5)
    x = random((1, L, D), 3)
    row = {"segments_BL": jnp.ones((1, L), int), "positions_BL": jnp.ones((1, L), int)}

    def loss(variables):
        rngs = {"dropout": jax.random.key(0)}
        return (module.apply(variables, x, **row, rngs=rngs, train=True)[0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(init(module))["params"]["layer_0"]
    dropped = np.asarray(gradient["recurrent"] == 0)
    assert 0.2 < dropped.mean() < 0.8
    assert (np.asarray(gradient["kernel"]) != 0).all()
    assert np.allclose(run_dropped(module, x, train=False), run_dropped(build(name, 1), x))


def make_layer(name, **fields):
    layer = Layer(name, H, FLOAT32, **fields)
    state = (jnp.zeros((H, B)),) * CELLS[name].num_states
    masks = {"fresh_L1B": jnp.zeros((L, 1, B), bool), "valid_L1B": jnp.ones((L, 1, B), bool)}
    make = jax.jit(functools.partial(layer.init, **masks))
    return nn.unbox(make(jax.random.key(0), random((L, D, B), 0), state))["params"]


def test_biases_start_at_zero_but_the_forget_gate_at_one():
    for name, cell in CELLS.items():
        expected = np.zeros((cell.num_slots, H))
        if name == "lstm":
            expected[FORGET] = 1
        np.testing.assert_array_equal(make_layer(name)["bias"], expected)


@cells
def test_a_scale_makes_every_parameter_start_uniform(name):
    params = make_layer(name, init_scale=0.05)
    values = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])
    assert 0.045 < np.abs(values).max() <= 0.05 and abs(values.mean()) < 0.015
    assert values.std() == pytest.approx(0.05 / 3**0.5, rel=0.15)
    assert (params["bias"] != 0).all()


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


@cells
def test_states_are_float32_under_bfloat16(name):
    module = Recurrent(name, 1, H, jnp.dtype("bfloat16"))
    args = {
        "segments_BL": jnp.ones((B, L), int),
        "positions_BL": jnp.ones((B, L), int),
        "memory": "carry",
    }
    x = random((B, L, D), 3)
    variables = jax.jit(lambda: module.init(jax.random.key(0), x, **args))()
    (y, states), new = jax.jit(lambda: module.apply(variables, x, mutable=["carry"], **args))()
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((new, states))} == {jnp.dtype("float32")}


def test_two_directions_have_no_memory():
    module = build("lstm", bidirectional=True)
    with pytest.raises(AssertionError, match="two directions have no memory"):
        module.init(jax.random.key(0), random((1, L, D), 0), **rows(L), memory="carry")
    assert set(init(module)) == {"params"}
