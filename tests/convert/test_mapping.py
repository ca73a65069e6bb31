"""Each way undoes the other, by number, for every parameter of every architecture."""

import dataclasses

import numpy as np
import pytest

from lm import models, step
from lm.convert import architectures, mapping
from lm.convert.settings import Settings
from lm.stored import flatten


def config_of(fixture):
    architecture = architectures.architecture(fixture.config["model_type"])
    cls = models.config_class(architecture.FAMILY)
    return architecture, cls(**architecture.read(Settings(fixture.config, "config.json")))


def test_every_parameter_is_made_once_of_every_tensor_once(name, parity):
    fixture = parity(name)
    architecture, cfg = config_of(fixture)
    if hasattr(cfg, "mask"):
        cfg = dataclasses.replace(cfg, mask="segments")
    _, shapes = step.parameter_axes(models.build(cfg))
    parts = architecture.parts(cfg)
    made = {}
    for part in parts:
        made[part.ours] = part.join(*(fixture.weight[name] for name, _ in part.theirs))
        for (_, shape), theirs in zip(part.theirs, part.split(made[part.ours]), strict=True):
            assert theirs.shape == shape
    assert len(made) == len(parts)
    assert {n: a.shape for n, a in made.items()} == {n: s.shape for n, s in flatten(shapes).items()}
    used = [name for part in parts for name, _ in part.theirs]
    assert sorted(used) == sorted(fixture.weight)


def test_split_undoes_join(name, parity):
    fixture = parity(name)
    architecture, cfg = config_of(fixture)
    for part in architecture.parts(cfg):
        arrays = [fixture.weight[name] for name, _ in part.theirs]
        for before, after in zip(arrays, part.split(part.join(*arrays)), strict=True):
            np.testing.assert_array_equal(before[part.unused :], after[part.unused :])
            assert not after[: part.unused].any()


def test_what_is_written_is_read_as_the_same_config(name, parity):
    architecture, cfg = config_of(parity(name))
    written = Settings(architecture.write(cfg), "config.json")
    again = type(cfg)(**architecture.read(written))
    names = {field.name for field in dataclasses.fields(cfg)}
    derived = {name: size for name, size in cfg.sizes.items() if name in names}
    assert dataclasses.replace(again, **derived) == dataclasses.replace(cfg, **derived)


@pytest.mark.parametrize("model_dim", [6, 0])
def test_attention_groups_each_key_with_its_queries(model_dim):
    """By number: head h of six reads the keys of group h // 2."""
    K, width = 4, (model_dim,) if model_dim else ()
    q, k, v = (np.arange(n * K * max(model_dim, 1)).reshape(n * K, *width) for n in (6, 3, 3))
    q, k, v = q, k + 1000, v + 2000
    part = mapping.attention(
        "x", "qkv", model_dim=model_dim, num_heads=6, num_kv_heads=3, head_dim=K
    )
    ours = part.join(q, k, v)
    assert ours.shape == (*width, 3, 4, K)
    for group in range(3):
        for number, (theirs, head) in enumerate(
            ((q, 2 * group), (q, 2 * group + 1), (k, group), (v, group))
        ):
            rows = theirs[head * K : (head + 1) * K]
            np.testing.assert_array_equal(ours[..., group, number, :], rows.T)
