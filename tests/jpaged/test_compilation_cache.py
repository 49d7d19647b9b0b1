# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept for the next process, where the user says, jax says, or by default."""

import logging
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from jpaged.device import compilation_cache
from jpaged.device.compilation_cache import keep_programs
from tests.scripts.programs import environment

ROOT = pathlib.Path(__file__).parents[2]
# Prints cache misses and hits of an engine's first answer.
ANSWER = """
import sys, jax
from jpaged import Engine, EngineConfig, SamplingParams
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
config = dict(num_pages=16, max_num_seqs=2, max_num_batched_tokens=8, deterministic=True)
if len(sys.argv) > 1:
    config["compilation_cache_dir"] = sys.argv[1]
engine = Engine.load("demo", EngineConfig(**config))
engine.generate(["Once"], SamplingParams(max_tokens=2))
print(*(sum(e.endswith(what) for e in seen) for what in ("cache_misses", "cache_hits")))
"""


def answer(home, *arguments, **env):
    own = {k: v for k, v in environment().items() if not k.startswith(("JAX_COMPIL", "JAX_PERSIS"))}
    done = subprocess.run(
        [sys.executable, "-c", ANSWER, *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env=own | {"HOME": str(home)} | env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return tuple(map(int, done.stdout.split()))


@pytest.mark.slow
def test_the_next_process_compiles_nothing(tmp_path):
    misses, hits = answer(tmp_path)
    assert misses >= 4 and hits == 0
    assert any((tmp_path / ".cache" / "jpaged" / "xla").iterdir())
    assert answer(tmp_path) == (0, misses)


@pytest.mark.slow
def test_jaxs_own_setting_counts_and_none_at_all(tmp_path):
    own = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")}
    misses, _ = answer(tmp_path, **own)
    assert misses and any((tmp_path / "own").iterdir()) and not (tmp_path / ".cache").exists()
    assert answer(tmp_path, "", **own) == (0, 0)


@pytest.fixture
def settings():
    """jax's settings, as they are in a process that has set none; put back at the end."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache",
             *compilation_cache._SETTINGS)  # fmt: skip
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    for name, (usual, _) in compilation_cache._SETTINGS.items():
        jax.config.update(name, usual)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.compilation_cache.reset_cache()


def read(*names):
    return [getattr(jax.config, f"jax_{name}") for name in names]


TIME, SIZE = "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes"


def test_jaxs_own_setting_and_thresholds_stay(settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    jax.config.update(f"jax_{TIME}", 7.0)
    assert keep_programs(None) == str(tmp_path / "mine")
    assert read("compilation_cache_dir", TIME, SIZE) == [str(tmp_path / "mine"), 7.0, -1]
    assert keep_programs(str(tmp_path / "other")) == str(tmp_path / "other")
    assert read("compilation_cache_dir") == [str(tmp_path / "other")]
    assert (tmp_path / "other").is_dir()


def test_an_address_is_left_to_jax(settings):
    assert keep_programs("gs://bucket/xla") == "gs://bucket/xla"
    assert read("compilation_cache_dir", TIME) == ["gs://bucket/xla", 0.0]


def test_nothing_is_kept_by_an_empty_name(settings):
    assert keep_programs("") is None
    assert read("enable_compilation_cache") == [False]


def test_another_engine_keeps_programs_again(settings, tmp_path):
    keep_programs("")
    assert keep_programs(str(tmp_path)) == str(tmp_path)
    assert read("enable_compilation_cache", "compilation_cache_dir") == [True, str(tmp_path)]


@pytest.mark.parametrize("name", ["/proc/nothing", "/dev/null/below", "~nobody_of_this/x"])
def test_what_cannot_be_written(settings, name, monkeypatch, caplog):
    with pytest.raises(ValueError, match="; name another directory, or '' to keep none") as error:
        keep_programs(name)
    assert "\n" not in str(error.value)
    # A default that cannot be written is not the user's fault.
    monkeypatch.setattr(compilation_cache, "DEFAULT_DIR", name)
    with caplog.at_level(logging.WARNING):
        assert keep_programs(None) is None
    assert "compiled programs are not kept" in caplog.text
    assert read("compilation_cache_dir") == [None]


def test_a_file_and_no_permission(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="File exists"):
        keep_programs(str(tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ValueError, match="Permission denied"):
        keep_programs(str(tmp_path))
