"""Architectures of Hugging Face folders. The folder is the registry: `<model_type>.py` exports

- `FAMILY`, the family of `lm.models` that it is;
- `CLASSES`: the classes of config.json's `architectures` that can be read, the first of them written;
- `PREFIX`: what names of tensors begin with, but for a model saved without its head ("" = nothing);
- `ALIASES`: (old, new) ends of names of tensors;
- `FREE`: fields of `Config` that do not belong to the architecture;
- `task(cfg) -> dict`: fields of the section `task` of the run that is made;
- `read(settings) -> dict`: fields of the family's `Config`, from a `lm.convert.settings.Settings`;
- `write(cfg) -> dict`: config.json's settings for a frozen `Config`. That `read` gives the same config
  again is checked by the caller, so nothing is refused there;
- `parts(cfg) -> list[Part]`: every parameter, each made of tensors of theirs (`lm.convert.mapping`);
- `copies(cfg) -> dict`: tensors that some files have besides, by the name of the one that they equal;
- `constants(cfg) -> dict`: tensors that some files have besides, by name -> `Constant`;
- `spare(cfg) -> dict`: tensors that some files have besides and the model does not use, by name -> shape.

`tests/convert` tries all of this on every file of the folder, against the fixtures of its name.
"""

import importlib
import pkgutil
from typing import Any


def names() -> list[str]:
    """Return the known values of config.json's `model_type`, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def architecture(name: str) -> Any:
    """Return the module of one of `names()`."""
    return importlib.import_module(f"{__name__}.{name}")


def current_name(architecture: Any, tensor: str, *, bare: bool) -> str:
    """Return the name that `parts` and the others have for a tensor of a file.

    `bare`: the file is of a model without its head, whose names lack the prefix.
    """
    for old, new in architecture.ALIASES:
        if tensor.endswith(old):
            tensor = tensor.removesuffix(old) + new
    return f"{architecture.PREFIX}{tensor}" if bare else tensor
