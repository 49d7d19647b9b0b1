# SPDX-License-Identifier: Apache-2.0
"""Makes the API reference from the docstrings: `make docs`, or python docs/api.py DIRECTORY."""

import pathlib
import sys

import pdoc

import jpaged

# Each alone: what else there is serves these.
MODULES = (
    "jpaged",
    "jpaged.streams",
    "jpaged.text",
    "jpaged.host.config",
    "jpaged.host.outputs",
    "jpaged.host.page_pool",
    "jpaged.host.page_table",
    "jpaged.host.params",
    "jpaged.host.prefix_cache",
    "jpaged.host.stats",
    "jpaged.host.viewer",
    "jpaged.integrations.engine_thread",
    "jpaged.integrations.ray_data",
    "jpaged.integrations.record_server",
    "jpaged.jobs",
    "jpaged.measure.runs",
    "jpaged.models",
    "jpaged.models.checkpoint",
    "jpaged.models.config",
    "jpaged.models.decoder",
    "jpaged.models.inputs",
    "jpaged.models.shapes",
    "jpaged.models.sharding",
    "jpaged.pallas_kernels",
    "jpaged.pallas_kernels.aot",
    "jpaged.pallas_kernels.conformance",
    "jpaged.pallas_kernels.reference",
    "jpaged.pallas_kernels.tuning",
    "jpaged.simulation",
    "jpaged.telemetry.monitor",
    "jpaged.telemetry.record",
)


def main(directory: pathlib.Path) -> None:
    """Writes index.html and a page for each of `MODULES`."""
    # pdoc looks for names in the module itself, and these come on first use.
    vars(jpaged).update({name: getattr(jpaged, name) for name in jpaged.__all__})
    pdoc.render.configure(docformat="google", footer_text=f"jpaged {jpaged.__version__}")
    only = (spec for name in MODULES for spec in (name, rf"!{name}\..*"))
    pdoc.pdoc(*only, output_directory=directory)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
