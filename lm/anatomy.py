"""Looking into one step: norms by layer, the first module and the first operation that are not finite."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend import core, source_info_util

from lm.nn.transformer import SCANNED
from lm.stored import flatten


@jax.jit
def _norms(arrays: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    found = {}
    for name, x in arrays.items():
        parts = name.split(".")
        kept = (parts[0] == "local") + (SCANNED in parts)  # groups, layers
        axes = tuple(range(min(kept, x.ndim), x.ndim))
        norm = jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(axes))
        found[name] = norm, (~jnp.isfinite(x)).sum(axes)
    return found


def norms(tree: Any) -> dict[str, dict[str, Any]]:
    """Return {"path.of.leaf": {"norm", "not_finite"}}: of scanned layers and of groups a list, one of each.

    A norm that is no number is None; `not_finite` counts the elements that are none.
    """
    arrays = {n: x for n, x in flatten(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    found = jax.device_get(_norms(arrays))
    return {
        name: {"norm": finite_or_none(norm.tolist()), "not_finite": count.tolist()}
        for name, (norm, count) in found.items()
    }


def finite_or_none(value: Any) -> Any:
    """Return numbers as JSON has them, which knows neither NaN nor infinity."""
    if isinstance(value, list):
        return [finite_or_none(part) for part in value]
    return value if np.isfinite(value) else None


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of a module: its path, what was called, and how many numbers of its results are not finite."""

    path: str
    method: str
    bad: int
    size: int


def module_calls(function: Callable[[], Any]) -> list[Call]:
    """Return the calls of modules within `function`, which runs as it is, in the order in which they end.

    The first with a result that is not finite so is the innermost. Calls inside of loops of the compiler
    are left out.
    """
    calls: list[Call] = []

    def watch(following, arguments, options, context):
        result = following(*arguments, **options)
        # A method may also return a module, which has a dtype as well.
        leaves = [x for x in jax.tree.leaves(result) if isinstance(x, jax.Array | np.ndarray)]
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            bad = sum(_count_bad(leaf) for leaf in leaves)
            path = "/".join(context.module.path)
            method = f"{type(context.module).__name__}.{context.method_name}"
            calls.append(Call(path, method, bad, sum(leaf.size for leaf in leaves)))
        return result

    with nn.intercept_methods(watch):
        function()
    return calls


def _count_bad(x: Any) -> int:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return 0
    return int((~np.isfinite(np.asarray(x, np.float32))).sum())


@dataclasses.dataclass(frozen=True)
class Operation:
    """A primitive operation: its name, the modules it is in, its line of source, its operands and results."""

    name: str
    where: str
    source: str
    shapes: str


def bad_operations(function: Callable, *arguments: Any) -> list[Operation]:
    """Return the first operation within `function` of which a result is not finite though all operands are.

    Where that is infinity, which may be on purpose (the logarithm of a probability of 0), the first that
    makes NaN of what is none follows. It is run operation by operation, also what is inside of compiled
    functions and loops. Empty where there is none, as of arguments that are bad.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    values = [*closed.consts, *jax.tree.leaves(arguments)]
    kinds = (lambda x: ~np.isfinite(x), np.isnan)
    found = [operation for bad in kinds if (operation := _first(closed.jaxpr, values, bad))]
    return list(dict.fromkeys(found))


def _first(jaxpr: Any, values: list[Any], is_bad: Callable) -> Operation | None:
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))
    for equation in jaxpr.eqns:
        operands = [v.val if isinstance(v, core.Literal) else known[v] for v in equation.invars]
        parameters = equation.primitive.get_bind_params(equation.params)
        with equation.ctx.manager:
            results = equation.primitive.bind(*operands, **parameters)
        results = results if equation.primitive.multiple_results else [results]
        if _any(results, is_bad) and not _any(operands, is_bad):
            inner = (_first(sub, values, is_bad) for sub, values in _inside(equation, operands))
            return next(filter(None, inner), None) or _described(equation)
        known.update(zip(equation.outvars, results, strict=True))
    return None


def _any(values: list[Any], is_bad: Callable) -> bool:
    return any(
        bool(is_bad(np.asarray(x, np.float32)).any())
        for x in values
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    )


def _inside(equation: Any, operands: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield (the operations inside of an equation, the values they get): of a loop, each turn's."""
    name, parameters = equation.primitive.name, equation.params
    if name == "scan":
        yield from _turns(parameters, operands)
        return
    for sub in parameters.values():
        consts = list(getattr(sub, "consts", ()))
        inner = getattr(sub, "jaxpr", sub)
        if hasattr(inner, "eqns") and len(inner.invars) == len(operands):
            yield inner, [*consts, *operands]


def _turns(parameters: Mapping[str, Any], operands: list[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Yield what each turn of a scan does, and the values it gets."""
    body = parameters["jaxpr"]
    if "ft_in" in parameters:  # of jax 0.12; before, two numbers
        constant, carried = (len(part) for part in parameters["ft_in"].unpack()[:2])
    else:
        constant, carried = parameters["num_consts"], parameters["num_carry"]
    fixed, carry = operands[:constant], operands[constant : constant + carried]
    length = parameters["length"]
    order = range(length)[::-1] if parameters["reverse"] else range(length)
    turn = jax.jit(core.jaxpr_as_fun(body))
    for index in order:
        values = [*fixed, *carry, *(x[index] for x in operands[constant + carried :])]
        yield body.jaxpr, [*body.consts, *values]
        carry = turn(*values)[:carried]


def _described(equation: Any) -> Operation:
    """Return an equation in words."""
    name, info = equation.primitive.name, equation.source_info
    shapes = ", ".join(v.aval.str_short() for v in equation.invars)
    results = ", ".join(v.aval.str_short() for v in equation.outvars)
    source = source_info_util.summarize(info)
    return Operation(name, str(info.name_stack), source, f"{shapes} -> {results}")
