# SPDX-License-Identifier: Apache-2.0
"""Rows through Apache Beam's own runner: the records of `jpaged batch`, from one shared engine."""

import json
import logging
import pathlib
import pickle
import re
import uuid

import pytest

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

REASON = "Apache Beam is not there: install the extra beam, or apache-beam"
pytestmark = [
    # What Beam's own modules warn of, and its threads at their end.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.slow,
]
beam = pytest.importorskip("apache_beam", reason=REASON)
base = pytest.importorskip("apache_beam.ml.inference.base", reason=REASON)
handlers = pytest.importorskip("jpaged.integrations.beam", reason=REASON)

SETTINGS = {"config": CONFIG, "params": PARAMS, "seed": SEED}
VARIABLES = {
    name: value
    for name, value in environment(PYTHONPATH=str(ROOT)).items()
    if name in ("JAX_PLATFORMS", "XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "PYTHONPATH")
}
# In memory, with threads of one process, and with processes that share one engine.
RUNNERS = [
    ["--runner=DirectRunner"],
    ["--runner=FnApiRunner", "--direct_num_workers=3", "--direct_running_mode=multi_threading"],
    ["--runner=FnApiRunner", "--direct_num_workers=2", "--direct_running_mode=multi_processing"],
]


def handler_of(**arguments):
    return handlers.JpagedModelHandler(**{**SETTINGS, "env_vars": VARIABLES, **arguments})


def answered(directory, elements, handler, flags=RUNNERS[0], **arguments):
    """The predictions of a pipeline, each an element and its record."""
    options = beam.options.pipeline_options.PipelineOptions(flags)
    with beam.Pipeline(options=options) as pipeline:
        _ = (
            pipeline
            | beam.Create(elements)
            | beam.Reshuffle()
            | base.RunInference(handler, **arguments)
            | beam.Map(lambda prediction: json.dumps([prediction.example, prediction.inference]))
            | beam.io.WriteToText(str(directory / "out"))
        )
    files = directory.glob("out-*")
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


class Counted(handlers.JpagedModelHandler):
    """Leaves a file for each engine that it makes."""

    def load_model(self):
        pathlib.Path(self.directory, f"{uuid.uuid4()}.loaded").touch()
        return super().load_model()


@pytest.mark.parametrize("flags", RUNNERS, ids=["memory", "threads", "processes"])
def test_records_are_those_of_a_batch(tmp_path, flags, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    given = rows(30) + WRONG
    want = batch_records(tmp_path, given, code=1)
    # Some are lines, as of a file, and some objects.
    elements = [json.dumps(row) if i % 2 else row for i, row in enumerate(given)]
    handler = Counted(**SETTINGS, env_vars=VARIABLES, min_batch_size=1, max_batch_size=4)
    handler.directory = str(tmp_path)
    found = answered(tmp_path, elements, handler, flags)
    assert len(found) == len(given)
    for element, record in found:
        row = json.loads(element) if isinstance(element, str) else element
        assert record == without_line(want[row["custom_id"]])
    # One engine for all workers, also where they are processes.
    assert len(list(tmp_path.glob("*.loaded"))) == 1


def test_wrong_settings_are_refused_before_a_pipeline_runs():
    with pytest.raises(ValueError, match="config has 'max_seqs'"):
        handlers.JpagedModelHandler(config={"max_seqs": 3})
    with pytest.raises(ValueError, match=r"inference_args={'top_p': 1} are not used"):
        answered(None, [], handler_of(), inference_args={"top_p": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_batch_size": 0}, "min_batch_size=0 must be at least 1, or None"),
        ({"max_batch_size": 0}, "max_batch_size=0 must be at least 1, or None"),
        ({"min_batch_size": 2.5}, "min_batch_size=2.5 must be an integer or None"),
        ({"max_batch_duration_secs": 0}, "max_batch_duration_secs=0 must be at least 1, or None"),
        ({"min_batch_size": 9, "max_batch_size": 8}, "min_batch_size=9 must be at most max_batch"),
        ({"env_vars": "XLA_FLAGS"}, "env_vars='XLA_FLAGS' must be a Mapping"),
        ({"env_vars": {"A": 1}}, "env_vars['A']=1 must be a string"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        handler_of(**arguments)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        # Four sequences run at once.
        ({"max_batch_size": 3}, (3, 3)),
        ({"min_batch_size": 50}, (50, 200)),
        ({"min_batch_size": 1, "max_batch_size": 1}, (1, 1)),
    ],
)
def test_what_is_not_given_fits_what_is(given, taken):
    sizes = handler_of(**given).batch_elements_kwargs()
    assert (sizes["min_batch_size"], sizes["max_batch_size"]) == taken


def test_what_beam_asks_of_a_handler():
    handler = handler_of()
    assert handler.share_model_across_processes()
    assert handler.batch_elements_kwargs() == {"min_batch_size": 4, "max_batch_size": 16}
    assert handler.get_metrics_namespace() == "BeamML_jpaged"
    sizes = {"min_batch_size": 2, "max_batch_size": 3, "max_batch_duration_secs": 5}
    assert handler_of(**sizes).batch_elements_kwargs() == sizes
    again = pickle.loads(pickle.dumps(handler))
    assert again.batch_elements_kwargs() == handler.batch_elements_kwargs()


class Fails(handlers.JpagedModelHandler):
    """Its engine's device fails in a step."""

    def load_model(self):
        server = super().load_model()

        def fail(*args):
            raise RuntimeError("INTERNAL: the device failed")

        runner = server._reader.complete.__closure__[0].cell_contents._runner
        runner.run = fail
        return server


def test_a_device_that_fails_ends_the_pipeline(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    handler = Fails(**SETTINGS, env_vars=VARIABLES)
    with pytest.raises(Exception, match=r"EngineFailedError: .*INTERNAL: the device failed"):
        answered(tmp_path, rows(12), handler, RUNNERS[1])
