# SPDX-License-Identifier: Apache-2.0
"""scripts/measure/paper_figures.py, and the report that it wrote."""

import json
import re
import runpy

import pytest

from jpaged.scripts.measure.paper_figures import fill
from jpaged.simulation.lengths import SHAREGPT
from jpaged.simulation.paper import PAPER
from jpaged.simulation.serving import Serving, serve
from jpaged.simulation.workload import make_workload
from tests.scripts.programs import ROOT, run

REPORT = ROOT / "docs" / "paper_figures.md"
SOURCE = ROOT / "docs" / "paper_figures"
FIGURES = json.loads((SOURCE / "figures.json").read_text(encoding="utf-8"))


class TestReport:
    def test_is_what_its_figures_and_template_make(self):
        template = (SOURCE / "template.md").read_text(encoding="utf-8")
        assert fill(template, FIGURES) == REPORT.read_text(encoding="utf-8")

    def test_an_unknown_table_is_an_error(self):
        with pytest.raises(KeyError, match="nothing"):
            fill("{{nothing}}", FIGURES)

    def test_its_links_lead_somewhere(self):
        links = re.findall(r"\]\((paper_figures/[^)]*)\)", REPORT.read_text(encoding="utf-8"))
        assert len(links) >= 7
        for link in links:
            assert (REPORT.parent / link).is_file(), link

    @pytest.mark.parametrize("policy", ["contiguous-max", "contiguous-oracle", "paged"])
    def test_is_up_to_date(self, policy):
        """A run of the report, again; a scheduler that has changed a little needs no new report."""
        work = make_workload(
            2000,
            *SHAREGPT.values(),
            max_model_len=2048,
            vocab_size=50_272,
            seed=0,
        )
        again, recorded = serve(policy, work), FIGURES["full"]["sharegpt"][policy]
        margin = 0.02 if policy == "paged" else 1e-3
        assert again.mean_running == pytest.approx(recorded["mean_running"], rel=margin)
        assert again.live_share == pytest.approx(recorded["live_share"], rel=margin)
        assert set(recorded) == {*Serving.__dataclass_fields__, "live_share", "waste"}

    def test_plots_are_the_same_each_time(self, tmp_path):
        pytest.importorskip("matplotlib", reason="plots need matplotlib: make figures")
        folders = tmp_path / "a", tmp_path / "b"
        for folder in folders:
            folder.mkdir()
            runpy.run_path(str(SOURCE / "plots.py"))["draw"](FIGURES, PAPER, folder)
        names = sorted(path.name for path in folders[0].iterdir())
        assert names == sorted(path.name for path in SOURCE.glob("*.svg"))
        for name in names:
            first, second = ((folder / name).read_bytes() for folder in folders)
            assert first == second
            assert b"<dc:date>" not in first


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--output=README.md"], "--output=README.md: "),
        ([], "--output"),
        (["--output=docs", "extra"], "unexpected arguments"),
    ],
)
def test_bad_usage_is_one_line(args, message):
    pytest.importorskip("matplotlib", reason="the report needs matplotlib: make figures")
    said = run("scripts.measure.paper_figures", *args, code=2)
    assert message in said
    assert said.count("\n") == 1, said
