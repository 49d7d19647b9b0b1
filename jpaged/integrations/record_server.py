# SPDX-License-Identifier: Apache-2.0
"""Rows in, records out, for many callers at once: `jpaged batch` as an object."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jpaged.chat import ChatOptions, checked_date
from jpaged.engine import Engine
from jpaged.host.checks import checked, instance_of, shown
from jpaged.host.config import EngineConfig
from jpaged.host.params import SamplingParams
from jpaged.integrations.engine_thread import EngineThread
from jpaged.jobs import Row
from jpaged.jobs.fields import own_params
from jpaged.jobs.inputs import line_of, line_of_value
from jpaged.jobs.openai import RecordMaker, RowReader, encode_record
from jpaged.jobs.settings import for_jobs, with_fallbacks

_NO_ID = "custom_id is missing; give each row one of its own, of which its seed is made"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What rows are answered with; plain values, which other machines can be sent.

    Attributes:
      model: as `--model` of `jpaged batch`, and the name that records have.
      config: settings of the engine, by name; others are those of `jpaged batch`, which pads steps
        to one shape, so that results are the same to the last bit on each machine of a kind. Or an
        `EngineConfig`, which is taken as it is.
      params: of rows that say nothing else, by name, or as `SamplingParams`.
      options: of the chat template, where a row has nothing else.
      seed: of the job: gives rows without a seed theirs, with their ids.
    """

    model: str = "demo"
    config: EngineConfig | Mapping[str, Any] = dataclasses.field(default_factory=dict)
    params: SamplingParams | Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: ChatOptions = dataclasses.field(default_factory=lambda: ChatOptions())
    seed: int = 0

    def __post_init__(self):
        if not checked("model", self.model, str):
            raise ValueError("model='' must be a directory, a file or a name")
        checked("seed", self.seed, int)
        object.__setattr__(self, "config", _config(self.config))
        params = self.params
        if not isinstance(params, SamplingParams):
            instance_of("params", params, Mapping)
            params = own_params(params, (), SamplingParams())
        if params.seed is not None:
            raise ValueError(
                f"params has seed={params.seed}, which all rows would draw alike with: give "
                "seed=..., that of the job, from which each row has its own"
            )
        object.__setattr__(self, "params", params)
        if (date := instance_of("options", self.options, Mapping).get("date")) is not None:
            checked_date("options: date", date)


class RecordServer:
    """Answers rows as `jpaged batch` does, for callers in any number of threads.

    A row is text, a line of that program's input, or the object that such a line is; it has a
    custom_id, as a row's seed derives from it: where it stands, or who it comes with, changes no
    record. A wrong row is a record with an error.

    Example:
      server = RecordServer(ServerSettings(params={"max_tokens": 16}))
      (record,) = server.records([{"custom_id": "a", "prompt": "Once upon a time"}])
    """

    def __init__(self, settings: ServerSettings):
        """Loads the model, and starts a thread for its engine.

        Raises:
          FileNotFoundError: if the model is missing.
          ValueError: if it is not supported, damaged, or does not fit the settings.
        """
        instance_of("settings", settings, ServerSettings)
        config: Any = settings.config
        params: Any = settings.params
        engine = Engine.load(settings.model, config)
        if config.strict_shapes:
            engine.warm_up(params=[params])  # rows that ask for more are refused
        self._reader = RowReader(
            params=params,
            tokenizer=engine.tokenizer,
            template=engine.chat_template,
            options=settings.options,
            complete=lambda own: with_fallbacks(own, engine.defaults),
        )
        self._maker = RecordMaker(engine.tokenizer, settings.model)
        self._thread = EngineThread(engine, seed=settings.seed)

    def records(
        self, rows: Sequence[str | bytes | Mapping[str, Any]], ids: Sequence[str] | None = None
    ) -> list[str]:
        """Answers rows, beside those of other callers, in steps that they share.

        Args:
          rows: see the class.
          ids: what each is called if it is a prompt without a custom_id, or an error; "" for one
            that has to have one. None has none.

        Returns:
          The record of each row, in their order: the line that `jpaged batch` writes for it,
          without its end. Messages of errors name no line, as there is none.

        Raises:
          EngineFailedError: if the engine fails meanwhile, or is closed.
          ValueError: if there are not as many ids as rows.
        """
        own_ids = [""] * len(rows) if ids is None else ids
        if len(own_ids) != len(rows):
            raise ValueError(
                f"ids has {len(own_ids)} names for {len(rows)} rows; give one for each"
            )
        results = self._thread.run(list(map(self._row, rows, own_ids)))
        return [encode_record(self._maker.record(r)).decode().rstrip("\n") for r in results]

    def close(self) -> None:
        """Ends the engine's thread; calls that wait raise."""
        self._thread.close()

    def _row(self, row: Any, own_id: str) -> Row:
        if isinstance(row, str):
            row = row.encode(errors="surrogatepass")
        if isinstance(row, bytes):
            line = line_of(row if row.strip() else b"", own_id, "")
        else:
            line = line_of_value(dict(row) if isinstance(row, Mapping) else row, own_id, "")
        if line.error is None and not line.row_id:
            line = line._replace(error=_NO_ID)
        return self._reader.row(line)


def _config(given: Any) -> EngineConfig:
    """The settings of an engine. Raises: ValueError, naming what is wrong."""
    if isinstance(given, EngineConfig):
        return given
    instance_of("config", given, Mapping)
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    if unknown := [name for name in given if name not in names]:
        raise ValueError(f"config has {shown(unknown[0])}; there are {', '.join(names)}")
    return for_jobs(EngineConfig(**given), given)
