# SPDX-License-Identifier: Apache-2.0
from tests.scripts.programs import run


def test_it_needs_another_python():
    said = run("scripts.measure.compare_transformers", code=2)
    assert "--peer_python=PATH" in said
    assert said.count("\n") == 1, said
