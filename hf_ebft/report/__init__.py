"""Reports of runs: one page with curves, samples, configuration and signs of trouble.

    hf-ebft report outputs/demo --output report.html --png figures/

Training needs nothing from here. A page needs no package except matplotlib.
"""

from hf_ebft.report.health import Finding, examine
from hf_ebft.report.page import render_page
from hf_ebft.report.plots import charts_of, write_pngs
from hf_ebft.report.runs import Run, Sample, Watched, load_run, load_runs

__all__ = [
    "Finding",
    "Run",
    "Sample",
    "Watched",
    "charts_of",
    "examine",
    "load_run",
    "load_runs",
    "render_page",
    "write_pngs",
]
