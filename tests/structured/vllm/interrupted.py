"""A run that is interrupted while its server does not answer.

interrupted.py URL FOLDER
"""

import sys
from pathlib import Path

from tests.structured.vllm.fake_server import small_policy, small_tokenizer
from tests.structured.vllm.training import make_trainer, rollouts_for, settings_for

url, folder = sys.argv[1], Path(sys.argv[2])
rollouts = rollouts_for(settings_for(url, folder, vllm_request_timeout=600.0))
make_trainer(small_policy(), small_tokenizer(), rollouts, folder).train()
