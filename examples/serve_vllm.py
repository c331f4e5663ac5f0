"""Start the vLLM server that a run samples from, with the run's own YAML.

    python examples/serve_vllm.py --config run.yaml --python .venv-vllm/bin/python

`--help` says more. Without a clone: `python -m hf_ebft.structured.vllm.serving`.
"""

from hf_ebft.structured.vllm.serving import main

if __name__ == "__main__":
    main()
