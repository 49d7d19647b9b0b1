# SPDX-License-Identifier: Apache-2.0
"""What tests of programs share."""

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The compilation cache of the programs that tests start: they compile once a session."""
    return str(tmp_path_factory.mktemp("cache"))
