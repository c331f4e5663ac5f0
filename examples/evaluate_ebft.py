"""Measure models on held-out text, side by side; the same as `hf-ebft evaluate`."""

import sys

from hf_ebft.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
