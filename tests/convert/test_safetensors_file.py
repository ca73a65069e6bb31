"""What is read is checked first: every lie that a header can tell is one line that names it."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as library
from safetensors import safe_open

from lm.config import ConfigError
from lm.convert import safetensors_file
from lm.convert.safetensors_file import DTYPES, Entry


def arrays():
    """One array of every type, in no order, with shapes of 0 to 3 axes."""
    rng = np.random.default_rng(0)
    shapes = [(), (3,), (2, 3), (0, 4), (2, 1, 5)]
    return {
        f"{name}/é {number}": rng.integers(0, 2, shapes[(number + axis) % 5]).astype(dtype)
        for axis, (name, dtype) in enumerate(DTYPES.items())
        for number in (1, 0)
    }


def header(entries, data=b"", *, length=None):
    """Return a file of this header (an object, or bytes as they are) and data."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"z": "1", "a": "é\n", "k": ""}])
def test_what_the_library_wrote_is_read_and_written_again_bit_for_bit(tmp_path, metadata):
    """The library orders metadata of several keys by chance: ours keeps the order that it finds."""
    path, again = tmp_path / "theirs", tmp_path / "ours"
    path.write_bytes(library.save(arrays(), metadata))
    checked = safetensors_file.read_header(path)
    assert checked.metadata == metadata
    found = dict(safetensors_file.read(path, checked.entries))
    assert found.keys() == arrays().keys()
    for name, array in arrays().items():
        assert checked.entries[name].dtype == safetensors_file.dtype_name(array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name
    safetensors_file.write(again, found, order=list(checked.entries), metadata=checked.metadata)
    assert again.read_bytes() == path.read_bytes()
    assert list(checked.entries) == safetensors_file.standard_order(arrays())


def test_what_we_wrote_is_read_by_the_library(tmp_path):
    path = tmp_path / "ours"
    safetensors_file.write(path, arrays(), order=list(arrays()), metadata={"a": "b"})
    with safe_open(path, "np") as file:
        assert file.metadata() == {"a": "b"}
        for name, array in arrays().items():
            assert file.get_tensor(name).tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_all_numbers_of_16_bits_are_exact_in_float32(tmp_path, dtype):
    path, numbers = tmp_path / "x", np.arange(1 << 16, dtype=np.uint16).view(dtype)
    safetensors_file.write(path, {"x": numbers}, order=["x"], metadata=None)
    ((_, found),) = safetensors_file.read(path, safetensors_file.read_header(path).entries)
    assert found.tobytes() == numbers.tobytes()
    wide = found.astype(np.float32)
    nan = np.isnan(wide)
    np.testing.assert_array_equal(
        wide[~nan].astype(dtype).view(np.uint16), numbers[~nan].view(np.uint16)
    )


TWO = {"a": entry(), "b": entry(offsets=(8, 16))}
LONG_SHAPE = b'{"a": {"dtype": "F32", "shape": [%s, %s], "data_offsets": [0, 8]}}' % (
    2 * (b"9" * 4000,)
)
MANY = b"{" + b",".join(b'"%d":{}' % i for i in range(100_000)) + b"}"
BAD = {
    "empty": (b"", "0 bytes are no safetensors file"),
    "short": (b"1234567", "7 bytes are no safetensors file"),
    "length bomb": (header({}, length=2**63), "header would take 9,223,372,036,854,775,808 bytes"),
    "length past the end": (header({}, length=3), "header would take 3 bytes, and the file has 10"),
    "long header": (header(b"{" + b" " * (32 << 20) + b"}"), "at most 33,554,432 are read"),
    "not JSON": (header(b"{'a': 1}"), "not JSON"),
    "not UTF-8": (header(b'{"\xff": 1}'), "not JSON"),
    "deep JSON": (header(b"[" * 200_000), "not JSON"),
    "deep value": (header(b'{"a":' * 200_000), "not JSON"),
    "huge number": (header(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
    "list": (header([1]), "not a JSON object"),
    "name twice": (header(b'{"a": 1, "a": 2}'), "a name comes twice"),
    "100k entries": (header(MANY), "it names 100,000 tensors"),
    "metadata": (header({"__metadata__": {"a": 1}}), "__metadata__ is not an object of texts"),
    "entry": (header({"a": [1]}), "tensor 'a' has not just dtype"),
    "entry with more": (header({"a": {**entry(), "x": 1}}, bytes(8)), "tensor 'a' has not just"),
    "unknown type": (header({"a": entry("F8_E4M3")}, bytes(8)), "the type 'F8_E4M3'; known are U64"),
    "type of no text": (header({"a": entry([])}, bytes(8)), "tensor 'a' has the type []"),
    "negative shape": (header({"a": entry(shape=(-2,))}, bytes(8)), "the shape [-2]"),
    "fraction": (header({"a": entry(shape=(2.0,))}, bytes(8)), "the shape [2.0]"),
    "truth": (header({"a": entry(shape=(True, 2))}, bytes(8)), "the shape [True, 2]"),
    "shape of no list": (header({"a": {**entry(), "shape": 2}}, bytes(8)), "the shape 2"),
    "many axes": (header({"a": entry(shape=(1,) * 16 + (2,))}, bytes(8)), "the shape [1, 1"),
    "negative offset": (header({"a": entry(offsets=(-8, 0))}, bytes(8)), "data_offsets [-8, 0]"),
    "backwards": (header({"a": entry(offsets=(8, 0))}, bytes(8)), "data_offsets [8, 0]"),
    "one offset": (header({"a": entry(offsets=(8,))}, bytes(8)), "data_offsets [8]"),
    "byte count": (header({"a": entry(shape=(3,))}, bytes(8)), "takes 12 bytes, not 8"),
    "shape of 4,000 digits": (header(LONG_SHAPE, bytes(8)), "the shape [999"),
    "wide shape": (header({"a": entry(shape=(2**62, 2**62))}, bytes(8)), "the shape [46116860184"),
    "wide shape of nothing": (header({"a": entry(shape=(0, 2**62), offsets=(0, 0))}), "the shape [0, 46116"),
    "out of the file": (header({"a": entry()}, bytes(7)), "tensor 'a' ends at 8, and the file's data at 7"),
    "far out": (header({"a": entry(shape=(2**40,), offsets=(0, 2**42))}), "'a' ends at 4,398,"),
    "overlap": (header({**TWO, "b": entry(offsets=(4, 12))}, bytes(16)), "'b' overlaps"),
    "same place": (header({**TWO, "b": entry()}, bytes(8)), "'b' overlaps"),
    "gap": (header({**TWO, "b": entry(offsets=(12, 20))}, bytes(20)), "'b' leaves a gap"),
    "gap at the start": (header({"a": entry(offsets=(8, 16))}, bytes(16)), "'a' leaves a gap"),
    "more data": (header(TWO, bytes(17)), "tensors end at 16, and the file's data at 17"),
    "hostile name": (header({"a\n\x1b[2J" * 99: [1]}), "tensor 'a\\n\\x1b[2Ja\\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_hostile_header_is_one_line_that_names_what_is_wrong(tmp_path, case):
    content, words = BAD[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        safetensors_file.read_header(path)
    message = str(caught.value)
    assert words in message and str(path) in message
    assert message.isprintable() and len(message) < 500


def test_a_small_header_is_fine(tmp_path):
    """So that the cases above fail for their own reason."""
    path = tmp_path / "x"
    path.write_bytes(header(TWO, bytes(16)))
    entries = safetensors_file.read_header(path).entries
    assert entries == {"a": Entry("F32", (2,), 0, 8), "b": Entry("F32", (2,), 8, 16)}


def test_every_truncation_is_refused(tmp_path):
    path, whole = tmp_path / "x", header(TWO, bytes(16))
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError):
            safetensors_file.read_header(path)


@given(
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4)
)
@settings(max_examples=300, deadline=None)
def test_what_passes_the_check_is_what_the_library_reads(tmp_path_factory, changes):
    """Bytes changed at random: refused by us, or the library agrees on every shape and type."""
    content = bytearray(header(TWO, bytes(16)))
    for place, byte in changes:
        content[place % len(content)] = byte
    path = tmp_path_factory.mktemp("fuzz") / "x"
    path.write_bytes(content)
    try:
        checked = safetensors_file.read_header(path)
    except ConfigError as error:
        assert str(error).isprintable()
        return
    for name, array in safetensors_file.read(path, checked.entries):
        assert array.shape == checked.entries[name].shape
        assert array.dtype == DTYPES[checked.entries[name].dtype]


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-0, 4]}}',
        b'{"__metadata__": {"a": "\\ud800"}}',
    ],
)
def test_what_the_library_refuses_is_one_line_too(tmp_path, text):
    (tmp_path / "x").write_bytes(header(text, bytes(4 if b"F32" in text else 0)))
    safetensors_file.read_header(tmp_path / "x")
    with pytest.raises(ConfigError, match=r"x: .*; get the file again"):
        list(safetensors_file.read(tmp_path / "x", ["a"]))
