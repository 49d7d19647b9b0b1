# SPDX-License-Identifier: Apache-2.0
"""Wrong inputs at the doors of safetensors and their index.

Each is refused with one bounded line, in bounded time, or loads as documented; nothing else is ever
raised.
"""

import json
import pathlib
import random
import re
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jpaged.models import checkpoint
from jpaged.models.checkpoint import CheckpointError
from jpaged.models.families.base import stored_as
from jpaged.models.json_fields import ModelConfigError

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def make_tensors(seed=0):
    """The weights that CONFIG asks for, by hand."""
    shapes = {
        "embedding": (16, 8),
        "final_norm/scale": (8,),
        "lm_head": (16, 8),
        "layers_0/attention_norm/scale": (8,),
        "layers_0/attention/q_proj/weight": (8, 8),
        "layers_0/attention/k_proj/weight": (4, 8),
        "layers_0/attention/v_proj/weight": (4, 8),
        "layers_0/attention/o_proj/weight": (8, 8),
        "layers_0/mlp_norm/scale": (8,),
        "layers_0/mlp/gate_proj/weight": (8, 8),
        "layers_0/mlp/up_proj/weight": (8, 8),
        "layers_0/mlp/down_proj/weight": (8, 8),
    }
    rng = np.random.default_rng(seed)
    return {
        stored_as(path, shape).names[0]: rng.normal(size=shape).astype(np.float32)
        for path, shape in shapes.items()
    }


TENSORS = make_tensors()
NAMES = sorted(TENSORS)
CONTENT = safetensors.numpy.save(TENSORS, metadata={"format": "pt"})
HEADER_BYTES = struct.unpack("<Q", CONTENT[:8])[0]
HEADER = json.loads(CONTENT[8 : 8 + HEADER_BYTES])
DATA = CONTENT[8 + HEADER_BYTES :]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def with_header(header, data=DATA):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def outcome(directory):
    """None if it loaded, and the message of the error otherwise."""
    start = time.perf_counter()
    try:
        _, params = checkpoint.load(directory, jnp.float32)
    except (CheckpointError, ModelConfigError, FileNotFoundError) as e:
        message = str(e)
        assert message.isprintable() and len(message) < 4000, message[:8000]
        assert str(directory) in message or re.search(r"safetensors|config\.json", message)
        return message
    finally:
        assert time.perf_counter() - start < 10
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == sum(
        tensor.size for tensor in TENSORS.values()
    )
    return None


def refused(directory, content, part=""):
    (directory / "model.safetensors").write_bytes(content)
    message = outcome(directory)
    assert message is not None and part in message, message
    return message


def test_undamaged(directory):
    (directory / "model.safetensors").write_bytes(with_header(HEADER))
    assert outcome(directory) is None


def test_cut_short(directory):
    ends = [*range(0, 40), *range(40, len(CONTENT), len(CONTENT) // 60)]
    assert len(ends) >= 100
    for end in ends:
        refused(directory, CONTENT[:end], "is damaged or truncated")


def test_length_of_the_header(directory):
    for length in (0, 1, 2, HEADER_BYTES - 1, HEADER_BYTES + 1, len(CONTENT), 10**8, 2**31, 2**63):
        for off in (0, 1, -1):
            if length + off not in (-1, HEADER_BYTES):
                refused(directory, struct.pack("<Q", length + off) + CONTENT[8:], "damaged")


# What a tensor's entry is given, and what the message says (any error, where nothing).
ENTRIES = [
    *(({"dtype": dtype}, "") for dtype in ("", "f32", "F31", 5, None, ["F32"], "F" * 10**5)),
    *(({"dtype": dtype}, "damaged") for dtype in ("I8", "U8", "F64", "BOOL", "BF16", "C64")),
    *(({"shape": shape}, "") for shape in ([], [1], [0], [-1, 8], [8, -8], [2**63], [2**64])),
    *(({"shape": shape}, "") for shape in ([2**32, 2**32], [2**62, 4], "8", [8.0], [[8]], None)),
    *(({"shape": shape}, "") for shape in ({"a": 8}, [True], ["8"], [1] * 10**4, 8)),
    *(({"data_offsets": offsets}, "") for offsets in ([0, 0], [4, 0], [-4, 0], [0, 2**63], [0])),
    *(({"data_offsets": offsets}, "") for offsets in (None, "0", [0, 10**4], [0, 2**64], [1, 33])),
    ({"extra": 1}, None),
]


@pytest.mark.parametrize("name", [NAMES[0], NAMES[5], NAMES[-1]])
def test_entries_of_the_header(directory, name):
    for change, part in ENTRIES:
        content = with_header(HEADER | {name: HEADER[name] | change})
        if part is None:
            (directory / "model.safetensors").write_bytes(content)
            outcome(directory)
        else:
            refused(directory, content, part)
    for entry in (None, 5, "x", [], {}, {"dtype": "F32"}, {"shape": [8]}):
        refused(directory, with_header(HEADER | {name: entry}), "damaged")


def test_headers_that_are_none(directory):
    for header in (b"", b"{", b"[]", b"null", b"{}", b"5", b'"x"', b"[" * 10**5, b"\xff" * 50):
        refused(directory, with_header(header))
        refused(directory, with_header(header, b""))
    for metadata in (5, "x", [1], {"format": 5}, {"a": {"b": "c"}}):
        refused(directory, with_header(HEADER | {"__metadata__": metadata}), "damaged")


def test_garbled_bytes(directory):
    """A changed byte of the header is found, or changes nothing that counts."""
    rng = random.Random(0)
    seen = {True: 0, False: 0}
    for _ in range(150):
        content = bytearray(CONTENT)
        for _ in range(rng.choice([1, 1, 3])):
            content[rng.randrange(8 + HEADER_BYTES)] = rng.randrange(256)
        (directory / "model.safetensors").write_bytes(content)
        seen[outcome(directory) is None] += 1
    assert seen[False] > 100


def test_two_tensors_on_the_same_bytes(directory):
    one, two = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
    refused(directory, with_header(HEADER | {one: HEADER[two]}), "damaged")


DTYPES = {
    np.int8: "I8",
    np.uint8: "U8",
    np.int16: "I16",
    np.uint16: "U16",
    np.int32: "I32",
    np.uint32: "U32",
    np.int64: "I64",
    np.uint64: "U64",
    np.bool_: "BOOL",
    np.float64: "F64",
    jnp.float8_e4m3fn: "F8_E4M3",
    jnp.float8_e5m2: "F8_E5M2",
    np.complex64: "C64",
}


def test_tensors(directory):
    """Missing, extra, of another name, dtype or shape."""
    file = directory / "model.safetensors"

    def saved(tensors):
        safetensors.numpy.save_file(tensors, file)
        return outcome(directory)

    for name in NAMES:
        rest = {other: tensor for other, tensor in TENSORS.items() if other != name}
        assert f"missing {name!r}" in saved(rest)
        for new in (name + "x", name.upper(), f"base.{name}", "x" + name, "é" * 300, "a\nb"):
            message = saved(rest | {new: TENSORS[name]})
            assert f"missing {name!r}" in message and "unexpected" in message
        for tensor in (TENSORS[name][:-1], TENSORS[name][None], TENSORS[name].ravel()[:1], 1.0):
            message = saved(TENSORS | {name: np.array(tensor, np.float32)})
            assert f"{name!r} has shape" in message
    for name in (NAMES[0], NAMES[5]):
        for dtype, said in DTYPES.items():
            message = saved(TENSORS | {name: TENSORS[name].astype(dtype)})
            assert f"tensor {name!r} has dtype {said}; supported: F32, F16, BF16" in message
    layer = "model.layers.{}.mlp.up_proj.weight"
    for number in (1, 99, 10**8, 10**30, -1, "", "00", "x", "0.0", "1e9"):
        assert "unexpected" in saved(TENSORS | {layer.format(number): np.zeros((8, 8), "f4")})
    many = {f"model.layers.{i}.q{j}": np.zeros(1, "f4") for i in range(100) for j in range(30)}
    assert "and 2992 more" in saved(TENSORS | many)
    assert "unexpected" in saved(TENSORS | {"q" * 10**5: np.zeros(1, "f4")})


def split(directory):
    """Two files and their index, as a dict."""
    halves = {ONE: NAMES[:6], TWO: NAMES[6:]}
    for file, names in halves.items():
        safetensors.numpy.save_file({name: TENSORS[name] for name in names}, directory / file)
    return {name: file for file, names in halves.items() for name in names}


def test_index(directory):
    weight_map = split(directory)
    path = directory / INDEX

    def indexed(content):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return outcome(directory)

    assert indexed({"weight_map": weight_map}) is None
    assert indexed({"metadata": None, "weight_map": weight_map, "more": [1]}) is None
    text = json.dumps({"weight_map": weight_map})
    for end in range(0, len(text), len(text) // 50):
        assert "is not a safetensors index" in indexed(text[:end])
    for content in (5, None, [], "x", {}, [1], {"weight_map": None}, {"weight_map": {}}):
        assert "is not a safetensors index" in indexed(content)
    for value in ([], "x", 5, True, [[ONE]], dict.fromkeys(NAMES), {NAMES[0]: [ONE]}):
        assert "is not a safetensors index" in indexed({"weight_map": value})
    assert "nested too deeply" in indexed('{"weight_map":' * 10**5)
    assert "stands there twice" in indexed(text[:-2] + f', "{NAMES[0]}": "{TWO}"}}}}')
    wrong = [None, 5, True, 1.5, [ONE], {"a": ONE}, "", ".", "..", "/", "../" + ONE, "/etc/passwd"]
    wrong += ["a/../../" + ONE, str(directory / ".." / ONE), "absent.safetensors", "config.json"]
    wrong += [ONE + "\0", "\0", "\ud800.safetensors", "a" * 5000 + ".safetensors", "~/" + ONE]
    wrong += [
        ONE.upper(),
        ONE + " ",
        " " + ONE,
        ONE + "/",
        ONE + "/" + ONE,
        "a\nb.safetensors",
        TWO,
    ]
    for name in NAMES[:6:2]:
        for file in wrong:
            message = indexed({"weight_map": weight_map | {name: file}})
            assert message is not None, file
    for name in NAMES:
        rest = {other: file for other, file in weight_map.items() if other != name}
        assert f"missing {name!r}" in indexed({"weight_map": rest})
        message = indexed({"weight_map": rest | {name + "x": weight_map[name]}})
        assert f"missing {name + 'x'!r}, which {INDEX} says is in" in message
    # Other spellings of a file's name are that file.
    for spelt in ("./" + ONE, "a/../" + ONE):
        assert indexed({"weight_map": weight_map | {NAMES[0]: spelt}}) is None
    for special in (directory / ONE, path):
        kept = special.read_bytes()
        special.unlink()
        special.mkdir()
        assert outcome(directory) is not None
        special.rmdir()
        special.write_bytes(kept)
    for damage in (b"", b"x" * 100, (directory / ONE).read_bytes()[:-3]):
        (directory / ONE).write_bytes(damage)
        assert "is damaged or truncated" in indexed({"weight_map": weight_map})


def test_the_same_names_in_two_files(directory):
    """Without an index: of the same contents only."""
    split(directory)
    first = {name: TENSORS[name] for name in NAMES[:6]}
    second = {name: TENSORS[name] for name in NAMES[6:]}
    other = make_tensors(seed=1)
    for name in NAMES[:6]:
        safetensors.numpy.save_file(second | {name: TENSORS[name]}, directory / TWO)
        assert outcome(directory) is None
        for tensor in (other[name], first[name].astype("f2"), first[name].T[:1].copy()):
            safetensors.numpy.save_file(second | {name: tensor}, directory / TWO)
            message = outcome(directory)
            assert ONE in message and TWO in message and repr(name) in message


def test_files_that_are_none(directory):
    path = pathlib.Path(directory / "model.safetensors")
    path.mkdir()
    assert "not a file" in outcome(directory)
    path.rmdir()
    path.symlink_to(directory / "absent")
    assert "not a file" in outcome(directory)
    path.unlink()
    path.symlink_to(path)
    assert "not a file" in outcome(directory)
