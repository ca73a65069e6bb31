"""Prose and code that every Python carries: the documents of the embedded sources.

One function a source; each yields its documents in the same order every time. They read the standard
library's files with `ast` and never import them: importing runs code.
"""

import ast
import functools
import itertools
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.util import decode_source
from pathlib import Path, PurePosixPath

from lm.data.documents import Document, Reading, whole

_EXCLUDED = {
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"),
    *("site-packages", "dist-packages"),
}
_MIN_DOCSTRING = 40  # characters; shorter ones ("See above.") teach nothing
_MAX_SUMMARY = 200  # characters; a longer first paragraph is no summary


def python_docs(files: Iterable[Path]) -> Iterator[Document]:
    """Yield the language reference's topics, then a document of docstrings for each module.

    A docstring stands below its dotted name. Repeats are dropped: a docstring seen before, and a
    topic of which a longer one holds more than half (the reference nests its sections).
    """
    seen: set[str] = set()
    yield from map(whole, _unique_topics(library_folder() / "pydoc_data" / "topics.py", seen))
    for file in files:
        tree = _parsed(file)[1]
        parts = []
        for name, docstring in _docstrings(tree, _module(file)) if tree else ():
            if len(docstring) >= _MIN_DOCSTRING and docstring not in seen:
                seen.add(docstring)
                parts.append(f"{name}\n\n{docstring}")
        if parts:
            yield whole("\n\n\n".join(parts) + "\n")


def python_source(files: Iterable[Path]) -> Iterator[Document]:
    """Yield every file that is valid Python, `pydoc_data.topics` (prose in quotes) left out."""
    for file in files:
        source, tree = _parsed(file)
        if tree and _module(file) != "pydoc_data.topics":
            yield whole(source)


def python_pairs(files: Iterable[Path]) -> Iterator[Document]:
    """Yield a docstring's body, and the summary that its first paragraph is; repeats are dropped."""
    seen: set[str] = set()
    for file in files:
        tree = _parsed(file)[1]
        for _, docstring in _docstrings(tree, "") if tree else ():
            summary, _, body = docstring.partition("\n\n")
            summary = " ".join(summary.split())
            if len(body) >= _MIN_DOCSTRING and len(summary) <= _MAX_SUMMARY and body not in seen:
                seen.add(body)
                document = whole(body.strip())
                yield document._replace(second=whole(summary).text)


def read(name: str, start: int, reading: Reading) -> Iterator[Document]:
    """Yield the documents of an embedded source from number `start` on."""
    yield from itertools.islice(_kept(name, tuple(library_files())), start, None)


# Kept, because the corpora are small and parsing takes seconds.
@functools.lru_cache(maxsize=1)
def _kept(name: str, files: tuple[Path, ...]) -> tuple[Document, ...]:
    return tuple(_READERS[name](files))


def library_folder() -> Path:
    """Return the folder of this Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def library_files() -> list[Path]:
    """Return the standard library's files without its tests, in an order of names alone."""
    root = library_folder()
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - _EXCLUDED
        # _sysconfigdata is this machine's build settings: no text, and different everywhere.
        python = (f for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))
        names += [PurePosixPath(Path(folder, file).relative_to(root).as_posix()) for file in python]
    return [root / name for name in sorted(names)]


def _module(file: Path) -> str:
    parts = file.relative_to(library_folder()).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and parts[1:] else parts)


def _parsed(file: Path) -> tuple[str, ast.Module | None]:
    """Return a file's text and its tree; None where it is not valid Python (templates)."""
    try:
        source = decode_source(file.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            return source, ast.parse(source)
    except (SyntaxError, ValueError):
        return "", None


def _unique_topics(file: Path, seen: set[str]) -> list[str]:
    """Return the topics in order of name, repeats left out; their paragraphs go into `seen`."""
    tree = _parsed(file)[1] if file.exists() else None
    dicts = [node for node in ast.walk(tree) if isinstance(node, ast.Dict)] if tree else []
    topics = {key: value for node in dicts for key, value in ast.literal_eval(node).items()}
    unique = {}
    for name, topic in sorted(topics.items(), key=lambda item: (-len(item[1]), item[0])):
        paragraphs = [part for part in topic.split("\n\n") if len(part) >= _MIN_DOCSTRING]
        repeated = sum(len(part) for part in paragraphs if part in seen)
        if 2 * repeated <= sum(len(part) for part in paragraphs):
            unique[name] = topic
        seen.update(paragraphs)
    return [unique[name] for name in sorted(unique)]


def _docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, docstring) of a module, class or function and of those inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
        docstring := ast.get_docstring(node)
    ):
        yield name, docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child, name)


_READERS: dict[str, Callable[[Iterable[Path]], Iterator[Document]]] = {
    "python_docs": python_docs,
    "python_source": python_source,
    "python_pairs": python_pairs,
}
NAMES = tuple(_READERS)
