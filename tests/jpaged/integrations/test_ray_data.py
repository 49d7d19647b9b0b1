# SPDX-License-Identifier: Apache-2.0
"""Rows through Ray Data, on Ray's own machine: the records of `jpaged batch`, and going on."""

import asyncio
import json
import pathlib

import pytest

from jpaged.integrations.ray_data import Predictor
from tests.jpaged.integrations.rows import (
    CONFIG,
    PARAMS,
    SEED,
    WRONG,
    batch_records,
    rows,
    without_line,
)
from tests.scripts.programs import ROOT, environment

REASON = "Ray is not installed: pip install 'jpaged[ray]'"
ray = pytest.importorskip("ray", reason=REASON)
pytest.importorskip("ray.data", reason=REASON)
pytest.importorskip("ray.data.checkpoint", reason=REASON)
pa = pytest.importorskip("pyarrow", reason=REASON)
pq = pytest.importorskip("pyarrow.parquet", reason=REASON)
pytestmark = [
    # What Ray's own modules warn of, and its processes at their end.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
]
LAST = "r11"
SETTINGS = {"config": CONFIG, "params": PARAMS, "seed": SEED}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    names = ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    variables = {name: value for name, value in environment().items() if name in names}
    variables["PYTHONPATH"] = str(ROOT)
    ray.init(
        num_cpus=8,  # places, not cores: a filter of checkpoints has some too
        include_dashboard=False,
        logging_level="ERROR",
        runtime_env={"env_vars": variables},
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def answered(ds, size=1, batch_size=3, fn=Predictor, **arguments):
    return ds.map_batches(
        fn,
        fn_constructor_kwargs={**SETTINGS, **arguments},
        batch_format="pyarrow",
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=size),
    )


def records_of(ds):
    return {json.loads(row["record"])["custom_id"]: row["record"] for row in ds.take_all()}


def test_columns_become_the_records_of_a_batch(tmp_path):
    """With what each row has alone, which is null in all others, and with wrong rows."""
    plain = [row for row in rows(24) if "prompt" in row] + [r for r in WRONG if "url" not in r]
    want = batch_records(tmp_path, plain, code=1)
    names = sorted({name for row in plain for name in row})
    table = pa.Table.from_pylist([dict.fromkeys(names) | row for row in plain])
    ds = ray.data.from_arrow(table).repartition(5)
    found = answered(ds, size=2).take_all()
    assert {row["custom_id"]: row["record"] for row in found} == {
        name: without_line(line) for name, line in want.items()
    }
    assert {*found[0]} == {*names, "record"}


def test_requests_as_ray_reads_them(tmp_path):
    """The file of a batch, its bodies as columns within a column."""
    given = [row for row in rows(24) if "body" in row]
    want = batch_records(tmp_path, given)
    ds = ray.data.read_json(str(tmp_path / "requests.jsonl"), lines=True)
    assert records_of(answered(ds)) == want


def test_json_in_a_column(tmp_path):
    given = rows(10) + WRONG
    want = batch_records(tmp_path, given, code=1)
    lines = [json.dumps(row) for row in given]
    # One is called by another column alone.
    lines[0] = json.dumps({name: v for name, v in given[0].items() if name != "custom_id"})
    table = pa.table({"name": [row["custom_id"] for row in given], "line": lines})
    ds = ray.data.from_arrow(table).repartition(3)
    found = records_of(answered(ds, json_column="line", id_column="name"))
    assert found == {name: without_line(line) for name, line in want.items()}


def test_ids_that_are_numbers_and_columns_that_are_no_fields():
    table = pa.table({"doc": [7, 8], "prompt": ["The dog"] * 2, "title": ["a", "b"]})
    ds = ray.data.from_arrow(table)
    found = answered(ds, id_column="doc", columns=["prompt"], record_column="out").take_all()
    assert [row["title"] for row in found] == ["a", "b"]
    records = [json.loads(row["out"]) for row in found]
    assert [record["custom_id"] for record in records] == ["7", "8"]
    assert [record["error"] for record in records] == [None, None]
    texts = [record["response"]["body"]["choices"][0]["text"] for record in records]
    assert texts[0] != texts[1]  # each has a seed of its own
    found = records_of(answered(ds, id_column="doc"))
    assert "unknown field 'title'" in found["7"]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"id_column": "name"}, "there is no column 'name'; there are custom_id, prompt"),
        ({"columns": ["text"]}, "there is no column 'text'"),
        ({"json_column": "text"}, "there is no column 'text'"),
        ({"record_column": "prompt"}, "there is a column 'prompt' already"),
        ({"json_column": "a", "columns": ["b"]}, "exclude each other"),
        ({"config": {"max_seqs": 3}}, "config has 'max_seqs'"),
    ],
)
def test_wrong_arguments_end_the_job(arguments, says):
    table = pa.table({"custom_id": ["a"], "prompt": ["The dog"]})
    with pytest.raises(Exception, match=says):
        answered(ray.data.from_arrow(table), **arguments).take_all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"json_column": ""}, "json_column='' must be a column's name, not empty, or None"),
        ({"id_column": ""}, "id_column='' must be a column's name, not empty"),
        ({"record_column": None}, "record_column=None must be a string"),
        ({"columns": "prompt"}, "columns='prompt' must be a list of strings or None"),
        ({"columns": []}, r"columns=\(\) must be a list of at least one column, or None"),
    ],
)
def test_columns_that_are_none_are_refused_before_a_model_is_loaded(arguments, says):
    with pytest.raises(ValueError, match=says):
        Predictor(model="/nowhere", **arguments)


def test_another_batch_format_ends_the_job():
    ds = ray.data.from_items([{"custom_id": "a", "prompt": "The dog"}])
    with pytest.raises(Exception, match='give map_batches batch_format="pyarrow"'):
        ds.map_batches(
            Predictor,
            fn_constructor_kwargs=SETTINGS,
            compute=ray.data.ActorPoolStrategy(size=1),
        ).take_all()


class Dies(Predictor):
    """Notes each row that it answers, and fails at the last one when some are written."""

    def __init__(self, *, directory, **arguments):
        self.directory = pathlib.Path(directory)
        super().__init__(**arguments)

    async def __call__(self, batch):
        names = batch.column("custom_id").to_pylist()
        if LAST in names and not (self.directory / "go on").exists():
            while not committed(self.directory):
                await asyncio.sleep(0.05)
            raise RuntimeError("the machine is gone")
        for name in names:
            with open(self.directory / name, "a") as file:
                file.write("x")
        return await super().__call__(batch)


def committed(directory):
    """The rows that a checkpoint has."""
    files = (directory / "checkpoint").glob("*.parquet")
    whole = [path for path in files if ".pending" not in path.name]
    return {row["custom_id"] for path in whole for row in pq.read_table(path).to_pylist()}


def test_a_job_goes_on_from_its_checkpoint(tmp_path):
    given = rows(12)
    want = batch_records(tmp_path, given)
    ids, lines = [row["custom_id"] for row in given], list(map(json.dumps, given))
    assert ids[-1] == LAST
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"custom_id": ids, "line": lines}), tmp_path / "in" / "0.parquet")
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = ray.data.checkpoint.CheckpointConfig(
        id_column="custom_id",
        checkpoint_path=str(tmp_path / "checkpoint"),
        delete_checkpoint_on_success=False,
    )

    def go_on():
        ds = ray.data.read_parquet(str(tmp_path / "in")).repartition(target_num_rows_per_block=3)
        ds = answered(ds, fn=Dies, json_column="line", directory=str(tmp_path))
        ds.write_parquet(str(tmp_path / "out"))

    try:
        with pytest.raises(Exception, match="the machine is gone"):
            go_on()
        kept = committed(tmp_path)
        assert 0 < len(kept) < len(given)
        (tmp_path / "go on").touch()
        go_on()
        go_on()  # once more: nothing is left to do
    finally:
        context.checkpoint_config = None
    found = [
        row["record"]
        for path in (tmp_path / "out").glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    ]
    assert sorted(found) == sorted(want.values())
    times = {name: len((tmp_path / name).read_text()) for name in ids}
    assert all(times[name] == 1 for name in kept) and max(times.values()) <= 2
