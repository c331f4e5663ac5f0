"""Writes the policy's weights to a folder that a running vLLM server sees, and has it load them.

Every version has a name and a folder of its own, written under another name first and renamed when
it is complete: a server that loads the same folder again keeps caches of the earlier weights.
All processes call `publish` together; only the main one writes and talks to the server.
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
"""Adapters that the server holds: the current one and, for requests under way, the one before."""


class WeightSync(ABC):
    """Sends versions of the policy to one server.

    Args:
        client: of the server.
        settings: where the folder is.
        output_dir: of the run, for the default folder.
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
        """Refuse a policy that cannot be sent.

        Raises:
            ValueError: naming what stands in the way, and what to do instead.
        """

    @staticmethod
    @abstractmethod
    def check_server(policy: Any, client: VLLMClient) -> None:
        """Refuse a server that cannot take this policy's weights, on the main process.

        Raises:
            VLLMServerError: what stands in the way, and what to do instead.
        """

    @abstractmethod
    def publish(
        self, policy: Any, accelerator: Accelerator, wrapped: Any, served: ServedModel
    ) -> str:
        """Send the policy's weights as they are. All processes must call this together.

        Args:
            policy: unwrapped.
            accelerator: what prepared it.
            wrapped: the policy as prepared.
            served: the server's base model.

        Returns:
            The name to sample from.
        """

    @abstractmethod
    def forget(self) -> None:
        """Take back from the server what was sent to it, on the main process."""

    def remove_leftovers(self) -> None:
        """Clear away what trainers that were killed left behind, on the main process."""
        remove_leftovers(self.client, self.folder.parent)

    def close(self) -> None:
        """Leave nothing behind on the server or on the disk; problems are logged."""
        if self.versions == 0:
            return
        try:
            self.forget()
        except VLLMServerError as error:
            logger.warning("could not clean up on the vLLM server: %s", error)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.versions = 0

    def _write(self, name: str, write: Callable[[Path], None]) -> Path:
        """Have a folder written, and give it its name when it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        return partial.rename(self.folder / name)

    def _on_server(self, path: Path) -> str:
        """The path by which the server knows a folder of this run."""
        root = self.settings.vllm_sync_dir_on_server
        return str(path) if root is None else os.path.join(root, self.run, path.name)


class AdapterSync(WeightSync):
    """Sends a LoRA adapter; the server keeps the current version and the one before."""

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
        """Nothing: the server checks what it loads, and says what is wrong."""

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
        # Remembered first: a server that was too slow to answer may still load it.
        self._sent.append(folder)
        self.client.load_adapter(name, self._on_server(folder))
        while len(self._sent) > KEPT_VERSIONS:
            self._drop(self._sent.pop(0))
        return name

    def _drop(self, folder: Path, at_the_end: bool = False) -> None:
        self.client.unload_adapter(folder.name, at_the_end=at_the_end)
        # Whoever cleaned up the disk in the meantime has done this already.
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
            # A server that is sent to a folder without weights dies at the next request.
            if not any(folder.glob("*.safetensors")):
                raise VLLMServerError(f"no weights were saved in {folder}.")
            self.client.reload_weights(self._on_server(folder))
            shutil.rmtree(before, ignore_errors=True)
            return served.name

        return on_main_process(send)

    def forget(self) -> None:
        """Nothing to take back: the server keeps the last weights."""
