# SPDX-License-Identifier: Apache-2.0
"""How tensors of GGUF files are read: beside each other, in their memory alone, and to no end."""

import gc
import threading
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.models import gguf_file, gguf_model
from jpaged.models.gguf_file import GgufFile
from jpaged.models.gguf_model import GgufWeights, config_of
from jpaged.models.stored_tensor import CheckpointError
from tests import gguf_files
from tests.gguf_files import Q8_0

CASE = "llama_linear_rope_mqa"
WAITING = 3


class Parts:
    """Stands in the way of the threads that read parts of a file.

    Attributes:
      offsets: where the parts lie that were begun.
      hold: how many are let through; the others wait for `go`.
      error: what the next ones end with.
    """

    def __init__(self, monkeypatch, hold):
        self.offsets, self.hold, self.error = [], hold, None
        self.go, self.reached = threading.Event(), threading.Event()
        self._read = gguf_file.os.pread
        monkeypatch.setattr(gguf_file.os, "pread", self._wait_and_read)

    def _wait_and_read(self, descriptor, size, offset):
        self.offsets.append(offset)
        if len(self.offsets) > self.hold:
            self.reached.set()
            assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return self._read(descriptor, size, offset)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """Makes the weights of a file that so many threads read, each parameter in one part."""

    def make(num_threads):
        monkeypatch.setattr(gguf_file, "MOST_THREADS", num_threads)
        monkeypatch.setattr(gguf_model, "_MOST_WAITING", WAITING)
        file = GgufFile(gguf_files.write_case(tmp_path / "model.gguf", CASE))
        return file, GgufWeights(file, config_of(file))

    return make


def begin(weights, with_places):
    """Begins to read what needs no view of it; returns the iterator, and where each has its place.

    Those without a place go to the device.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    paths = [path for path in weights.shapes if "q_proj" not in path and "k_proj" not in path]
    targets = {
        path: jax.ShapeDtypeStruct(weights.shapes[path], np.float32, sharding=device)
        for path in paths
    }
    places = {path: np.zeros(weights.shapes[path], np.float32) for path in paths}
    return weights.read(targets, places.get if with_places else lambda path: None), places


@pytest.mark.parametrize("with_places", [True, False])
def test_what_has_a_place_is_read_beside_others_and_nothing_else(weights, monkeypatch, with_places):
    """Without one, it would lie in memory beside the model until its turn comes."""
    file, weights = weights(num_threads=2)
    parts = Parts(monkeypatch, hold=0)
    read, places = begin(weights, with_places)
    found = []
    reader = threading.Thread(target=lambda: found.extend(read), daemon=True)
    reader.start()
    assert parts.reached.wait(60)
    # The first part waits; a part of another parameter begins, or has none to begin.
    for _ in range(100):
        if len(parts.offsets) == 2:
            break
        threading.Event().wait(0.005)
    assert len(parts.offsets) == (2 if with_places else 1)
    parts.go.set()
    reader.join(60)
    assert [path for path, _ in found] == list(places)
    assert all((array is places[path]) == with_places for path, array in found)
    for path, array in found:
        want = file.read(weights._sources[path].names[0], np.dtype(np.float32))
        np.testing.assert_array_equal(array, want.reshape(array.shape))


def test_so_many_are_begun(weights, monkeypatch):
    _, weights = weights(num_threads=1)
    begun, most, real = 0, 0, GgufFile.begin

    def counted(*args):
        nonlocal begun
        begun += 1
        return real(*args)

    monkeypatch.setattr(GgufFile, "begin", counted)
    read, places = begin(weights, with_places=True)
    for number, _ in enumerate(read, 1):
        most = max(most, begun - number)
    assert most == WAITING and begun == len(places)


def test_a_reader_that_is_closed_leaves_what_is_not_begun(weights, monkeypatch):
    file, weights = weights(num_threads=1)
    parts = Parts(monkeypatch, hold=1)
    read, _ = begin(weights, with_places=True)
    next(read)
    read.close()
    parts.go.set()
    file._threads.shutdown(wait=True)
    assert len(parts.offsets) <= 2


def test_an_error_leaves_what_is_not_begun(weights, monkeypatch):
    file, weights = weights(num_threads=1)
    monkeypatch.setattr(gguf_file, "_CHUNK", 32)  # so that a parameter has many parts
    parts = Parts(monkeypatch, hold=1)
    parts.error = OSError("the disk is gone")
    read, _ = begin(weights, with_places=True)
    with pytest.raises(CheckpointError, match=r"tensor .* cannot be read: the disk is gone"):
        next(read)
    parts.go.set()
    file._threads.shutdown(wait=True)
    assert len(parts.offsets) <= 2


def test_an_error_keeps_nothing_in_memory(weights, monkeypatch):
    _, weights = weights(num_threads=1)
    monkeypatch.setattr(gguf_file, "is_finite", lambda part: False)
    read, places = begin(weights, with_places=True)
    watched = [weakref.ref(place) for place in places.values()]
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            list(read)
        del read, places
        weights._file._threads.shutdown(wait=True)
        assert not any(place() is not None for place in watched)
    finally:
        gc.enable()


def test_memory_is_that_of_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "MOST_THREADS", 2)
    config, _ = gguf_files.recorded(CASE)
    large = {"large.weight": np.ones((12288, 1024), np.float32)}
    path = tmp_path / "model.gguf"
    gguf_files.write(path, gguf_files.metadata_of(config), large, Q8_0)
    file = GgufFile(path)
    tracemalloc.start()
    try:
        weights = file.read("large.weight", jnp.dtype(jnp.bfloat16))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    taken = jnp.asarray(weights, jnp.bfloat16)
    assert taken.unsafe_buffer_pointer() == weights.ctypes.data
    # Whole, it takes 146 MiB beside.
    assert weights.nbytes < peak < weights.nbytes + 2 * 14 * 2**20
