"""`hf-ebft report`: one page about one or several runs, with signs of trouble.

    hf-ebft report outputs/demo
    hf-ebft report outputs/a outputs/b --output comparison.html --png figures/

A run is a folder (the output_dir of a training), a trainer_state.json, or a TensorBoard event file.
"""

from __future__ import annotations

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from hf_ebft.report import examine, load_runs, render_page, write_pngs


def main(argv: Sequence[str]) -> None:
    """Read and examine the runs, write the page, and print signs of trouble."""
    parser = ArgumentParser(
        prog="hf-ebft report",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder or file of a run")
    parser.add_argument("--output", default="report.html", help="page to write [%(default)s]")
    parser.add_argument("--png", metavar="FOLDER", help="also write the charts here, as PNGs")
    parser.add_argument("--names", nargs="+", help="names to show for the runs, one each")
    parser.add_argument("--title", default="EBFT runs", help="title of the page [%(default)s]")
    parser.add_argument(
        "--smoothing",
        type=float,
        help="weight of the past in the smoothed curves, 0 to below 1 [about a tenth of a curve]",
    )
    args = parser.parse_args(argv)
    runs = load_runs(args.runs, args.names)
    page = render_page(runs, args.title, args.smoothing)
    if args.png:
        write_pngs(runs, args.png, args.smoothing)
    Path(args.output).write_text(page, encoding="utf-8")
    for run in runs:
        for finding in examine(run):
            print(f"{run.name}: {finding.severity}: {finding.title}. {finding.evidence}")
    print(f"The report is in {args.output}; open it in any browser.")
