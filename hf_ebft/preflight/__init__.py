"""A look before the money is spent: what a run costs, and whether it can find its way.

    from hf_ebft.preflight import preflight

    found = preflight(trainer, documents=64, minutes=10)
    for finding in found.findings:
        print(finding.title, finding.evidence, finding.advice)

`hf-ebft preflight --config run.yaml` does it from the command line; docs/preflight.md says what is
measured and how to read it.
"""

from hf_ebft.preflight.result import Preflight
from hf_ebft.preflight.run import preflight

__all__ = ["Preflight", "preflight"]
