"""Fine-tune a causal language model; the same as `hf-ebft train`."""

import sys

from hf_ebft.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
