# SPDX-License-Identifier: Apache-2.0
"""Parameters that are read in parts: stacked, onto a mesh, from another mesh; and only numbers."""

import io
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tqdm
from jax.sharding import AxisType, Mesh

from jpaged.models import DEMO, checkpoint, host_arrays, safetensors_weights, sharding
from jpaged.models.checkpoint import CheckpointError
from jpaged.models.decoder import stack_layers
from jpaged.models.merged import merge_projections
from tests.models.test_checkpoint import FIXTURES, edit, same

NIGHTLY = [pytest.mark.nightly, pytest.mark.slow]
# Packed weights; fused parts; views; patterns of several layers, and stacked experts.
FORMS = [
    "gpt_oss_mxfp4",
    "phi3_part_of_a_head",
    pytest.param("gpt_oss_sinks", marks=NIGHTLY),
    pytest.param("gemma3_two_ropes", marks=NIGHTLY),
    pytest.param("mixtral_experts", marks=NIGHTLY),
    pytest.param("qwen3_moe_some_dense", marks=NIGHTLY),
]
SPLIT = ["qwen3_mha_hd80_untied_sharded", "mixtral_experts", "phi3_part_of_a_head", "gpt_oss_sinks"]
# Biases, experts that stay apart beside layers that do not, packed weights, fused ones.
MERGED = [*FORMS[:2], "qwen2_biases_late_windows", "qwen3_moe_some_dense", "llama_yarn_biases"]


def mesh(*numbers):
    devices = [jax.devices("cpu")[number] for number in numbers]
    return Mesh(np.array(devices), ("tp",), axis_types=(AxisType.Auto,))


def even(name, tmp_path):
    """A fixture with a vocabulary that splits over two devices."""
    directory = tmp_path / "even"
    shutil.copytree(FIXTURES / name, directory)
    fields = json.loads((directory / "config.json").read_text())
    if fields["vocab_size"] % 2:
        fields["vocab_size"] += 1
        (directory / "config.json").write_text(json.dumps(fields))

        def pad(tensors):
            for key in ("model.embed_tokens.weight", "lm_head.weight"):
                if key in tensors:
                    tensors[key] = np.concatenate([tensors[key], tensors[key][:1]])

        edit(directory, pad)
    return directory


@pytest.mark.parametrize("name", FORMS)
def test_stacked_as_it_is_read(name, monkeypatch):
    config, params = checkpoint.load(FIXTURES / name, jnp.float32)
    monkeypatch.setattr(safetensors_weights, "_BLOCK_BYTES", 1024)  # some rows
    again, stacked = checkpoint.load(FIXTURES / name, jnp.float32, scan_layers=True)
    assert again == config
    same(stacked, stack_layers(params, config))


@pytest.mark.parametrize("name", MERGED)
def test_merged_as_it_is_read(name, monkeypatch):
    config, params = checkpoint.load(FIXTURES / name, jnp.float32)
    merged = merge_projections(params)
    # Where it is read to, and not afterwards.
    monkeypatch.setattr(checkpoint, "merge_projections", None)
    again, found = checkpoint.load(FIXTURES / name, jnp.float32, merge=True)
    assert again == config
    same(found, merged)


def test_what_is_not_merged_as_it_is_read():
    for options in ({"scan_layers": True}, {"mesh": mesh(0)}):
        with pytest.raises(ValueError, match="merge=True takes no mesh, and scan_layers=False"):
            checkpoint.load(DEMO, jnp.float32, merge=True, **options)


@pytest.mark.parametrize(("name", "scan"), [*((name, False) for name in SPLIT), (SPLIT[1], True)])
def test_each_device_gets_its_part(name, scan, tmp_path):
    directory, two = even(name, tmp_path), mesh(0, 1)
    _, want = checkpoint.load(directory, jnp.float32, scan_layers=scan)
    _, params = checkpoint.load(directory, jnp.float32, mesh=two, scan_layers=scan)
    same(params, want)
    shardings = sharding.param_shardings(params, two)
    assert jax.tree.all(jax.tree.map(lambda leaf, to: leaf.sharding == to, params, shardings))
    parts = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(params)]
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    assert sum(parts) < 0.55 * sum(sizes)


def test_a_device_reads_its_part_and_no_more(monkeypatch):
    reader, count = safetensors_weights._TensorReader, []

    def counted(read):
        def reads(self, *args):
            found = read(self, *args)
            count.append(found.nbytes)
            return found

        return reads

    for name in ("read", "rows"):
        monkeypatch.setattr(reader, name, counted(getattr(reader, name)))
    checkpoint.load(FIXTURES / SPLIT[0], jnp.float32)
    once = sum(count)
    count.clear()
    checkpoint.load(FIXTURES / SPLIT[0], jnp.float32, mesh=mesh(0, 1))
    assert sum(count) == once > 0


def test_what_does_not_split_is_refused():
    with pytest.raises(ValueError, match=r"^num_kv_heads=1 does not split over 2 devices"):
        checkpoint.load(FIXTURES / "llama_linear_rope_mqa", jnp.float32, mesh=mesh(0, 1))


@pytest.mark.parametrize(
    ("saved_from", "loaded_to"),
    [((0, 1), (1, 0)), ((0, 1), None), (None, (0, 1))],
    ids=["another order", "from two to one", "from one to two"],
)
def test_orbax_onto_another_mesh(saved_from, loaded_to, tmp_path):
    case = even(SPLIT[1], tmp_path)
    first, second = (numbers and mesh(*numbers) for numbers in (saved_from, loaded_to))
    config, params = checkpoint.load(case, jnp.float32, mesh=first)
    checkpoint.save_orbax(tmp_path / "saved", config, params)
    for scan in (False, True):
        again, loaded = checkpoint.load(
            tmp_path / "saved", jnp.float32, mesh=second, scan_layers=scan
        )
        assert again == config
        same(loaded, stack_layers(params, config) if scan else params)
        if second is not None:
            to = sharding.param_shardings(loaded, second)
            assert jax.tree.all(jax.tree.map(lambda leaf, at: leaf.sharding == at, loaded, to))


class TestNumbers:
    """What is not finite is refused where it lies."""

    CASE, NAME = "llama_gqa5_hd48_untied", "model.layers.1.mlp.down_proj.weight"

    def damaged(self, tmp_path, number, dtype=np.float32):
        directory = tmp_path / "model"
        shutil.copytree(FIXTURES / self.CASE, directory)

        def change(tensors):
            tensors |= {name: tensor.astype(dtype) for name, tensor in tensors.items()}
            tensors[self.NAME][-1, -1] = number

        edit(directory, change)
        return directory

    @pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_in_safetensors(self, tmp_path, number, stored, dtype):
        directory = self.damaged(tmp_path, number, stored)
        with pytest.raises(CheckpointError) as raised:
            checkpoint.load(directory, jnp.dtype(dtype))
        assert str(raised.value).startswith(
            f"{directory / 'model.safetensors'}: tensor '{self.NAME}' holds n"
            if dtype == "float16" and stored != np.float16
            else f"{directory / 'model.safetensors'}: tensor '{self.NAME}' holds NaN or infinity"
        )

    def test_numbers_that_a_dtype_does_not_hold(self, tmp_path):
        directory = self.damaged(tmp_path, -1e5)
        with pytest.raises(CheckpointError, match="holds numbers beyond 65504, the largest of flo"):
            checkpoint.load(directory, jnp.float16)
        _, params = checkpoint.load(directory, jnp.float32)
        assert params["layers_1"]["mlp"]["down_proj"]["weight"][-1, -1] == -1e5

    @pytest.mark.parametrize("number", [np.nan, -np.inf])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_in_orbax(self, tmp_path, number, dtype):
        config, params = checkpoint.load(FIXTURES / self.CASE, dtype)
        down = params["layers_1"]["mlp"]["down_proj"]
        down["weight"] = down["weight"].at[-1, -1].set(number)
        checkpoint.save_orbax(tmp_path, config, params)
        path = "layers_1/mlp/down_proj/weight"
        with pytest.raises(CheckpointError, match=f"params: tensor '{path}' holds NaN or infinity"):
            checkpoint.load(tmp_path, dtype)

    @pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
    def test_is_finite(self, dtype):
        most = ml_dtypes.finfo(dtype).max
        fine = np.array([0, -0.0, 1, -most, most, ml_dtypes.finfo(dtype).smallest_subnormal], dtype)
        assert host_arrays.is_finite(fine)
        for number in (np.nan, -np.nan, np.inf, -np.inf):
            for place in range(len(fine)):
                wrong = fine.copy()
                wrong[place] = number
                assert not host_arrays.is_finite(wrong)


class TestBar:
    """On a terminal, of bytes as the parameters have them; elsewhere there is none."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    @pytest.mark.parametrize("terminal", [True, False])
    def test_says_how_far_it_is(self, monkeypatch, terminal):
        errors = self.Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stderr", errors)
        moments = []

        class Bar(tqdm.tqdm):
            def update(self, n=1):
                moments.append((n, self.total))
                return super().update(n)

        monkeypatch.setattr(tqdm, "tqdm", Bar)
        _, params = checkpoint.load(DEMO, jnp.bfloat16)
        sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
        assert sorted(n for n, _ in moments) == sorted(sizes)
        assert {total for _, total in moments} == {sum(sizes)}
        assert ("weights:" in errors.getvalue()) == terminal
