"""How one parameter of ours is made of tensors of theirs, and back: each way undoes the other exactly."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from lm.nn.embed import pad_vocab

Shape = tuple[int, ...]


class Part(NamedTuple):
    """One parameter of ours.

    Attributes:
      ours: its path in the parameters, dotted, layers unrolled: layers.block_0.mlp.up.kernel.
      theirs: names and shapes of the tensors it is made of.
      join: their arrays, in this order -> ours.
      split: ours -> their arrays.
      unused: rows at the head of theirs that ours has not, and that the way back takes from the folder.
    """

    ours: str
    theirs: tuple[tuple[str, Shape], ...]
    join: Callable[..., np.ndarray]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]
    unused: int = 0


class Constant(NamedTuple):
    """A tensor that the config alone decides: its shape, known before anything is made, and its maker."""

    shape: Shape
    make: Callable[[], np.ndarray]


def reshaped(ours: str, name: str, shape: Shape, our_shape: Shape | None = None) -> Part:
    """Return the part that is one tensor, in another shape of as many numbers."""
    wanted = our_shape or shape
    return Part(ours, ((name, shape),), lambda x: x.reshape(wanted), lambda x: [x.reshape(shape)])


def linear(ours: str, name: str, inputs: Shape, outputs: Shape) -> Part:
    """Return the kernel [*inputs, *outputs] of PyTorch's Linear, whose weight is [outputs, inputs]."""
    shape = (math.prod(outputs), math.prod(inputs))
    return Part(
        ours,
        ((name, shape),),
        lambda x: x.T.reshape(*inputs, *outputs),
        lambda x: [x.reshape(shape[::-1]).T],
    )


def table(ours: str, name: str, vocab_size: int, model_dim: int) -> Part:
    """Return an embedding [V, D], ours padded with rows of zeros."""
    rows = pad_vocab(vocab_size) - vocab_size
    return Part(
        ours,
        ((name, (vocab_size, model_dim)),),
        lambda x: np.pad(x, ((0, rows), (0, 0))),
        lambda x: [x[:vocab_size]],
    )


def padded(ours: str, name: str, vocab_size: int) -> Part:
    """Return a vector [V], ours padded with zeros."""
    rest = pad_vocab(vocab_size) - vocab_size
    return Part(
        ours, ((name, (vocab_size,)),), lambda x: np.pad(x, (0, rest)), lambda x: [x[:vocab_size]]
    )


def rows(ours: str, name: str, shape: Shape, *, unused: int) -> Part:
    """Return a table of our shape [R, D]; theirs has `unused` rows before ours."""
    theirs = (shape[0] + unused, *shape[1:])
    return Part(
        ours,
        ((name, theirs),),
        lambda x: x[unused:],
        lambda x: [np.pad(x, ((unused, 0), (0, 0)))],
        unused,
    )


def head(ours: str, name: str, vocab_size: int, model_dim: int) -> Part:
    """Return a head's kernel [D, V] of a Linear's weight [V, D], ours padded with columns of zeros."""
    columns = pad_vocab(vocab_size) - vocab_size
    return Part(
        ours,
        ((name, (vocab_size, model_dim)),),
        lambda x: np.pad(x.T, ((0, 0), (0, columns))),
        lambda x: [x[:, :vocab_size].T],
    )


def stacked(ours: str, names: Sequence[str], shape: Shape, *, axis: int, linear: bool) -> Part:
    """Return several tensors of one shape side by side along a new axis of ours.

    With `linear` they are weights of PyTorch's Linear, [outputs, inputs], and are turned first.
    """
    return Part(
        ours,
        tuple((name, shape) for name in names),
        lambda *parts: np.stack([x.T if linear else x for x in parts], axis=axis),
        lambda x: [part.T if linear else part for part in np.moveaxis(x, axis, 0)],
    )


def attention(
    ours: str,
    names: Sequence[str],
    *,
    model_dim: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> Part:
    """Return the kernel [D, G, H/G + 2, K] of `lm.nn.attention` of the weights of query, key and value.

    They are weights [heads K, D] of PyTorch's Linear, or with a `model_dim` of 0 its biases [heads K], and
    ours is then [G, H/G + 2, K].
    """
    D, G, K = max(model_dim, 1), num_kv_heads, head_dim
    repeats = (num_heads // G, 1, 1)
    width = (model_dim,) if model_dim else ()

    def join(*parts: np.ndarray) -> np.ndarray:
        grouped = [part.reshape(G, count, K, D) for part, count in zip(parts, repeats, strict=True)]
        return np.moveaxis(np.concatenate(grouped, axis=1), -1, 0).reshape(
            *width, G, sum(repeats), K
        )

    def split(x: np.ndarray) -> list[np.ndarray]:
        x = np.moveaxis(x.reshape(D, G, sum(repeats), K), 0, -1)
        parts = np.split(x, np.cumsum(repeats)[:-1], axis=1)
        return [
            part.reshape(G * count * K, *width) for part, count in zip(parts, repeats, strict=True)
        ]

    shapes = [(G * count * K, *width) for count in repeats]
    return Part(ours, tuple(zip(names, shapes, strict=True)), join, split)
