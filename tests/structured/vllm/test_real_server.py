"""The whole way, with a real vLLM server on the CPU. `pytest -m vllm`, minutes.

Needs an environment with vLLM, `.venv-vllm` or the one whose interpreter HF_EBFT_VLLM_PYTHON names,
and skips itself without one. The server is started by examples/serve_vllm.py, as a user would.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("trl")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_ebft.structured import EBFTGRPOConfig, EBFTGRPOTrainer
from hf_ebft.structured.vllm.rollouts import VLLMRollouts
from hf_ebft.structured.vllm.settings import VLLMServerSettings
from tests.support.fake_vllm import small_policy, small_tokenizer
from tests.support.plain_forwards import plain_log_probs
from tests.support.tiny import logged
from tests.support.vllm_training import PROMPTS, lora, make_trainer

ROOT = Path(__file__).parents[3]
PYTHON = Path(os.environ.get("HF_EBFT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no vLLM environment at {PYTHON}"),
    pytest.mark.filterwarnings("ignore:.*rollout_func.*:UserWarning"),
]

# float32 on both sides: what is left is the order of additions.
ROUNDING = 1e-4


class Server:
    """A vLLM server of a small model, started by the example script."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.model = folder / "model"
        # vLLM has attention for head sizes of 32 and more.
        policy = small_policy(
            hidden_size=64, intermediate_size=96, max_position_embeddings=512, initializer_range=0.1
        )
        policy.save_pretrained(self.model)
        small_tokenizer().save_pretrained(self.model)
        self.config = folder / "run.yaml"
        self.config.write_text(
            yaml.safe_dump(
                {
                    "model_name_or_path": str(self.model),
                    "vllm_lora_sync": True,
                    "vllm_server_base_url": self.url,
                    "vllm_max_model_length": 512,
                    "bf16": False,
                    "use_cpu": True,
                }
            )
        )
        self.process = None
        self.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def start(self):
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            # Both kinds of sync with one server.
            "VLLM_SERVER_DEV_MODE": "1",
        }
        command = [sys.executable, str(ROOT / "examples" / "serve_vllm.py")]
        command += ["--config", str(self.config), "--python", str(PYTHON), "--cpu_cache_gib", "1"]
        with open(self.folder / "server.log", "a") as log:
            self.process = subprocess.Popen(
                [*command, "--", "--max-num-seqs", "16"],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self):
        """As a crash would: the server and its engine at once."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("vllm"))
    yield running
    running.kill()


def settings_for(server, folder, **settings):
    if "vllm_full_sync" not in settings:
        settings["vllm_lora_sync"] = True
    return VLLMServerSettings(
        vllm_server_base_url=server.url, vllm_sync_dir=str(folder / "sync"), **settings
    )


def policy_of(server):
    return AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32)


@pytest.fixture
def start(server, tmp_path):
    made = []

    def build(settings=None, **options):
        rollouts = VLLMRollouts(settings_for(server, tmp_path, **(settings or {})))
        made.append(rollouts)
        model, tokenizer = policy_of(server), small_tokenizer()
        return make_trainer(model, tokenizer, rollouts, tmp_path, **options)

    yield build
    for rollouts in made:
        rollouts.close()


class Watch:
    """Compares the log-probs of all completions of a run with the policy's when they come."""

    def __init__(self, trainer):
        self.differences = []
        self.samples = []
        rollouts = trainer.rollout_func

        def watching(prompts, current):
            found = rollouts(prompts, current)
            for prompt, tokens, theirs in zip(*found.values(), strict=True):
                ours = plain_log_probs(current.model, prompt, tokens, current.temperature)
                self.differences.append((ours - torch.tensor(theirs)).abs().max().item())
            self.samples.append(found["completion_ids"])
            return found

        trainer.rollout_func = watching


def test_adapters_change_what_the_server_samples_and_log_probs_stay_the_policys(start, capsys):
    trainer = start(max_steps=4, learning_rate=3e-2)
    rollouts = trainer.rollout_func
    watch = Watch(trainer)
    before = rollouts([PROMPTS[0]] * 4, trainer)
    trainer.train()
    after = rollouts([PROMPTS[0]] * 4, trainer)
    moved = [
        (plain_log_probs(trainer.model, prompt, tokens, 0.7) - torch.tensor(theirs)).abs().max()
        for prompt, tokens, theirs in zip(*before.values(), strict=True)
    ]
    assert len(watch.samples) == 4
    assert max(watch.differences) < ROUNDING
    # Four syncs moved the policy by far more than rounding, and the server with it.
    assert max(moved) > 0.5
    assert before["completion_ids"] != after["completion_ids"]
    report(
        capsys,
        f"LoRA sync: {len(watch.differences)} completions in 4 steps, largest difference of "
        f"log-probs {max(watch.differences):.1e}; the policy itself moved by "
        f"{float(max(moved)):.2f} nats",
    )


def test_an_adapter_of_the_embedding_is_applied(start):
    trainer = start(peft=lora(target_modules=["embed_tokens", "q_proj"]))
    with torch.no_grad():  # at PEFT's random scale it drowns the model
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.15)
    found = trainer.rollout_func([PROMPTS[0]] * 4, trainer)
    for prompt, tokens, theirs in zip(*found.values(), strict=True):
        ours = plain_log_probs(trainer.model, prompt, tokens, 0.7)
        assert (ours - torch.tensor(theirs)).abs().max() < ROUNDING
        with trainer.model.disable_adapter():
            base = plain_log_probs(trainer.model, prompt, tokens, 0.7)
        assert (base - ours).abs().max() > 0.1


def test_the_scores_of_a_text_are_the_policys(start):
    trainer = start({"async_prefetch": True})
    rollouts = trainer.rollout_func
    rollouts([PROMPTS[0]], trainer)
    text = list(range(5, 60))
    scores = rollouts.client.score(rollouts._policy.version.name, text)
    ours = plain_log_probs(trainer.model, text[:1], text[1:], 1.0)
    assert (ours - torch.tensor(scores)).abs().max() < ROUNDING


def test_a_rank_above_the_servers_is_refused_in_its_words(start):
    trainer = start({"vllm_max_lora_rank": 64}, peft=lora(32))
    with pytest.raises(RuntimeError, match="rank 32 is greater than max_lora_rank 16"):
        trainer.rollout_func([PROMPTS[0]], trainer)


def test_another_model_than_the_policy_is_refused(server, tmp_path):
    other = small_policy(
        seed=1,
        hidden_size=64,
        intermediate_size=96,
        max_position_embeddings=512,
        initializer_range=0.1,
    )
    rollouts = VLLMRollouts(settings_for(server, tmp_path))
    trainer = make_trainer(other, small_tokenizer(), rollouts, tmp_path)
    with pytest.raises(RuntimeError, match="handshake at the start"):
        rollouts([PROMPTS[0]], trainer)
    rollouts.close()


def test_prefetching(start):
    trainer = start({"async_prefetch": True}, max_steps=3)
    trainer.train()
    assert logged(trainer, "vllm/staleness") == [0, 1, 1]


def test_ebft_trains_on_rollouts_of_the_server(server, tmp_path, capsys):
    rows = [{"prompt": text, "ground_truth": " pass\n    return 1\n"} for text in PROMPTS]
    args = EBFTGRPOConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=8,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        vllm_lora_sync=True,
        vllm_sync_interval=2,
        vllm_server_base_url=server.url,
    )
    trainer = EBFTGRPOTrainer(
        model=policy_of(server),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=small_tokenizer(),
        peft_config=LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    trainer.train()
    trainer.rollout_func.close()
    assert logged(trainer, "vllm/staleness") == [0, 1, 0, 1]
    assert len(logged(trainer, "ebft/alignment")) == 4
    assert max(logged(trainer, "vllm/handshake_difference")) < ROUNDING
    report(
        capsys,
        "EBFT: 4 steps, a sync every second; handshake differences "
        f"{[f'{value:.1e}' for value in logged(trainer, 'vllm/handshake_difference')]}",
    )


def test_a_server_killed_between_steps_is_waited_for_and_gets_the_adapter_again(
    server, start, capsys
):
    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                server.kill()
                server.start()
                self.at = time.monotonic()

    kill = Kill()
    # No sync is due when it is killed: the loss of the adapter has to be noticed.
    trainer = start({"vllm_sync_interval": 4}, max_steps=4)
    trainer.add_callback(kill)
    watch = Watch(trainer)
    trainer.train()
    assert trainer.state.global_step == 4
    assert [len(ids) for ids in watch.samples] == [8] * 4
    assert all(all(ids) for ids in watch.samples)
    assert logged(trainer, "vllm/restarts") == [1]
    # Steps 1 and 3 sample from weights just sent.
    fresh = [d for i, d in enumerate(watch.differences) if i // 8 in (0, 2)]
    assert max(fresh) < ROUNDING
    report(
        capsys,
        f"restart: {time.monotonic() - kill.at:.0f} s from the kill to the end of training, "
        f"largest difference of log-probs on fresh weights {max(fresh):.1e}",
    )


def test_full_weights_are_reloaded(start, capsys):
    trainer = start({"vllm_full_sync": True}, peft=None, max_steps=3, learning_rate=1e-3)
    watch = Watch(trainer)
    trainer.train()
    assert max(watch.differences) < ROUNDING
    report(
        capsys,
        f"full weights: {len(watch.differences)} completions in 3 steps, largest difference of "
        f"log-probs {max(watch.differences):.1e}",
    )


def report(capsys, line):
    """Show a measured figure, captured or not."""
    with capsys.disabled():
        print(f"\n  {line}")
