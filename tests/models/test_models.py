import pytest
from flax import linen as nn

from lm import models
from lm.config import ConfigError

SIZES = {"vocab_size": 50, "max_length": 16, "packed": True}


def config_of(name):
    return models.config_class(name)(num_layers=1, model_dim=16)


@pytest.mark.parametrize("name", models.names())
def test_every_file_of_the_folder_is_a_family(name):
    family = models.family(name)
    cfg = models.resolve(models.config_class(name)(), **SIZES)
    assert cfg.name == name and (cfg.vocab_size, cfg.max_length) == (50, 16)
    model = models.build(cfg, decode_length=7)
    assert isinstance(model, nn.Module) and isinstance(model, family.Model)
    assert model.decode_length == 7 and model.cfg == cfg
    assert model.accepts and model.learns in ("gradient", "counting") and model.max_context >= 0
    assert models.flops_per_token(cfg, 16) == family.flops_per_token(cfg, 16) > 0


def test_the_families_of_today_are_there():
    assert {"gpt", "rnn"} <= set(models.names())


@pytest.mark.parametrize(("name", "hint"), [("gpt1", "'gpt'"), ("", "gpt, "), ("../gpt", "gpt")])
def test_an_unknown_family_is_an_error_that_names_one(name, hint):
    with pytest.raises(ConfigError, match=r"model\.name=") as error:
        models.family(name)
    assert hint in str(error.value)


def test_sizes_that_are_given_are_kept_where_they_fit():
    cfg = models.config_class("gpt")(vocab_size=64, max_length=32, mask="causal")
    cfg = models.resolve(cfg, **SIZES)
    assert (cfg.vocab_size, cfg.max_length, cfg.mask) == (64, 32, "causal")


@pytest.mark.parametrize(("packed", "mask"), [(True, "segments"), (False, "causal")])
def test_the_mask_is_as_the_task_packs(packed, mask):
    cfg = models.resolve(models.config_class("gpt")(), **{**SIZES, "packed": packed})
    assert cfg.mask == mask


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"vocab_size": 49}, "model.vocab_size=49"), ({"max_length": 15}, "model.max_length=15")],
)
def test_sizes_that_do_not_fit_are_errors_that_name_the_field(fields, named):
    with pytest.raises(ConfigError, match=named):
        models.resolve(models.config_class("gpt")(**fields), **SIZES)
