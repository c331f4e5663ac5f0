"""Start the vLLM server that a run samples from; the same as `hf-ebft serve`."""

import sys

from hf_ebft.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
