"""A Hugging Face folder: config.json, and tensors in one or more files. Nothing of it is unpickled or run."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import ConfigError
from lm.convert import safetensors_file
from lm.convert.safetensors_file import Entry, Header, shown
from lm.data import external

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
MAX_FILES = 1000
MAX_BESIDE = external.MAX_BYTES  # bytes of all other files that a run keeps
# What belongs to a model besides its weights, and is small.
BESIDE = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
)


class Folder:
    """An opened folder: every header is checked, and nothing else is read yet.

    Attributes:
      config: config.json's object.
      headers: of each file, by its name.
      entries: of each tensor, by its name.
    """

    def __init__(self, path: Path):
        if not path.is_dir():
            raise ConfigError(
                f"--from {path}: no such folder; give a Hugging Face folder or a run's"
            )
        self.path = path
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"--from {path}: neither a Hugging Face folder (no config.json) nor a run's (no "
                "checkpoints); give one"
            )
        self.config = external.read_object(path / "config.json")
        files = self._files()
        self.headers: dict[str, Header] = {
            name: safetensors_file.read_header(path / name) for name in files
        }
        self.entries: dict[str, Entry] = {}
        self._file_of: dict[str, str] = {}
        for file, header in self.headers.items():
            for name, entry in header.entries.items():
                if name in self.entries:
                    raise ConfigError(
                        f"{path / file}: tensor {shown(name)} is in {self._file_of[name]} too; get the "
                        "folder again from where it came from"
                    )
                self.entries[name], self._file_of[name] = entry, file

    def _files(self) -> list[str]:
        """Return the names of the files with tensors, in order."""
        if (self.path / WEIGHTS).is_file():
            return [WEIGHTS]
        if (self.path / INDEX).is_file():
            return self._files_of_index()
        for pattern in PICKLED:
            for file in sorted(self.path.glob(pattern)):
                if not file.name.startswith("tok"):  # llama2.c's tokenizer
                    raise ConfigError(
                        f"{file}: weights are read from safetensors only, as a pickle can run code; where "
                        "you trust the file, make them with AutoModel.from_pretrained(FOLDER)"
                        ".save_pretrained(FOLDER)"
                    )
        raise ConfigError(f"--from {self.path}: no {WEIGHTS} and no {INDEX}; get them too")

    def _files_of_index(self) -> list[str]:
        place = self.path / INDEX
        weight_map = external.read_object(place).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{place}: it has no weight_map; get the file again")
        files: dict[str, None] = {}
        for name, file in weight_map.items():
            plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
            if not plain or not file.endswith(".safetensors"):
                raise ConfigError(
                    f"{place}: tensor {shown(name)} is said to be in {shown(file)}, which is no "
                    "safetensors file of this folder; get the folder again"
                )
            files[file] = None
        if len(files) > MAX_FILES:
            raise ConfigError(f"{place}: it names {len(files)} files; at most {MAX_FILES} are read")
        for file in files:
            if not (self.path / file).is_file():
                raise ConfigError(f"{self.path / file}: missing, and {INDEX} names it; get it too")
        return sorted(files)

    @property
    def where(self) -> str:
        """The name for errors about the tensors of the folder."""
        return str(self.path / (WEIGHTS if WEIGHTS in self.headers else INDEX))

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, array) of tensors, file by file."""
        wanted = set(names)
        for file, header in self.headers.items():
            here = [name for name in header.entries if name in wanted]
            yield from safetensors_file.read(self.path / file, here)

    def layout(self, renamed: Mapping[str, str]) -> dict[str, Any]:
        """Return what it takes to write the same files again from the same numbers.

        Of each tensor its name, its type, and the name that `renamed` has for it.
        """
        return {
            file: {
                "metadata": header.metadata,
                "tensors": [
                    [name, entry.dtype, renamed[name]] for name, entry in header.entries.items()
                ],
            }
            for file, header in self.headers.items()
        }

    def beside(self) -> tuple[list[Path], list[str]]:
        """Return the other files of the model, MAX_BESIDE bytes at most, and the names of all the rest."""
        kept, room = [], MAX_BESIDE
        for file in [*(self.path / name for name in BESIDE), *sorted(self.path.glob("tok*.bin"))]:
            if file.is_file() and file.stat().st_size <= room:
                kept.append(file)
                room -= file.stat().st_size
        taken = {*self.headers, *(file.name for file in kept)}
        return kept, sorted(file.name for file in self.path.iterdir() if file.name not in taken)
