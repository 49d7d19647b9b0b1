# SPDX-License-Identifier: Apache-2.0
"""Apache Beam: a model handler for `RunInference`, with one engine a machine.

    handler = JpagedModelHandler(model="org/name", params={"temperature": 0})
    with beam.Pipeline(options=options) as p:
        (
            p
            | beam.io.ReadFromText("gs://bucket/requests.jsonl")
            | RunInference(handler)
            | beam.Map(lambda prediction: prediction.inference)
            | beam.io.WriteToText("gs://bucket/records", ".jsonl")
        )

This module imports Beam, which the extra `beam` installs.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

try:
    from apache_beam.ml.inference.base import (  # pyright: ignore[reportMissingImports]
        ModelHandler,
        PredictionResult,
    )
except ImportError as e:
    raise ImportError("Apache Beam is not there: install the extra beam, or apache-beam") from e

from jpaged.host.checks import at_least, checked, instance_of
from jpaged.integrations.record_server import RecordServer, ServerSettings

# As `jobs.run` has rows in the engine, for each sequence that runs.
_WINDOW = 4


class JpagedModelHandler(ModelHandler):
    """Answers rows in a Beam pipeline as `jpaged batch` does.

    An element is a row: a line of that program's input, or the object that it is, with a custom_id.
    The inference of its `PredictionResult` is its record, the line that `jpaged batch` would write;
    a wrong row is a record with an error, and the pipeline goes on.

    All threads and processes of a machine share one engine, and their batches its steps. An engine
    that fails, fails each batch that waits, and the runner does these again.
    """

    def __init__(
        self,
        *,
        min_batch_size: int | None = None,
        max_batch_size: int | None = None,
        max_batch_duration_secs: int | None = None,
        env_vars: Mapping[str, str] | None = None,
        **settings: Any,
    ):
        """Checks the settings; the model is loaded by a worker.

        Args:
          min_batch_size: elements of a batch at least, 1 or more; None takes as many as sequences
            run at once. Beam makes smaller ones where a bundle ends.
          max_batch_size: elements of a batch at most; None takes four times as many.
          max_batch_duration_secs: in streams, seconds that elements wait to be a batch, 1 or more;
            None is what Beam takes.
          env_vars: set in workers before the model is loaded, such as XLA_FLAGS; what jax reads
            when it is imported, as JAX_PLATFORMS, must be in the workers' own environment.
          **settings: see `ServerSettings`: model, config, params, options, seed.

        Raises:
          ValueError: if a setting is wrong.
        """
        self._settings = ServerSettings(**settings)
        config: Any = self._settings.config
        least = checked("min_batch_size", min_batch_size, int | None, at_least(1))
        most = checked("max_batch_size", max_batch_size, int | None, at_least(1))
        longest = checked(
            "max_batch_duration_secs", max_batch_duration_secs, int | None, at_least(1)
        )
        variables = dict(instance_of("env_vars", {} if env_vars is None else env_vars, Mapping))
        for name, value in variables.items():
            checked(f"env_vars[{name!r}]", value, str)
        most = most or _WINDOW * max(config.max_num_seqs, least or 0)
        least = least or min(config.max_num_seqs, most)
        if least > most:
            raise ValueError(
                f"min_batch_size={least} must be at most max_batch_size={most}, or None"
            )
        super().__init__(
            min_batch_size=least,
            max_batch_size=most,
            max_batch_duration_secs=longest,
            env_vars=variables,
        )

    def load_model(self) -> RecordServer:
        """Loads the model and starts its engine, whose thread ends with what is returned.

        Raises:
          FileNotFoundError: if the model is missing.
          ValueError: if it is not supported, damaged, or does not fit the settings.
        """
        return RecordServer(self._settings)

    def run_inference(
        self,
        batch: Sequence[str | bytes | Mapping[str, Any]],
        model: RecordServer,
        inference_args: Mapping[str, Any] | None = None,
    ) -> Iterable[PredictionResult]:
        """Answers a batch, beside those of other threads and processes.

        Returns:
          For each element, in their order, it and its record.

        Raises:
          EngineFailedError: if the engine fails meanwhile.
        """
        records = model.records(list(batch))
        return [PredictionResult(*pair) for pair in zip(batch, records, strict=True)]

    def validate_inference_args(self, inference_args: Mapping[str, Any] | None) -> None:
        """Refuses arguments, as rows have parameters of their own. Raises: ValueError."""
        if inference_args:
            raise ValueError(
                f"inference_args={dict(inference_args)} are not used: give the handler params=, or "
                "rows parameters of their own"
            )

    def share_model_across_processes(self) -> bool:
        """True: one engine has the device's memory, and is fuller the more callers it has."""
        return True

    def get_metrics_namespace(self) -> str:
        """What Beam's metrics of inference are called after."""
        return "BeamML_jpaged"
