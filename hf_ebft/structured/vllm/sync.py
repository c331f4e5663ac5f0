"""Writes the policy's weights to a folder that a running vLLM server sees, and lets it load them.

Every version has its own name and folder, since a server that loads the same folder again keeps
caches of the earlier weights. A folder is written under another name first and renamed when it is
complete. All processes call `publish` together; only the main one writes and talks to the server.
"""

from __future__ import annotations

import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hf_ebft.structured.vllm.adapters import adapter_weights, check_adapter
from hf_ebft.structured.vllm.answers import ServedModel
from hf_ebft.structured.vllm.client import VLLMClient
from hf_ebft.structured.vllm.errors import VLLMServerError
from hf_ebft.structured.vllm.leftovers import new_run_name, remove_leftovers
from hf_ebft.structured.vllm.processes import on_main_process
from hf_ebft.structured.vllm.settings import VLLMServerArguments

logger = logging.getLogger(__name__)

KEPT_VERSIONS = 2
"""Adapters that the server keeps: the current one and, for open requests, the previous one."""


class WeightSync(ABC):
    """Sends versions of the policy to one server.

    Args:
        client: the client of the server.
        settings: the settings, with the folder.
        output_dir: the run's folder, for the default folder.
    """

    def __init__(
        self, client: VLLMClient, settings: VLLMServerArguments, output_dir: str | None
    ) -> None:
        self.client = client
        self.settings = settings
        self.run = new_run_name()
        parent = settings.vllm_sync_dir or os.path.join(output_dir or ".", "vllm_sync")
        self.folder = Path(os.path.abspath(parent)) / self.run
        self.versions = 0

    @staticmethod
    @abstractmethod
    def check(policy: Any, settings: VLLMServerArguments) -> None:
        """Raise for a policy that cannot be sent.

        Raises:
            ValueError: naming the reason, and what to do instead.
        """

    @staticmethod
    @abstractmethod
    def check_server(policy: Any, client: VLLMClient) -> None:
        """Raise, on the main process, for a server that cannot load this policy's weights.

        Raises:
            VLLMServerError: naming the reason, and what to do instead.
        """

    @abstractmethod
    def publish(
        self, policy: Any, accelerator: Accelerator, wrapped: Any, served: ServedModel
    ) -> str:
        """Send the policy's current weights. All processes must call this together.

        Args:
            policy: the unwrapped policy.
            accelerator: the accelerator that prepared it.
            wrapped: the policy as the accelerator returned it.
            served: the server's base model.

        Returns:
            The name of the model to sample from.
        """

    @abstractmethod
    def forget(self) -> None:
        """Unload from the server what was sent to it, on the main process."""

    def remove_leftovers(self) -> None:
        """Remove what killed trainers left behind, on the main process."""
        remove_leftovers(self.client, self.folder.parent)

    def close(self) -> None:
        """Remove everything from the server and the disk; problems are logged."""
        if self.versions == 0:
            return
        try:
            self.forget()
        except VLLMServerError as error:
            logger.warning("could not clean up on the vLLM server: %s", error)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.versions = 0

    def _write(self, name: str, write: Callable[[Path], None]) -> Path:
        """Write a folder, and give it its name when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        return partial.rename(self.folder / name)

    def _on_server(self, path: Path) -> str:
        """The path of a folder of this run on the server's machine."""
        root = self.settings.vllm_sync_dir_on_server
        return str(path) if root is None else os.path.join(root, self.run, path.name)


class AdapterSync(WeightSync):
    """Sends a LoRA adapter; the server keeps the current and the previous version."""

    def __init__(
        self, client: VLLMClient, settings: VLLMServerArguments, output_dir: str | None
    ) -> None:
        super().__init__(client, settings, output_dir)
        self._sent: list[Path] = []

    @staticmethod
    def check(policy: Any, settings: VLLMServerArguments) -> None:
        """See `WeightSync.check`."""
        if not isinstance(policy, PeftModel):
            raise ValueError(
                f"vllm_lora_sync sends an adapter, and the policy ({type(policy).__name__}) has "
                "none; give the trainer a peft_config, or use vllm_full_sync."
            )
        check_adapter(policy, settings.vllm_max_lora_rank)

    @staticmethod
    def check_server(policy: Any, client: VLLMClient) -> None:
        """Check nothing: the server checks an adapter when it loads it."""

    def publish(
        self, policy: Any, accelerator: Accelerator, wrapped: Any, served: ServedModel
    ) -> str:
        """See `WeightSync.publish`."""
        weights = adapter_weights(policy, accelerator, wrapped)
        config = policy.peft_config[policy.active_adapters[0]]

        def write(folder: Path) -> None:
            save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
            config.save_pretrained(str(folder))

        return on_main_process(lambda: self._send(write))

    def _send(self, write: Callable[[Path], None]) -> str:
        self.versions += 1
        name = f"{self.run}-{self.versions:06d}"
        folder = self._write(name, write)
        # Before the request: a server that was too slow to answer may still load it.
        self._sent.append(folder)
        self.client.load_adapter(name, self._on_server(folder))
        while len(self._sent) > KEPT_VERSIONS:
            self._drop(self._sent.pop(0))
        return name

    def _drop(self, folder: Path, at_the_end: bool = False) -> None:
        self.client.unload_adapter(folder.name, at_the_end=at_the_end)
        # The folder may be gone already, if somebody has cleaned up the disk.
        shutil.rmtree(folder, ignore_errors=True)

    def forget(self) -> None:
        """Unload the adapters that the server has."""
        while self._sent:
            self._drop(self._sent.pop(), at_the_end=True)


class FullWeightSync(WeightSync):
    """Sends all weights; the server has one version at a time, under its base model's name."""

    @staticmethod
    def check(policy: Any, settings: VLLMServerArguments) -> None:
        """See `WeightSync.check`."""
        if isinstance(policy, PeftModel):
            raise ValueError(
                "vllm_full_sync sends all weights of a policy that is trained whole, and this one "
                "has an adapter; use vllm_lora_sync."
            )
        if not isinstance(policy, PreTrainedModel):
            raise ValueError(
                f"vllm_full_sync saves the policy with save_pretrained, which a "
                f"{type(policy).__name__} does not have; train a transformers model."
            )

    @staticmethod
    def check_server(policy: Any, client: VLLMClient) -> None:
        """See `WeightSync.check_server`."""
        if not policy.config.get_text_config(decoder=True).tie_word_embeddings:
            return
        device = client.device()
        if device == "cpu":
            # Seen in vLLM 0.31; small updates would stay below the tolerance in bfloat16.
            raise VLLMServerError(
                f"the policy ties its head to its embeddings, and the vLLM server at {client.url} "
                "runs on a CPU, where it silently keeps the old head when weights are reloaded; "
                "serve and train a copy of the model saved with tie_word_embeddings=False, or "
                "train an adapter (vllm_lora_sync)."
            )
        if device is None:
            logger.warning(
                "the policy ties its head to its embeddings, and the vLLM server at %s does not "
                "say what it runs on; on a CPU it would keep the old head when weights are "
                "reloaded.",
                client.url,
            )

    def publish(
        self, policy: Any, accelerator: Accelerator, wrapped: Any, served: ServedModel
    ) -> str:
        """See `WeightSync.publish`."""
        weights = accelerator.get_state_dict(wrapped)

        def send() -> str:
            self.versions += 1
            before = self.folder / f"weights-{self.versions - 1:06d}"
            folder = self._write(
                f"weights-{self.versions:06d}",
                lambda path: policy.save_pretrained(str(path), state_dict=weights),
            )
            # A server that reloads from a folder without weights crashes at the next request.
            if not any(folder.glob("*.safetensors")):
                raise VLLMServerError(f"no weights were saved in {folder}.")
            self.client.reload_weights(self._on_server(folder))
            shutil.rmtree(before, ignore_errors=True)
            return served.name

        return on_main_process(send)

    def forget(self) -> None:
        """Unload nothing: the server keeps the last weights."""
