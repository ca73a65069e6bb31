"""Which parameters Muon orthogonalises, as which matrices, and how large it makes their updates."""

import math
from typing import Any

import jax
import optax

from lm import sharding
from lm.config import ConfigError

# Logical axes along which a parameter is several matrices, each orthogonalised on its own.
SEPARATE = frozenset({"layers", "experts", "qkv", "gate", "gates"})
# Axes of tables, vectors and routers, which are no maps between features.
NO_MATRIX = frozenset({"vocab", "position", "types", "relpos", "classes", "norm", "router"})
MUON_RMS = 0.2  # of an update's elements, as AdamW's is: Liu et al. 2025, arXiv 2502.16982


def matrices(params: Any, axes: Any) -> Any:
    """Return a tree: how Muon sees a parameter as matrices, or a mask where AdamW has it.

    Embeddings, heads, routers, norms and biases go to AdamW. In a kernel `layers`, `experts`, `qkv`, `gate`
    and `gates` each tell separate matrices apart, `heads` with `kv` are one side of a matrix, and
    any other axis is a side.

    Raises:
      ConfigError: a kernel with more than two sides.
    """

    def one(path, names, leaf):
        if NO_MATRIX & set(names):
            return optax.MaskedNode()
        heads = tuple(i for i, name in enumerate(names) if name in ("heads", "kv"))
        others = [(i,) for i, name in enumerate(names) if name not in SEPARATE | {"heads", "kv"}]
        sides = sorted([heads, *others] if heads else others)
        if len(sides) < 2:
            return optax.MaskedNode()
        if len(sides) > 2:
            raise ConfigError(
                f"optim.name='muon': parameter {sharding.path_name(path)} has axes {names}, "
                "which is no matrix; name the axes that count matrices in lm.muon.SEPARATE"
            )
        return optax.contrib.MuonDimensionNumbers(*sides)

    return jax.tree.map_with_path(one, axes, params, is_leaf=lambda x: isinstance(x, tuple))


def is_matrix(node: Any) -> bool:
    """Return whether a node of that tree is a parameter that Muon has."""
    return isinstance(node, optax.contrib.MuonDimensionNumbers)


def factor(leaf: Any, matrix: Any) -> float:
    """Return what an orthogonal update of a parameter is multiplied by; 1 where AdamW has it."""
    if not is_matrix(matrix):
        return 1.0
    sides = [math.prod(leaf.shape[i] for i in side) for side in matrix]
    return MUON_RMS * math.sqrt(max(sides))
