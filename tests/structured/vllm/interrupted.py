"""A run that is interrupted while its server does not answer.

interrupted.py URL FOLDER
"""

import sys
from pathlib import Path

from tests.support.fake_vllm import small_policy, small_tokenizer
from tests.support.vllm_training import make_trainer, rollouts_for, settings_for

url, folder = sys.argv[1], Path(sys.argv[2])
rollouts = rollouts_for(settings_for(url, folder, vllm_request_timeout=600.0))
make_trainer(small_policy(), small_tokenizer(), rollouts, folder).train()
