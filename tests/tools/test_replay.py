"""`tools.replay` names the layer of several in which a step goes bad, forward and on the way back."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from lm import initial, losses, train
from lm.data import pipeline
from lm.exits import Diverged
from lm.nn import embed, norm, recurrent
from tests.test_recorder import BAD, MARK, mark, mark_one, on_devices
from tools import replay


def bad_result(y, hit):
    """Return the logarithm of -1 where it is hit."""
    return jnp.where(hit, jnp.log(y * 0 - 1), y)


def bad_slope(y, hit):
    """Return y, whose gradient is where it is hit the square root's slope at 0, times 0."""
    return y + jnp.sqrt(jnp.where(hit, y * 0, 1)) - jnp.where(hit, 0, 1)


def bad_layer(patch, cls, is_bad, make_bad=bad_result):
    """Change what a module of `cls` makes of marked rows, where `is_bad(module)` is."""
    look, call, marked = embed.Embed.__call__, cls.__call__, []

    def see(self, tokens):
        marked[:] = [(tokens == MARK).any(axis=1)]
        return look(self, tokens)

    def __call__(self, x, *args, **options):
        made = call(self, x, *args, **options)
        y, *more = made if isinstance(made, tuple) else (made,)
        hit = is_bad(self) & marked[0]
        if y.ndim == 3:
            hit = (
                hit[None, None] if more else hit[:, None, None]
            )  # rows are last in a recurrent layer
            y = make_bad(y, hit)
        return (y, *more) if more else y

    patch.setattr(embed.Embed, "__call__", nn.module.wrap_method_once(see))
    patch.setattr(cls, "__call__", nn.module.wrap_method_once(__call__))


def is_marked(module):
    """Whether it is the norm that `begin_marked` has marked, of scanned ones too, which are one module."""
    if module.name != "mlp_norm" or module.is_initializing():
        return False
    return module.get_variable("params", "scale").mean() > 2


def begin_marked(patch, *path, at=...):
    original = initial.fresh_state

    def fresh_state(made, init):
        state = original(made, init)
        place = functools.reduce(dict.__getitem__, path, state.params)
        place["scale"] = place["scale"].at[at].mul(4)
        return state

    patch.setattr(initial, "fresh_state", fresh_state)


GPT = {"name": "gpt", "num_layers": 3, "model_dim": 16, "num_heads": 2}
RECORDED = {"eval__every_steps": 0, "train__recordings": 1}
RECURRENT = {"name": "rnn", "num_layers": 2, "model_dim": 16}
T5 = {"name": "t5", "num_layers": 2, "model_dim": 16, "num_heads": 2, "head_dim": 8}
SPANS = ConfigDict({"name": "span_corruption", "source_length": 32})


@pytest.mark.parametrize(
    ("model", "options", "start", "path"),
    [
        pytest.param(
            GPT, {}, (("layers", "block_1", "mlp_norm"), ...), "layers/block_1/mlp_norm",
            id="gpt", marks=pytest.mark.slow,
        ),
        pytest.param(
            {**GPT, "scan": True}, {}, (("layers", "blocks", "mlp_norm"), 1), "layers/block_1/mlp_norm",
            id="scan", marks=pytest.mark.slow,
        ),
        pytest.param(
            {**RECURRENT, "cell": "lstm"}, {}, None, "recurrent/layer_1", id="lstm", marks=pytest.mark.slow
        ),
        pytest.param(
            {**RECURRENT, "cell": "rnn"}, {}, None, "recurrent/layer_1", id="rnn", marks=pytest.mark.slow
        ),
        pytest.param(
            T5, {"task": SPANS}, (("decoder", "block_1", "mlp_norm"), ...), "decoder/block_1/mlp_norm",
            id="t5", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_fault_in_one_layer_of_several_is_named(
    tiny, tmp_path, monkeypatch, capsys, model, options, start, path
):
    mark_one(monkeypatch)
    if start:
        bad_layer(monkeypatch, norm.Norm, is_marked)
        begin_marked(monkeypatch, *start[0], at=start[1])
    else:
        bad_layer(monkeypatch, recurrent.Layer, lambda layer: layer.name == "layer_1")
    with pytest.raises(Diverged, match="not finite"):
        train.run(tiny(model=ConfigDict(model), **RECORDED, **options), tmp_path)
    capsys.readouterr()
    assert replay.main([str(tmp_path / "recorder" / str(BAD))]) == 0
    said = capsys.readouterr().out
    kind = "Norm" if start else "Layer"
    assert f"forward: {path} ({kind}.__call__) is the first with numbers that are not" in said, said
    assert "row 3" in said and "row 2" not in said


@pytest.mark.slow
def test_a_gradient_that_goes_bad_in_one_layer_of_several_is_named(
    tiny, tmp_path, monkeypatch, capsys
):
    """Those of the layers before it are bad too, those of the layer after it are not."""
    mark_one(monkeypatch)
    bad_layer(monkeypatch, norm.Norm, is_marked, bad_slope)
    begin_marked(monkeypatch, "layers", "block_1", "mlp_norm")
    with pytest.raises(Diverged, match="the gradient is not finite"):
        train.run(tiny(model=ConfigDict(GPT), **RECORDED), tmp_path)
    capsys.readouterr()
    assert replay.main([str(tmp_path / "recorder" / str(BAD))]) == 0
    said = capsys.readouterr().out
    assert "forward: finite" in said
    assert "gradients are not finite, that of layers.block_1.mlp_norm.scale first" in said, said


def test_parts_that_are_not_finite_together_alone_are_reproduced(
    tiny, tmp_path, monkeypatch, capsys
):
    """Each part's gradient is 1.4e19, of which the square is a float32; of twice as much it is not."""
    original, batch_of = losses.cross_entropy, pipeline.Batches.__getitem__

    def cross_entropy(logits, params, x, targets, weights, **options):
        total, sums = original(logits, params, x, targets, weights, **options)
        slope = jnp.where((targets == MARK).any(), 1.4e19 * 8 * 16, 0.0)
        number = params["layers"]["block_0"]["mlp_norm"]["scale"][0]
        return total + slope * (number - jax.lax.stop_gradient(number)), sums

    def batch(self, number):
        found = batch_of(self, number)
        if number == BAD:
            for row in (2, 3):  # of two parts
                mark(found, row)
        return found

    monkeypatch.setattr(losses, "cross_entropy", cross_entropy)
    monkeypatch.setattr(pipeline.Batches, "__getitem__", batch)
    on_devices(monkeypatch, 1)
    config = tiny(train__recordings=1, train__accumulate_steps=2, eval__every_steps=0)
    with pytest.raises(Diverged, match="the gradient is not finite"):
        train.run(config, tmp_path)
    capsys.readouterr()
    assert replay.main([str(tmp_path / "recorder" / str(BAD))]) == 0
    said = capsys.readouterr().out
    assert "norm of the gradient inf: each of the 2 parts is finite, only their sum is not" in said
