# SPDX-License-Identifier: Apache-2.0
"""Makes one HTML page of a record: who had which page when, and who lost theirs.

    jpaged generate --prompts_file=prompts.txt --record=run.jsonl
    jpaged view run.jsonl
    jpaged view run.jsonl --output=page.html

Records are what --record=FILE of generate, batch, chat, benchmark and simulate writes; one of a run
that was killed, or goes on, is read as far as it is whole. The page is written beside the record,
as FILE.html, or where --output says, and has all that it shows in itself. Its name is printed.

Bad input exits with code 2.
"""

import os
import pathlib

from absl import app, flags

from jpaged.scripts.flags import run, usage_errors
from jpaged.telemetry.page import make_page
from jpaged.telemetry.record import read_record

_OUTPUT = flags.DEFINE_string("output", None, "The page; None puts it beside the record.")


def main(argv: list[str]) -> None:
    """Reads a record and writes the page."""
    if len(argv) != 2:
        raise app.UsageError(f"give one record, as in jpaged view FILE, not {len(argv) - 1}")
    source = pathlib.Path(argv[1]).expanduser()
    target = pathlib.Path(_OUTPUT.value or f"{source}.html").expanduser()
    with usage_errors():
        record = read_record(source)
        if not record.frames:
            raise ValueError(f"{source} has no step: the run was over, or was killed, before one")
        if target.exists() and target.samefile(source):
            raise ValueError(f"--output={target} is the record itself; name another file")
        page = make_page(record, source.name)
        # Whole or not at all: a page may be open in a browser.
        new = target.with_name(f".{target.name}.writing")
        try:
            new.write_text(page, encoding="ascii")
            os.replace(new, target)
        finally:
            new.unlink(missing_ok=True)
    print(target)


if __name__ == "__main__":
    run(main)
