# SPDX-License-Identifier: Apache-2.0
"""Ray Data: a class for `Dataset.map_batches`, whose actors have an engine each.

    ds = ray.data.read_parquet("gs://bucket/requests")     # custom_id, prompt, max_tokens, ...
    ds = ds.map_batches(
        Predictor,
        fn_constructor_kwargs={"model": "org/name", "params": {"temperature": 0}},
        batch_format="pyarrow",
        batch_size=64,
        compute=ray.data.ActorPoolStrategy(size=4),
        num_gpus=1,
    )
    ds.write_parquet("gs://bucket/records")

docs/integrations.md says how such a job goes on where it was stopped. This module needs the extra
`ray`; it imports nothing of Ray itself, whose workers import it.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from jpaged.host.checks import Rule, checked
from jpaged.integrations.record_server import RecordServer, ServerSettings

_NAMED = (Rule("a column's name, not empty", bool),)
_SOME = Rule("a list of at least one column", bool)


class Predictor:
    """Answers batches of rows: the columns that come, and one more, of records.

    A row is a request as a line of `jpaged batch` is, either in columns by the names of its fields
    (custom_id, prompt or messages and parameters; or custom_id, url and body), of which those that
    are null are not there, or as a whole in one column of JSON. Its record is the line that
    `jpaged batch` would write. A wrong row is a record with an error, and the job goes on.

    Ray Data has several batches under way in an actor, and all their rows share the engine's steps.
    """

    def __init__(
        self,
        *,
        id_column: str = "custom_id",
        columns: Sequence[str] | None = None,
        json_column: str | None = None,
        record_column: str = "record",
        **settings: Any,
    ):
        """Loads the model; in an actor, as Ray makes it.

        Args:
          id_column: of custom_ids, text or integers, unique in the dataset.
          columns: that are fields of the request, beside id_column; None takes all there are.
          json_column: has each row as JSON, in place of columns. Prompts without a custom_id are
            called as id_column says, if it is there.
          record_column: where records go.
          **settings: see `ServerSettings`: model, config, params, options, seed.

        Raises:
          ValueError: if an argument is wrong, or the model is not supported or does not fit.
          FileNotFoundError: if the model is missing.
        """
        for name, value in (("id_column", id_column), ("record_column", record_column)):
            checked(name, value, str, _NAMED)
        json_column = checked("json_column", json_column, str | None, _NAMED)
        columns = checked("columns", columns, tuple[str, ...] | None, (_SOME,))
        if columns is not None and json_column is not None:
            raise ValueError(
                f"columns={list(columns)} and json_column={json_column!r} exclude each other: a "
                "row is in columns, or JSON in one"
            )
        self._id_column, self._record_column = id_column, record_column
        self._columns, self._json_column = columns, json_column
        self._server = RecordServer(ServerSettings(**settings))

    async def __call__(self, batch: Any) -> Any:
        """Answers a batch.

        Args:
          batch: a pyarrow.Table, of rows.

        Returns:
          The table, with a column of records: text, one for each row.

        Raises:
          TypeError: if the batch has another format than batch_format="pyarrow".
          ValueError: if a column is missing, or there is one called as that of records is.
          EngineFailedError: if the engine fails; the job ends then, unless Ray is told otherwise.
        """
        import pyarrow  # pyright: ignore[reportMissingImports]

        if not isinstance(batch, pyarrow.Table):
            raise TypeError(
                f"batches are of {type(batch).__name__}, in which integers beside nulls are none "
                'any more: give map_batches batch_format="pyarrow"'
            )
        self._check(batch.column_names)
        ids = [""] * len(batch)
        if self._id_column in batch.column_names:
            values = batch.column(self._id_column).to_pylist()
            ids = ["" if value is None else str(value) for value in values]
        rows = self._rows(batch, ids)
        records = await asyncio.to_thread(self._server.records, rows, ids)
        return batch.append_column(self._record_column, pyarrow.array(records, pyarrow.string()))

    def _check(self, names: Sequence[str]) -> None:
        needed = [self._json_column or self._id_column, *(self._columns or ())]
        if missing := [name for name in needed if name not in names]:
            raise ValueError(f"there is no column {missing[0]!r}; there are {', '.join(names)}")
        if self._record_column in names:
            raise ValueError(
                f"there is a column {self._record_column!r} already: give another record_column"
            )

    def _rows(self, batch: Any, ids: Sequence[str]) -> list[Any]:
        if self._json_column:
            return batch.column(self._json_column).to_pylist()
        fields = batch if self._columns is None else batch.select(list(self._columns))
        found: list[Any] = []
        for row_id, row in zip(ids, fields.to_pylist(), strict=True):
            row.pop(self._id_column, None)
            found.append(_without_nulls(row | {"custom_id": row_id or None}))
        return found


def _without_nulls(value: Any) -> Any:
    """A value of Arrow as JSON would have it: a table's rows all have all fields."""
    if isinstance(value, dict):
        return {name: _without_nulls(v) for name, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(v) for v in value]
    return value
