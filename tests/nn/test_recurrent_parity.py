"""Layers against PyTorch's LSTM, GRU and RNN: outputs, states and every gradient, on committed fixtures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.nn import cells
from lm.nn.cells import CELLS
from lm.nn.recurrent import Layer

TOLERANCE = 2e-5  # absolute, of float32; nowhere loosened
# Where PyTorch's gates (lstm: i f u o; gru: r z n) stand in our order, of the input and of the recurrent.
GATES = {"lstm": ([0, 1, 2, 3],) * 2, "gru": ([2, 0, 1], [0, 1, 2]), "rnn": ([0], [0])}


def layer_of(name, weights, n):
    """Return the parameters of layer `n` in our names and shapes, as a function of PyTorch's."""
    num_gates = CELLS[name].num_gates
    orders = dict(zip(("ih", "hh"), GATES[name], strict=True))

    def gates(kind, side):
        array = weights[f"{kind}_{side}_l{n}"]
        return array.reshape(num_gates, -1, *array.shape[1:])[np.array(orders[side])]

    apart = CELLS[name].num_slots - num_gates
    return {
        "kernel": gates("weight", "ih").transpose(2, 0, 1),
        "recurrent": gates("weight", "hh").transpose(2, 0, 1),
        "bias": jnp.pad(gates("bias", "ih"), ((0, apart), (0, 0)))
        + jnp.pad(gates("bias", "hh"), ((apart, 0), (0, 0))),
    }


def run(name, hidden_dim, weights, sources):
    """Return PyTorch's outputs: y [B, L, H] and the last h and c, each [N, B, H]."""
    x_LDB = sources["x"].transpose(1, 2, 0)
    names = ("h", "c")[: CELLS[name].num_states]
    masks = {"fresh_L1B": jnp.zeros((len(x_LDB), 1, x_LDB.shape[2]), bool)}
    masks["valid_L1B"] = ~masks["fresh_L1B"]
    lasts = []
    for n in range(len(sources["h"])):
        layer = Layer(name, hidden_dim, jnp.dtype("float32"))
        state = tuple(sources[state][n].T for state in names)
        params = layer_of(name, weights, n)
        x_LDB, last, _ = layer.apply({"params": params}, x_LDB, state, **masks)
        lasts.append([s.T for s in last])
    stacked = [jnp.stack(s) for s in zip(*lasts, strict=True)]
    return {"y": x_LDB.transpose(2, 0, 1), **dict(zip(names, stacked, strict=True))}


@pytest.mark.parametrize("columns", [8, 512])
@pytest.mark.parametrize("name", CELLS)
def test_outputs_states_and_gradients_are_pytorchs(name, columns, parity, monkeypatch):
    monkeypatch.setattr(cells, "CPU_CHUNK", columns)  # a row is five chunks, or one
    fixture = parity(name)
    sources = {key: x for key, x in fixture.input.items() if not key.startswith("mixture")}

    def loss(weights, sources):
        outputs = run(name, fixture.config["hidden_size"], weights, sources)
        total = sum((y * fixture.input[f"mixture_{key}"]).sum() for key, y in outputs.items())
        return total, outputs

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, outputs), gradients = grad(fixture.weight, sources)
    np.testing.assert_allclose(total, fixture.output["loss"][0], rtol=0, atol=TOLERANCE)
    for key, y in outputs.items():
        np.testing.assert_allclose(y, fixture.output[key], rtol=0, atol=TOLERANCE, err_msg=key)
    ours = {**gradients[0], **gradients[1]}
    assert set(ours) == set(fixture.gradient)
    for key, gradient in ours.items():
        wanted = fixture.gradient[key]
        assert np.abs(wanted).max() > 0.1, key
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize("name", CELLS)
def test_fixtures_have_biases_off_zero(name, parity):
    for key, values in parity(name).weight.items():
        assert values.std() > 0.05, key
