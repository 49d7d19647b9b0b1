# SPDX-License-Identifier: Apache-2.0
"""Runs files of requests, and goes on where it was stopped.

    jpaged batch --input=requests.jsonl --output=results.jsonl
    jpaged batch --input='parts/*.jsonl.gz' --output=results.jsonl --max_tokens=64
    jpaged batch --model=org/name --input=- --output=results.jsonl < requests.jsonl

Each line of the input is a request in the form of OpenAI's batches, with custom_id, url
(/v1/chat/completions or /v1/completions) and body, or a prompt, such as {"prompt": "Once",
"max_tokens": 9}, or a conversation, as {"messages": [...]}, with parameters of its own by the names
of `SamplingParams`, which win over the flags. Inputs are plain or gzip, of one file or several; -
is standard input. A row without a custom_id is called by its number, row-1 the first. A row without
a seed gets one of --seed and its id.

Results are appended to --output as rows end, a JSON object a line, in the form of OpenAI's batches;
a row that is wrong has an error there, which names its line and field, and is no reason to stop.
The same command goes on where it was stopped, however that was, and the finished file, which is in
the order of the input, has the same bytes as that of a run that nothing stopped. A manifest beside
the output has what results depend on, and a job that would mix others in is refused.

On several machines each runs the same command with a --shard of its own, and when all are done,
--merge in its place makes the same bytes, whatever the number of shards:

    jpaged batch --input=requests.jsonl --output=results.jsonl --num_shards=2 --shard=0
    jpaged batch --input=requests.jsonl --output=results.jsonl --num_shards=2 --shard=1
    jpaged batch --input=requests.jsonl --output=results.jsonl --num_shards=2 --merge

A chat template that asks what day it is, as those of Llama 3.x and gpt-oss do, is told --date: the
day on which the job began, whenever it goes on.

With --snapshot_s=60, the tokens of rows that run are written each minute to a file beside the
output, and the same command goes on from there: worth it where answers are long, as rows that ran
begin anew otherwise. It changes no byte of the results.

Ctrl-C and SIGTERM begin no more rows, and give those that run --grace_s seconds; once more ends at
once. The exit code is 75 where rows are left, so run it again; 0 when all are done; 1 when some of
them have an error; 2 for bad usage; 74 if the output cannot be written, such as to a full disk, and
71 if the device fails: neither loses a result, and the same command goes on then too.
"""

from jpaged.scripts import interrupts

if __name__ == "__main__":
    interrupts.end_to_go_on()  # also while the imports take their time

import contextlib
import dataclasses
import datetime
import math
import pathlib
import stat
import sys
from collections.abc import Iterator
from typing import Any

import jax
import tqdm
from absl import app, flags

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.chat import checked_date
from jpaged.jobs import Result, Row, Snapshot, run
from jpaged.jobs.inputs import Input, RowIds, open_input
from jpaged.jobs.manifest import asked_for, check_same, read_manifest, run_with, write_manifest
from jpaged.jobs.openai import RecordMaker, RowReader, encode_record
from jpaged.jobs.output import OutputError
from jpaged.jobs.settings import for_jobs, with_fallbacks
from jpaged.jobs.shards import ShardsMissingError, merge, open_output, shard_entry, shard_path
from jpaged.jobs.snapshot import remove_snapshot, snapshot_path
from jpaged.recovery import EngineDeadError
from jpaged.scripts import flags as programs
from jpaged.scripts.conversations import chat_options_from_flags, define_chat_flags
from jpaged.scripts.monitor_flags import define_monitor_flags, monitored
from jpaged.scripts.sampling_flags import (
    SAMPLING_FLAGS,
    define_sampling_flags,
    sampling_params_from_flags,
)
from jpaged.scripts.shard_flags import define_shard_flags, shards_from_flags

_OUTPUT_LOST = 74  # EX_IOERR of sysexits.h
_DEVICE_LOST = 71  # EX_OSERR: also when run again, it may fail
_MAX_REASON = 500  # characters of what the device says, which may be pages

_MODEL = flags.DEFINE_string(
    "model",
    "demo",
    "Model directory, Hugging Face's or our own, a GGUF file, or a model's name on the Hugging "
    "Face hub, org/name; demo is the shipped checkpoint.",
)
_INPUT = flags.DEFINE_multi_string(
    "input", [], "File of requests, or a glob; may be repeated. - is standard input."
)
_OUTPUT = flags.DEFINE_string("output", None, "File that results are appended to.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the job: gives rows without a seed theirs.")
_DATE = flags.DEFINE_string(
    "date",
    None,
    "The day that a chat template is told that asks for it, such as 2026-11-28: by default that on "
    "which the job began, also when it goes on. Shards that begin on different days need it.",
)
_ORDERED = flags.DEFINE_bool(
    "ordered",
    False,
    "Append results in the order of the input, so that what is there is in order before the end "
    "too. Results wait for slower rows before them then, and are computed again if it is stopped.",
)
_GRACE_S = flags.DEFINE_float(
    "grace_s", 20.0, "Seconds that running rows have to end after Ctrl-C or SIGTERM.", 0.0
)
_SYNC_ROWS = flags.DEFINE_integer(
    "sync_rows", 256, "Write and sync results when there are so many.", 1
)
_SYNC_S = flags.DEFINE_float("sync_s", 5.0, "Or when the first has waited so many seconds.", 0.0)
_SNAPSHOT_S = flags.DEFINE_float(
    "snapshot_s",
    0.0,
    "Seconds between two times that the tokens of rows that run are written, to --output with "
    ".snapshot behind, from where they go on when the same command is run again. 0 writes and "
    "reads none.",
    0.0,
)
_MIX = flags.DEFINE_bool(
    "mix",
    False,
    "Go on with an output that was begun with other engine settings, on another device or with "
    "other versions. Rows may then differ from those of a run in one piece.",
)
_SAMPLING = tuple(name for name in SAMPLING_FLAGS if name != "seed")
define_sampling_flags(_SAMPLING)
define_chat_flags()
define_shard_flags()
programs.define_engine_flags()
define_monitor_flags()


def main(argv: list[str]) -> None:
    """Checks everything, then runs what is left, and exits with what it came to."""
    interrupts.end_to_go_on()
    programs.log_to_stderr()
    try:
        with programs.usage_errors():
            asked = _Asked(argv)
            if asked.shards.merges:
                sys.exit(_merge(asked))
            job = _Job(asked)
        with job.output:
            code = job.run()
    except ShardsMissingError as e:
        _tell(f"{e}: run what is missing, and merge again")
        sys.exit(interrupts.AGAIN)
    except OutputError as e:
        hint = "; what is there is whole: make room, and run the same command again"
        _tell(f"{e}{hint if e.is_full else ''}")
        sys.exit(_OUTPUT_LOST)
    except (jax.errors.JaxRuntimeError, EngineDeadError) as e:
        # What had ended by then is written: see `OutputFile.__exit__`.
        text = " ".join(str(e).split())
        _tell(
            f"the device failed: {text[:_MAX_REASON]}: results so far are kept; run the same "
            "command again, for want of memory with a smaller --memory_fraction"
        )
        sys.exit(_DEVICE_LOST)
    sys.exit(code)


class _Asked:
    """What the flags ask for, of which nothing is done yet.

    Attributes:
      shards: what this process is to do of it.
      input, ids: the rows.
      output: where all of them go, in the end.
      model: its files.
      params: of rows that say nothing else.
      options: of the chat template.
      config: the engine's.
      manifest: what the results depend on, on whatever machine.
    """

    def __init__(self, argv: list[str]):
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments {argv[1:]}; give files as --input=...")
        self.shards = shards_from_flags()
        self.params = sampling_params_from_flags(_SAMPLING)
        self.options = chat_options_from_flags()
        _date()  # before anything is read
        self.config = _engine_config()
        self.output = _output_path()
        if not _MODEL.value:
            raise ValueError("--model is empty; name a directory, or leave the flag out")
        if not _INPUT.value:
            raise ValueError("no input: give --input=FILE, or --input=- for standard input")
        self.input = open_input(_INPUT.value, None if sys.stdin is None else sys.stdin.buffer)
        _check_apart(self.input, self.output)
        self.ids: RowIds = self.input.check(progress=True)
        self.model = programs.model_path(_MODEL.value)
        self.manifest = asked_for(
            input_sha256=self.input.sha256,
            num_rows=len(self.ids),
            model=self.model,
            params=self.params,
            options={**self.options},
            seed=_SEED.value,
            output=self.output,
        )


def _merge(asked: _Asked) -> int:
    """Merges the shards' outputs. Returns: the exit code."""
    num_errors = merge(
        asked.output, asked.ids, asked.shards.number, asked.manifest, mix=_MIX.value, progress=True
    )
    return _tell_done(len(asked.ids), num_errors)


class _Job:
    """The rows that this process is asked to do.

    Attributes:
      output: open, with what is done already.
    """

    def __init__(self, asked: _Asked):
        self._asked, self._ids, path, config = asked, asked.ids, asked.output, asked.config
        manifest = asked.manifest
        if asked.shards.own is not None:
            shard = asked.shards.own, asked.shards.number
            self._ids, path = self._ids.shard(*shard), shard_path(path, *shard)
            manifest = manifest | shard_entry(*shard)
        programs.require_device()
        self._path, self._encode = path, RecordMaker(None, _MODEL.value)
        self.output = open_output(
            path, self._ids, self._line, sync_rows=_SYNC_ROWS.value, sync_s=_SYNC_S.value
        )
        try:
            before = read_manifest(path)
            if before is not None and config.num_pages is None:
                # As many pages as the first run found memory for: what has room depends on it.
                config = dataclasses.replace(
                    config, num_pages=before.get("engine", {}).get("num_pages")
                )
            self._config, self._is_new = config, before is None
            self._manifest = manifest | run_with(config)
            if date := _date() or (before or {}).get("date"):
                self._manifest["date"] = date
            if before is not None:
                check_same(path, before, self._manifest, mix=_MIX.value)
        except BaseException:
            self.output.close()
            raise

    def run(self) -> int:
        """Runs the rows that have no result. Returns: the exit code."""
        output, total = self.output, len(self._ids)
        if output.num_dropped_bytes:
            _tell(f"dropped {output.num_dropped_bytes} bytes of a record that was cut short")
        if output.num_done:
            _tell(f"{output.num_done} of {total} rows are done already")
        if not output.is_done:
            with programs.usage_errors():
                engine = Engine.load(self._asked.model, self._config)
                if self._config.strict_shapes:
                    self._warm_up(engine)
            if self._is_new:
                self._manifest["engine"]["num_pages"] = engine.stats().num_usable_pages + 1
                if engine.chat_template.asks_for_date(self._asked.options):
                    self._manifest.setdefault("date", datetime.date.today().isoformat())
                write_manifest(self._path, self._manifest)
            self._encode = RecordMaker(engine.tokenizer, _MODEL.value)
            with (
                interrupts.noted_to_go_on() as note,
                programs.usage_errors(),
                self._snapshot() as snapshot,
                monitored(engine, lambda: output.num_done, total) as tell,
            ):
                run(
                    self._rows(engine),
                    output,
                    engine,
                    seed=_SEED.value,
                    ordered=_ORDERED.value,
                    stop=lambda: note.asked,
                    on_step=tell,
                    grace_s=_GRACE_S.value,
                    progress=True,
                    total=total,
                    num_before=output.num_done,
                    snapshot=snapshot,
                )
                output.sync()
                if not note.asked:
                    engine.save_prompts()
        left = total - output.num_done
        if left:
            done = f"{output.num_done} of {total} rows are done"
            _tell(f"{done}{_with(output.num_errors)}; run the same command again")
            return interrupts.AGAIN
        output.sort()
        remove_snapshot(self._path)
        return _tell_done(total, output.num_errors)

    def _warm_up(self, engine: Engine) -> None:
        """Compiles what the rows ask for, so that none is refused for want of it."""
        longest: dict[SamplingParams, float] = {}
        rows = tqdm.tqdm(self._rows(engine), "planning", unit="row", delay=2, disable=None)
        for row in rows:
            if row.error is None:
                # What calls nothing, or less of the same, is not planned for again.
                own = dataclasses.replace(row.params, seed=None, priority=0, max_tokens=None)
                longest[own] = max(longest.get(own, 0), row.params.max_tokens or math.inf)
        for own, most in longest.items():
            if most < math.inf:
                own = dataclasses.replace(own, max_tokens=int(most))
            with contextlib.suppress(ValueError):  # the row's record says what is wrong with it
                engine.warm_up(params=[own])

    def _snapshot(self) -> contextlib.AbstractContextManager[Snapshot | None]:
        if not _SNAPSHOT_S.value:
            return contextlib.nullcontext()
        path, every_s = snapshot_path(self._path), _SNAPSHOT_S.value
        found = Snapshot(path, self._manifest, self.output.lacks, every_s=every_s)
        if found.num_rows:
            _tell(
                f"{found.num_rows} rows that ran go on from the {found.num_tokens} tokens that "
                "they have"
            )
        return found

    def _line(self, result: Result) -> bytes:
        return encode_record(self._encode.record(result))

    def _rows(self, engine: Engine) -> Iterator[Row]:
        def complete(params: SamplingParams) -> SamplingParams:
            return with_fallbacks(params, engine.defaults)

        options: Any = {**self._asked.options, "date": self._manifest.get("date")}
        reader = RowReader(
            params=self._asked.params,
            tokenizer=engine.tokenizer,
            template=engine.chat_template,
            options=options,
            complete=complete,
        )
        lacks = self.output.lacks
        return (reader.row(line) for line in self._asked.input if lacks(line.row_id))


def _date() -> str | None:
    """The day that is given; however it is written, the same day is the same job's."""
    return None if _DATE.value is None else checked_date("--date", _DATE.value).date().isoformat()


def _engine_config() -> EngineConfig:
    given = [
        field.name for field in dataclasses.fields(EngineConfig) if flags.FLAGS[field.name].present
    ]
    return for_jobs(programs.engine_config_from_flags(), given)


def _output_path() -> pathlib.Path:
    given = _OUTPUT.value
    if not given or given == "-":
        raise ValueError(
            "no output: give --output=FILE; standard output cannot be gone on with, and is none"
        )
    path = pathlib.Path(given).expanduser()
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"--output={given} must be a regular file, as it is gone on with")
    if not path.parent.is_dir():
        raise ValueError(f"--output={given}: there is no directory {str(path.parent)!r}")
    return path


def _check_apart(given: Input, output: pathlib.Path) -> None:
    if any(output.exists() and path.samefile(output) for path in given.paths):
        raise ValueError(f"--output={output} is an input too; name another file")


def _with(num_errors: int) -> str:
    return f", {num_errors} of them with an error" if num_errors else ""


def _tell_done(total: int, num_errors: int) -> int:
    """Says that all rows are done. Returns: the exit code."""
    _tell(f"{total} rows are done{_with(num_errors)}")
    return 1 if num_errors else 0


def _tell(text: str) -> None:
    print(f"jpaged batch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    programs.run(main)
