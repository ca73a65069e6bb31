"""Flax's side of the benchmark: a recurrent language model of `linen.RNN` with optax, as users train it.

`OptimizedLSTMCell`, `GRUCell` or `SimpleCell` under `jax.jit`, in float32 on a CPU and bfloat16 on a GPU.
`bench` starts this as a process.
"""

import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from tools import bench_pipe

CELLS: dict[str, Any] = {
    "lstm": nn.OptimizedLSTMCell,
    "gru": nn.GRUCell,
    "rnn": nn.SimpleCell,
}
NUM_BATCHES = 4


class Model(nn.Module):
    """Logits [B, L, V] of tokens and the states to start from (None = zeros), and the last states."""

    shape: dict[str, Any]
    dtype: Any

    @nn.compact
    def __call__(self, tokens, states):
        shape, width = self.shape, self.shape["model_dim"]
        embed = nn.Embed(shape["vocab_size"], width, dtype=self.dtype)
        dropout = nn.Dropout(shape["dropout"], deterministic=not shape["dropout"])
        x, lasts = embed(tokens), []
        for n in range(shape["num_layers"]):
            layer = nn.RNN(CELLS[shape["cell"]](width, dtype=self.dtype), return_carry=True)
            last, x = layer(dropout(x), initial_carry=None if states is None else states[n])
            lasts.append(last)
        x = dropout(x)
        if shape["tied"]:
            return embed.attend(x), lasts
        return nn.Dense(shape["vocab_size"], use_bias=False, dtype=self.dtype)(x), lasts


class Peer:
    """A model of one shape, trained."""

    def prepare(self, *, shape: dict, optim: dict, decode: bool, device: str) -> dict:
        """Make the model, and return what it is and its modes."""
        assert not decode, "it trains only"
        self.shape = shape
        model = Model(shape, jnp.bfloat16 if device == "cuda" else jnp.float32)
        rng = np.random.default_rng(0)
        size = (shape["rows"], shape["length"] + 1)
        tokens = [rng.integers(shape["vocab_size"], size=size) for _ in range(NUM_BATCHES)]
        self.batches = [jnp.asarray(t, jnp.int32) for t in tokens]
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        self.params = jax.jit(model.init)(keys, self.batches[0][:, :-1], None)["params"]
        clip = optax.clip_by_global_norm(optim["clip_norm"] or jnp.inf)
        adamw = optax.adamw(
            optim["peak_lr"], optim["beta1"], optim["beta2"], weight_decay=optim["weight_decay"]
        )
        tx = optax.chain(clip, adamw)
        self.opt_state = tx.init(self.params)
        self.states: Any = None
        self.step = _step(model, tx, shape["accumulate_steps"])
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return {"parameters": parameters, "modes": ["jit"], "library": f"jax {jax.__version__}"}

    def run(self, *, mode: str, steps: int) -> float:
        """Return the seconds that `steps` updates take."""
        start = time.perf_counter()
        for step in range(steps):
            states = self.states if self.shape["stateful"] else None
            self.params, self.opt_state, self.states, _ = self.step(
                self.params, self.opt_state, states, self.batches[step % NUM_BATCHES], step
            )
        jax.block_until_ready(self.params)
        return time.perf_counter() - start

    def peak_bytes(self) -> int:
        """Return the most memory in use so far: the device's, or the process's on a CPU."""
        stats = jax.local_devices()[0].memory_stats()
        if stats:
            return stats["peak_bytes_in_use"]
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _step(model: Model, tx: optax.GradientTransformation, parts: int) -> Any:
    """Return the jitted update: (params, optimizer state, states, tokens, number) -> new ones, loss."""

    def loss_of(params, tokens, states, key):
        rngs = {"dropout": key}
        logits, lasts = model.apply({"params": params}, tokens[:, :-1], states, rngs=rngs)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), tokens[:, 1:]
        )
        return losses.mean(), lasts

    def update(params, opt_state, states, tokens, number):
        key, grads, lasts, total = jax.random.key(number), None, [], 0.0
        for part in range(parts):
            rows = slice(part * len(tokens) // parts, (part + 1) * len(tokens) // parts)
            own = jax.tree.map(lambda s, rows=rows: s[rows], states)
            grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, last), new = grad(params, tokens[rows], own, jax.random.fold_in(key, part))
            grads = new if grads is None else jax.tree.map(jnp.add, grads, new)
            lasts.append(last)
            total += loss / parts
        grads = jax.tree.map(lambda g: g / parts, grads)
        updates, opt_state = tx.update(grads, opt_state, params)
        states = jax.tree.map(lambda *s: jnp.concatenate(s), *lasts)
        return optax.apply_updates(params, updates), opt_state, states, total

    return jax.jit(update, donate_argnums=(0, 1))


if __name__ == "__main__":
    bench_pipe.serve(Peer())
