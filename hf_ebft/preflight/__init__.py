"""Measures before a run what it will cost, and whether its gradient is above the noise.

    from hf_ebft.preflight import preflight

    found = preflight(trainer, documents=64, minutes=10)
    for finding in found.findings:
        print(finding.title, finding.evidence, finding.advice)

`hf-ebft preflight --config run.yaml` does the same from the command line. See docs/preflight.md.
"""

from hf_ebft.preflight.result import Preflight
from hf_ebft.preflight.run import preflight

__all__ = ["Preflight", "preflight"]
