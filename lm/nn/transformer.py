"""A stack of Transformer blocks, scanned, unrolled or in stages, with rematerialisation by name."""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn

from lm import sharding
from lm.nn import pipeline
from lm.nn.linear import KEPT

# Names in parameter paths: one stack [num_layers, ...], or a tree for each layer.
SCANNED, UNROLLED = "blocks", "block_{}"

# Collections that modules sow into: what is added to the loss, what is only logged, and what tests look at.
SOWN = {"losses": 0, "reports": 0, "intermediates": 0}

REMAT_POLICIES: dict[str, Callable | None] = {
    "dots": jax.checkpoint_policies.save_only_these_names(KEPT),  # keep products with kernels
    "full": jax.checkpoint_policies.nothing_saveable,  # keep only each block's input
}


def stacking(cfg: Any) -> dict[str, Any]:
    """Return the fields of a family's config that say how its layers are stacked."""
    return {name: getattr(cfg, name) for name in ("scan", "remat", "microbatches", "stage_repeats")}


class Stack(nn.Module):
    """`num_layers` copies of a block, each `block(x, *args) -> x`.

    Attributes:
      block: the Linen class of one layer.
      arguments: its constructor's keyword arguments.
      scan: one `lax.scan` over stacked parameters (compile time constant in depth) or a plain loop.
      remat: "none", or a name of `REMAT_POLICIES`.
      microbatches: parts of a batch that flow through `mesh.stage` stages; 0 = 4 a stage.
      stage_repeats: how many times each part comes around.
    """

    block: type[nn.Module]
    arguments: dict[str, Any]
    num_layers: int
    scan: bool = False
    remat: str = "none"
    microbatches: int = 0
    stage_repeats: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *args: Any, train: bool, decode: bool) -> jax.Array:
        """Run the layers in order on x [B, L, D]; `args` go to every layer."""
        if self.scan and sharding.ways_here("layers") > 1 and not self.is_initializing():
            return self._in_stages(x, args, train=train, decode=decode)
        block = self.block
        if self.remat != "none" and not decode:
            block = nn.remat(block, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan)
        arguments = {**self.arguments, "train": train, "decode": decode}
        x = sharding.spread(x)
        if not self.scan:
            for layer in range(self.num_layers):
                x = block(**arguments, name=UNROLLED.format(layer))(x, *args)
            return x

        def body(module, carry, _):
            return module(carry, *args), None

        scanned = nn.scan(
            body,
            # In the carry the batch stays the first axis, along which it is split.
            variable_axes={"params": 0, "cache": 0, "carry": 1, **SOWN},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(block(**arguments, name=SCANNED), x, None)[0]

    def _in_stages(self, x: jax.Array, args: Any, *, train: bool, decode: bool) -> jax.Array:
        """Run the scanned layers' parameters as a pipeline. Dropout draws other numbers than without."""
        block = self.block(**self.arguments, train=train, decode=decode, parent=None)
        key = self.make_rng("dropout") if self.has_rng("dropout") else None

        def layer(params, number, part, x, *args):
            rngs = {}
            if key is not None:
                rngs["dropout"] = jax.random.fold_in(jax.random.fold_in(key, number), part)
            return block.apply({"params": params}, x, *args, rngs=rngs)

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        stages = sharding.ways_here("layers")
        return pipeline.run(
            layer,
            self.variables["params"][SCANNED],
            x,
            args,
            stages=stages,
            parts=pipeline.num_parts(len(x), self.microbatches, stages),
            repeats=self.stage_repeats,
        )
