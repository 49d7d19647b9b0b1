# SPDX-License-Identifier: Apache-2.0
"""Which backend is taken, and where each is refused."""

import importlib.util
import re
import types
import typing

import jax
import llvmlite
import llvmlite.binding as llvm
import pytest
from jax.experimental.pallas import tpu as pltpu

from jpaged.pallas_kernels import conformance, dispatch, versions
from jpaged.pallas_kernels.cpu import chip


class TestBackend:
    @pytest.fixture
    def asked_anew(self):
        """What CPUs get is found out once a process."""
        dispatch._backend_of_cpus.cache_clear()
        yield
        dispatch._backend_of_cpus.cache_clear()

    @pytest.fixture
    def without(self, monkeypatch, asked_anew):
        """Takes something away that CPU kernels need; they are refused for what it returns."""

        def take(what):
            if what == "llvmlite":
                find = importlib.util.find_spec
                monkeypatch.setattr(
                    importlib.util, "find_spec", lambda name: find(name) if name != what else None
                )
                return "it needs llvmlite, which `pip install 'jpaged[cpu]'` installs"
            if what == "posix":
                # Of the module alone: all of Python asks this.
                monkeypatch.setattr(chip, "os", types.SimpleNamespace(name="nt"))
                return "its kernels are for Linux and macOS, not for 'nt'"
            if what == "a new llvmlite":
                monkeypatch.setattr(llvmlite, "__version__", "0.45.1")
                return (
                    "llvmlite is 0.45.1, and must be 0.46 or newer; `pip install 'jpaged[cpu]'` "
                    "installs another"
                )
            if what == "a whole llvmlite":

                def import_module(name):
                    raise OSError("libstdc++.so.6 is missing")

                monkeypatch.setattr(
                    chip, "importlib", types.SimpleNamespace(
                        import_module=import_module, util=importlib.util
                    )
                )  # fmt: skip
                return (
                    "llvmlite cannot be imported (libstdc++.so.6 is missing); "
                    "`pip install 'jpaged[cpu]'` installs another"
                )
            monkeypatch.setattr(chip, "host_chip", lambda: None)
            return "its kernels are for processors with AVX2 and FMA, or with NEON"

        return take

    def test_cpus_get_kernels_of_their_own(self, asked_anew, caplog):
        assert jax.default_backend() == "cpu"
        with caplog.at_level("INFO", "jpaged"):
            assert dispatch.resolve_backend(None) == "cpu"
        assert not caplog.records
        assert dispatch.resolve_backend("cpu") == "cpu"
        assert dispatch.resolve_backend("xla") == "xla"

    @pytest.mark.parametrize(
        "what", ["llvmlite", "a new llvmlite", "a whole llvmlite", "posix", "processor"]
    )
    def test_cpus_get_the_xla_kernels_where_there_are_no_others(self, what, without, caplog):
        reason = without(what)
        with caplog.at_level("INFO", "jpaged"):
            assert [dispatch.resolve_backend(None) for _ in range(3)] == ["xla"] * 3
        (record,) = caplog.records  # once
        message = f"backend 'cpu' on platform 'cpu': {reason}; pass backend='xla'"
        assert record.levelname == ("INFO" if what == "llvmlite" else "WARNING")
        assert record.getMessage() == f"steps take longer, by backend 'xla': {message}"
        # Who asks for them is not given others.
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            dispatch.resolve_backend("cpu")
        assert dispatch.resolve_backend("xla") == "xla"

    @pytest.mark.parametrize("platform", ["gpu", "tpu"])
    def test_cpu_kernels_run_on_cpus(self, platform, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        message = (
            f"backend 'cpu' on platform {platform!r}: its kernels run on CPUs only; "
            "pass backend='xla'"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            dispatch.resolve_backend("cpu")
        assert dispatch.resolve_backend(None) == platform

    FEATURES: typing.ClassVar = {
        "avx512f avx2 fma": (16, "-prefer-256-bit"),
        "avx2 fma": (8, "+fma"),
        "neon": (4, "+neon"),
        "avx2": None,
        "avx sse4.2": None,
        "": None,
    }

    @pytest.mark.parametrize("features", FEATURES)
    def test_a_processor_is_known_by_its_features(self, features, monkeypatch):
        known = llvm.get_host_cpu_features()
        known.clear()
        known.update({name: True for name in features.split()} | {"avx512vl": False})
        monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: known)
        found = chip.host_chip.__wrapped__()
        if (want := self.FEATURES[features]) is None:
            assert found is None
            return
        lanes, last = want
        assert found.lanes == lanes and found.features.split(",")[-1] == last
        assert "-avx512vl" in found.features.split(",")
        # A register for each row and token of a tile, and beside those one for each row and one.
        registers = {16: 32, 8: 16, 4: 32}[lanes]
        assert found.rows * found.tokens + found.rows + 1 <= registers

    @pytest.mark.parametrize("machine", ["arm64", "aarch64", "x86_64"])
    def test_llvm_knows_no_features_of_apples(self, machine, monkeypatch):
        known = llvm.get_host_cpu_features()
        known.clear()
        monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: known)
        monkeypatch.setattr(chip.platform, "machine", lambda: machine)
        found = chip.host_chip.__wrapped__()
        assert found is None if machine == "x86_64" else found.lanes == 4

    @pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
    def test_gpu_kernels_run_on_gpus_or_interpreted(self, capability, monkeypatch):
        message = r"^backend 'gpu' on platform 'cpu': .*interpret_gpu\(\)$"
        with pytest.raises(ValueError, match=message):
            dispatch.resolve_backend("gpu")
        if capability < (9, 0) or versions.interprets_mosaic():
            with conformance.interpret_gpu(capability):
                assert dispatch.resolve_backend("gpu") == "gpu"
        with pytest.raises(ValueError, match=message):
            dispatch.resolve_backend("gpu")
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        assert dispatch.resolve_backend(None) == "gpu"

    def test_tpu_kernels_run_on_tpus_or_interpreted(self, monkeypatch):
        message = r"^backend 'tpu' on platform 'cpu': .*force_tpu_interpret_mode\(\)$"
        with pytest.raises(ValueError, match=message):
            dispatch.resolve_backend("tpu")
        with pltpu.force_tpu_interpret_mode():
            assert dispatch.resolve_backend("tpu") == "tpu"
        with pytest.raises(ValueError, match=message):
            dispatch.resolve_backend("tpu")
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
        assert dispatch.resolve_backend(None) == "tpu"

    @pytest.mark.parametrize("backend", ["XLA", "CPU", "cuda", "triton", ""])
    def test_unknown_name(self, backend):
        known = "('tpu', 'gpu', 'cpu', 'xla')"
        message = f"backend={backend!r} on platform 'cpu': choose one of {known}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            dispatch.resolve_backend(backend)

    def test_unknown_platform(self, monkeypatch):
        monkeypatch.setattr(jax, "default_backend", lambda: "neuron")
        with pytest.raises(ValueError, match=r"^backend=None on platform 'neuron': choose one of"):
            dispatch.resolve_backend(None)
        assert dispatch.resolve_backend("xla") == "xla"
