"""`python -m hf_ebft`, the same as `hf-ebft`."""

import sys

from hf_ebft.cli import main

if __name__ == "__main__":
    sys.exit(main())
