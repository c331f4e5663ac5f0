"""One page about one or several runs: curves, samples, configuration, what looks unhealthy.

    python examples/report.py outputs/demo                     # report.html
    python examples/report.py outputs/a outputs/b --output comparison.html --png figures/

The same as `python -m hf_ebft.report`; docs/report.md says how to read it.
"""

from __future__ import annotations

from hf_ebft.report.__main__ import main

if __name__ == "__main__":
    main()
