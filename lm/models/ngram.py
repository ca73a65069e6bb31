"""N-gram language models: probabilities by counting, smoothed.

"An empirical study of smoothing techniques for language modeling", Chen and Goodman 1999: interpolated
modified Kneser-Ney, and Kneser-Ney, Jelinek-Mercer and add-k to compare it with (see
`lm/nn/smoothing.py`).

What differs: exact counts for any vocabulary, without hashing or pruning; the unigrams are interpolated
with the uniform distribution over the vocabulary. A place is counted if its weight is not 0, with the
context that its document has in its row. Below the highest order Kneser-Ney counts the different tokens
seen before an n-gram; where nothing stands before it, at the start of a document or of a row, each time
counts. So rows should have a `task.context` of order - 1, and then each n-gram is counted once and whole.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm import sharding
from lm.config import ConfigError
from lm.models import check_option
from lm.nn import ngram_tree, smoothing
from lm.nn.embed import finish_logits, pad_vocab

SMOOTHINGS = ("modified_kneser_ney", "kneser_ney", "jelinek_mercer", "add_k")
NONE = -1  # no node: a context that was never seen, or is not there
BLOCK = 16  # children of a context that are read together
READ = 1024  # blocks of a row that are read together


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "ngram"  # family: a file of lm/models, such as gpt or rnn
    order: int = 3  # tokens of an n-gram, the predicted one included: 1 to 6
    smoothing: str = "modified_kneser_ney"  # or kneser_ney, jelinek_mercer, add_k
    discount: float = 0.0  # of kneser_ney, from every count; 0 = n1 / (n1 + 2 n2) at each order
    weights: tuple[float, ...] = ()  # of jelinek_mercer, unigrams first; () = by leaving one out
    k: float = 0.1  # what add_k adds to every count
    vocab_size: int = 0  # tokens; 0 = the tokenizer's
    max_length: int = 0  # positions of a row; 0 = the task's row

    ONLY_FOR: ClassVar = {
        "discount": ("smoothing", ("kneser_ney",)),
        "weights": ("smoothing", ("jelinek_mercer",)),
        "k": ("smoothing", ("add_k",)),
    }

    def __post_init__(self):
        check_option(self, "smoothing", SMOOTHINGS)
        if not 1 <= self.order <= 6:
            raise ConfigError(f"model.order={self.order}: use 1 to 6")
        if not 0 <= self.discount <= 1:
            raise ConfigError(f"model.discount={self.discount}: use 0 = derived, or up to 1")
        if self.weights and len(self.weights) != self.order:
            raise ConfigError(
                f"model.weights={self.weights}: give one for each of model.order={self.order}, or none"
            )
        if not all(0 <= weight < 1 for weight in self.weights):
            raise ConfigError(f"model.weights={self.weights}: use numbers in [0, 1)")
        if not self.k > 0:
            raise ConfigError(f"model.k={self.k}: use a positive number")


class Model(nn.Module):
    """p(w | h) = share(h w) + backoff(h) p(w | h without its first token), and uniform below that.

    Contexts and n-grams are the nodes of one tree: its root is the empty context, a node's children are
    the n-grams that go on from it. `estimate` makes its tables of the record that `count` keeps; without
    them nothing was counted, and every token is as probable as any other.

    Tables (nodes of all levels in one row, the root first, then level by level, children sorted):
      tokens: int32 [nodes], the last token of each.
      share: float32 [nodes].
      first_child: int32 [contexts + 1]; the children of i are first_child[i] to first_child[i + 1] - 1.
      backoff: float32 [contexts].
      unigrams: float32 [V], the share of each token after the empty context.
    """

    cfg: Config
    decode_length: int = 0

    accepts: ClassVar = frozenset({"causal", "packed"})
    learns: ClassVar = "counting"

    @property
    def max_context(self) -> int:
        """Positions that decoding may use; 0 = any number."""
        return 0

    def init_counts(self, num_steps: int, batch_size: int, row_length: int) -> dict[str, Any]:
        """Return an empty record of batches [B, L]: zeros [num_steps, B, L], boxed with logical axes.

        `inputs` and `targets` are tokens, `lengths` the tokens of the n-gram that ends with the target
        (0 = not counted), each in the smallest type that holds it.
        """
        types = {
            "inputs": self.cfg.vocab_size - 1,
            "targets": self.cfg.vocab_size - 1,
            "lengths": 6,
        }
        shape = (num_steps, batch_size, row_length)
        return {
            name: nn.LogicallyPartitioned(
                jnp.zeros(shape, np.min_scalar_type(most)), (None, "act_batch", "act_length")
            )
            for name, most in types.items()
        }

    def count(self, batch: dict[str, jax.Array], step: jax.Array) -> jax.Array:
        """Write a batch into the collection `counts` as that of `step`; return the tokens counted."""
        counted_BL = batch["weights"] > 0
        lengths_BL = jnp.where(counted_BL, 1 + self._available(batch), 0)
        values = {"inputs": batch["inputs"], "targets": batch["targets"], "lengths": lengths_BL}
        for name, new_BL in values.items():
            record = self.get_variable("counts", name)
            new_BL = sharding.constrain(new_BL.astype(record.dtype), "act_batch", "act_length")
            record = jax.lax.dynamic_update_index_in_dim(record, new_BL, step, 0)
            self.put_variable("counts", name, record)
        return counted_BL.sum(dtype=jnp.float32)

    def estimate(self, counts: dict[str, Any]) -> dict[str, np.ndarray]:
        """Return the tables, for `params`, of what `count` recorded; on the host, and in one pass."""
        cfg = self.cfg
        record = {
            name: np.asarray(counts[name]).reshape(-1, counts[name].shape[-1])
            for name in ("inputs", "targets", "lengths")
        }
        levels, paths = ngram_tree.grow(**record, order=cfg.order, vocab_size=cfg.vocab_size)
        if cfg.smoothing == "add_k":
            splits = smoothing.add_k(levels, k=cfg.k, vocab_size=cfg.vocab_size)
        elif cfg.smoothing == "jelinek_mercer":
            by_text = functools.partial(smoothing.leave_one_out, vocab_size=cfg.vocab_size)
            splits = smoothing.jelinek_mercer(levels, cfg.weights or by_text(levels, paths))
        elif cfg.smoothing == "kneser_ney":
            splits = smoothing.kneser_ney(levels, discount=cfg.discount)
        else:
            splits = smoothing.modified_kneser_ney(levels)
        return _tables(levels, splits, cfg.vocab_size)

    @nn.compact
    def __call__(self, batch, *, train: bool = False, decode: bool = False) -> jax.Array:
        """Return features [B, L, order] of a batch: the node of the last 0 to order - 1 inputs, or -1.

        Decoding, a row of several tokens is a prompt and starts anew; one token continues.
        """
        tokens_BL, available_BL = batch["inputs"], self._available(batch)
        if not decode:
            return self._walk(tokens_BL, available_BL)
        size = max(self.cfg.order - 1, 1)
        cache = self.variable(
            "cache", "tokens",
            nn.with_logical_partitioning(jnp.full, ("act_batch", None)),
            (tokens_BL.shape[0], size), NONE, jnp.int32,
        )  # fmt: skip
        if tokens_BL.shape[1] == 1:
            cache.value = jnp.concatenate([cache.value[:, 1:], tokens_BL], axis=1)
            known_BC = jnp.cumsum(cache.value != NONE, axis=1)
            return self._walk(cache.value, jnp.minimum(known_BC, self.cfg.order - 1))[:, -1:]
        end_B1 = (batch["segments"] > 0).sum(axis=1, keepdims=True)
        index_BC = end_B1 - size + jnp.arange(size)[None]
        known_B1 = jnp.take_along_axis(available_BL, jnp.maximum(end_B1 - 1, 0), axis=1)
        last_BC = jnp.take_along_axis(tokens_BL, jnp.maximum(index_BC, 0), axis=1)
        cache.value = jnp.where(index_BC >= end_B1 - known_B1, last_BC, NONE)
        return self._walk(tokens_BL, available_BL)

    def logits(self, x_BLO: jax.Array) -> jax.Array:
        """Return float32 log-probabilities [B, L, V] of features, the padded vocabulary masked."""
        tables, seen_BLO = self._tables(), x_BLO >= 0
        backoff_BLO = jnp.where(seen_BLO, tables["backoff"][jnp.maximum(x_BLO, 0)], 1.0)
        # What the contexts from each length up leave to the shorter ones.
        left_BLO = jax.lax.cumprod(backoff_BLO, axis=2, reverse=True)
        weight_BLO = jnp.concatenate([left_BLO[..., 1:], jnp.ones_like(left_BLO[..., :1])], axis=2)
        weight_BLO = jnp.where(seen_BLO, weight_BLO, 0.0)
        p_BLV = weight_BLO[..., :1] * tables["unigrams"][None, None]
        p_BLV = p_BLV + left_BLO[..., :1] / self.cfg.vocab_size
        p_BLV = sharding.constrain(p_BLV, "act_batch", "act_length", None)
        if self.cfg.order > 1:
            p_BLV = _add_children(tables, p_BLV, x_BLO[..., 1:], weight_BLO[..., 1:])
        # A float32 may not hold the sixth power of a tiny backoff.
        p_BLV = jnp.maximum(p_BLV, jnp.finfo(jnp.float32).tiny)
        return finish_logits(jnp.log(p_BLV), self.cfg.vocab_size)

    def _available(self, batch) -> jax.Array:
        """Return how many inputs, up to order - 1, of its own document each place ends [B, L]."""
        length = batch["inputs"].shape[1]
        since_BL = jnp.minimum(batch["positions"], jnp.arange(length)[None]) + 1
        return jnp.where(batch["segments"] > 0, jnp.minimum(since_BL, self.cfg.order - 1), 0)

    def _walk(self, tokens_BL: jax.Array, available_BL: jax.Array) -> jax.Array:
        """Return the nodes [B, L, order] of the last 0, 1, ... tokens at each place, at most `available`."""
        tables = self._tables()
        nodes_BL = jnp.zeros_like(tokens_BL)
        paths = [nodes_BL]
        for size in range(1, self.cfg.order):
            if (
                size > 1
            ):  # the last `size` tokens are the last `size - 1` of the place before, and this one
                nodes_BL = jnp.pad(nodes_BL, ((0, 0), (1, 0)), constant_values=NONE)[:, :-1]
            nodes_BL = _child(tables, nodes_BL, tokens_BL, self.cfg.vocab_size)
            nodes_BL = jnp.where(available_BL >= size, nodes_BL, NONE)
            paths.append(nodes_BL)
        x_BLO = jnp.stack(paths, axis=2)
        if self.cfg.smoothing == "add_k":  # of one context only, the longest that there is
            sizes = jnp.arange(self.cfg.order)[None, None]
            x_BLO = jnp.where(sizes == available_BL[..., None], x_BLO, NONE)
        return sharding.constrain(x_BLO, "act_batch", "act_length", None)

    def _tables(self) -> dict[str, jax.Array]:
        tables = _tables([], [], self.cfg.vocab_size)
        if self.has_variable("params", "tokens"):
            tables = {name: self.get_variable("params", name) for name in tables}
        return {name: jnp.asarray(table) for name, table in tables.items()}


def _tables(
    levels: list[ngram_tree.Level], splits: list[smoothing.Split], vocab_size: int
) -> dict[str, np.ndarray]:
    """Return the tables of `Model` from the levels of a tree and the split of each."""
    sizes = [1, *(len(level.token) for level in levels)]
    if sum(sizes) >= 2**31:
        raise ConfigError(f"model.order: {sum(sizes):,} n-grams are too many; use a smaller one")
    starts = np.cumsum(sizes)
    children = [
        start + np.searchsorted(level.parent, np.arange(level.num_parents))
        for level, start in zip(levels, starts[:-1], strict=True)
    ]
    unigrams = np.zeros(pad_vocab(vocab_size))
    if levels:
        unigrams[levels[0].token] = splits[0][0]
    root = np.zeros(1)
    backoff = [split[1] for split in splits] or [np.ones(1)]
    return {
        "tokens": np.concatenate([root, *(level.token for level in levels)]).astype(np.int32),
        "share": np.concatenate([root, *(split[0] for split in splits)]).astype(np.float32),
        "first_child": np.concatenate([*(children or [[1]]), starts[-1:]]).astype(np.int32),
        "backoff": np.concatenate(backoff).astype(np.float32),
        "unigrams": unigrams.astype(np.float32),
    }


def _child(tables, parents_BL: jax.Array, tokens_BL: jax.Array, vocab_size: int) -> jax.Array:
    """Return each parent's child by a token, or -1: a binary search among its children."""
    node_BL = jnp.maximum(parents_BL, 0)
    start_BL = tables["first_child"][node_BL]
    stop_BL = jnp.where(parents_BL >= 0, tables["first_child"][node_BL + 1], start_BL)

    def halve(_, bounds):
        low_BL, high_BL = bounds
        middle_BL = low_BL + (high_BL - low_BL) // 2
        less_BL = (low_BL < high_BL) & (tables["tokens"][middle_BL] < tokens_BL)
        return jnp.where(less_BL, middle_BL + 1, low_BL), jnp.where(less_BL, high_BL, middle_BL)

    found_BL, _ = jax.lax.fori_loop(0, vocab_size.bit_length(), halve, (start_BL, stop_BL))
    same_BL = (found_BL < stop_BL) & (tables["tokens"][found_BL] == tokens_BL)
    return jnp.where(same_BL, found_BL, NONE)


def _add_children(tables, p_BLV, x_BLC: jax.Array, weight_BLC: jax.Array) -> jax.Array:
    """Return `p_BLV` with, for every context in `x_BLC`, its weight times the share of each child added.

    A row's contexts have from one child to the whole vocabulary: their children are cut into blocks, and
    the blocks of all of a row's contexts read in order, however they are spread.
    """
    batch_size, num_contexts = x_BLC.shape[0], x_BLC.shape[2]
    x_BM, weight_BM = (x.reshape(batch_size, -1) for x in (x_BLC, weight_BLC))
    start_BM = tables["first_child"][jnp.maximum(x_BM, 0)]
    stop_BM = jnp.where(x_BM >= 0, tables["first_child"][jnp.maximum(x_BM, 0) + 1], start_BM)
    blocks_BM = -(-(stop_BM - start_BM) // BLOCK)
    ends_BM = jnp.cumsum(blocks_BM, axis=1)
    most = x_BM.shape[1] * -(-p_BLV.shape[2] // BLOCK)
    read = min(READ, most)

    def add(p_LV, block_N, start_M, stop_M, weight_M, blocks_M, ends_M):
        context_N = jnp.searchsorted(ends_M, block_N, side="right")
        there_N = context_N < len(ends_M)
        context_N = jnp.minimum(context_N, len(ends_M) - 1)
        place_N = block_N - (ends_M - blocks_M)[context_N]
        child_NK = (start_M[context_N] + BLOCK * place_N)[:, None] + jnp.arange(BLOCK)[None]
        there_NK = there_N[:, None] & (child_NK < stop_M[context_N][:, None])
        child_NK = jnp.where(there_NK, child_NK, 0)
        token_NK = jnp.where(there_NK, tables["tokens"][child_NK], p_LV.shape[1])  # dropped
        value_NK = weight_M[context_N][:, None] * tables["share"][child_NK]
        row_NK = jnp.broadcast_to((context_N // num_contexts)[:, None], token_NK.shape)
        return p_LV.at[row_NK, token_NK].add(value_NK, mode="drop")

    def body(state):
        begin, p_BLV = state
        adds = jax.vmap(add, in_axes=(0, None, 0, 0, 0, 0, 0))
        block_N = begin + jnp.arange(read)
        p_BLV = adds(p_BLV, block_N, start_BM, stop_BM, weight_BM, blocks_BM, ends_BM)
        return begin + read, p_BLV

    total = ends_BM[:, -1].max()
    _, p_BLV = jax.lax.while_loop(lambda state: state[0] < total, body, (jnp.int32(0), p_BLV))
    return p_BLV


def flops_per_token(cfg: Config, length: int, scored: float = 1.0) -> float:
    """Return the operations of training a token: for each order a look-up, and an addition to a count."""
    del length, scored
    return 2.0 * cfg.order
