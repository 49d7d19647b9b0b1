# SPDX-License-Identifier: Apache-2.0
"""Holds any implementation of the kernels' contract, ours or a stranger's, to dense float64.

    from jpaged.pallas_kernels import conformance
    for result in conformance.run(paged_attention=my_attention):
        print(result)

Pages are permuted, every sequence has contents of its own, and everything that no sequence owns is
poisoned: cells, queries and keys of padding tokens are NaN (integers: as large as they get), table
entries past a sequence's end are ids of other sequences' pages. The tolerance of each output
follows from the sums that lead to it and the dtypes, see `dense_attention`; it is fitted to nobody.
"""

from jpaged.pallas_kernels.conformance.cases import Case, make_case, poisoned_pool
from jpaged.pallas_kernels.conformance.checks import check_attention, check_copy, check_write
from jpaged.pallas_kernels.conformance.interpret import interpret_gpu, interpret_tpu
from jpaged.pallas_kernels.conformance.oracle import dense_attention, written_pool
from jpaged.pallas_kernels.conformance.report import Result, run, suite

__all__ = [
    "Case",
    "Result",
    "check_attention",
    "check_copy",
    "check_write",
    "dense_attention",
    "interpret_gpu",
    "interpret_tpu",
    "make_case",
    "poisoned_pool",
    "run",
    "suite",
    "written_pool",
]
