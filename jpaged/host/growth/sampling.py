# SPDX-License-Identifier: Apache-2.0
"""Independent samples of one prompt."""

from jpaged.host.outputs import Completion


class Sampling:
    """Samples that share their prompt and go on each by itself; see `base.Growth`."""

    reserved_places = 0
    waits_for_host = False
    chooser = None
    num_rows = 1

    def __init__(self, num_samples: int):
        self.max_sequences = num_samples

    def expects(self, num_sequences: int) -> bool:
        """Whether samples are still to be forked off."""
        return num_sequences < self.max_sequences

    def best(self, count: int, *, finished: bool) -> list[Completion] | None:
        """The samples themselves."""
        return None
