"""Settings of rollouts sampled by a stock `vllm serve`, declared once.

`EBFTGRPOConfig` inherits them. With TRL's own trainer, `VLLMServerSettings` holds them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

ServerDtype = Literal["auto", "float32", "float16", "bfloat16"]
SERVER_DTYPES: tuple[ServerDtype, ...] = get_args(ServerDtype)
SERVE_COMMAND = "hf-ebft serve"
"""Starts a server as training needs it."""
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for `--max-lora-rank`."""


@dataclass
class VLLMServerArguments:
    """Rollouts from a stock vLLM server over HTTP, weights sent through a folder.

    The server needs no extension and no NCCL; it has to see `vllm_sync_dir`. Fields with the
    names of TRL's (`vllm_server_base_url`, `_host`, `_port`, `_timeout`) have TRL's meaning
    and defaults.
    """

    vllm_lora_sync: bool = field(
        default=False,
        metadata={
            "help": "Sample with a stock `vllm serve` over HTTP. The trainer saves the LoRA "
            "adapter to vllm_sync_dir and the running server loads it. use_vllm stays false."
        },
    )
    vllm_full_sync: bool = field(
        default=False,
        metadata={
            "help": "As vllm_lora_sync, for full fine-tuning: all weights are saved, and the "
            "server reloads them in place. It must run with VLLM_SERVER_DEV_MODE=1."
        },
    )
    vllm_sync_interval: int = field(
        default=1,
        metadata={
            "help": "Optimizer steps between two weight syncs. Above 1, rollouts may be sampled "
            "from older weights; the importance ratio corrects for this with the server's "
            "log-probs."
        },
    )
    vllm_sync_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that both the trainer and the server see. Default: "
            "<output_dir>/vllm_sync."
        },
    )
    vllm_sync_dir_on_server: str | None = field(
        default=None,
        metadata={
            "help": "Path of the same folder on the server's machine, if it differs (a shared disk "
            "mounted elsewhere)."
        },
    )
    vllm_server_base_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of the server, such as http://127.0.0.1:8000. Replaces "
            "vllm_server_host and vllm_server_port."
        },
    )
    vllm_server_host: str = field(
        default="0.0.0.0",
        metadata={"help": "Host of the server, if vllm_server_base_url is unset."},
    )
    vllm_server_port: int = field(
        default=8000, metadata={"help": "Port of the server, if vllm_server_base_url is unset."}
    )
    vllm_server_timeout: float = field(
        default=240.0,
        metadata={"help": "Seconds to wait for the server, at the start and after it has stopped."},
    )
    vllm_served_model_name: str | None = field(
        default=None,
        metadata={
            "help": "Name of the base model on the server. Default: the server's only base model."
        },
    )
    vllm_dtype: ServerDtype = field(
        default="auto",
        metadata={
            "help": "Precision in which the server computes. It sets the default of "
            "vllm_handshake_tolerance. 'auto': the policy's own (bf16 and fp16 training included)."
        },
    )
    vllm_max_lora_rank: int = field(
        default=16,
        metadata={"help": "The server's --max-lora-rank: the highest rank that it accepts."},
    )
    vllm_handshake_tolerance: float | None = field(
        default=None,
        metadata={
            "help": "Largest allowed mean difference (nats/token) between the server's and the "
            "policy's log-probs of a probe text. Default: by precision."
        },
    )
    vllm_request_timeout: float = field(
        default=600.0, metadata={"help": "Seconds after which a request counts as failed."}
    )
    vllm_request_retries: int = field(
        default=5,
        metadata={
            "help": "How often a failed request is repeated (at once, then after 1, 2, 4, ... s)."
        },
    )
    vllm_max_concurrent_requests: int = field(
        default=64, metadata={"help": "Largest number of open requests of one process."}
    )
    async_prefetch: bool = field(
        default=False,
        metadata={
            "help": "Sample the next batch while the current one trains. Rollouts are then one "
            "batch older; the importance ratio corrects for this."
        },
    )

    @property
    def samples_on_server(self) -> bool:
        """Whether rollouts come from a stock vLLM server."""
        return self.vllm_lora_sync or self.vllm_full_sync

    @property
    def vllm_url(self) -> str:
        """Address of the server, without a slash at its end."""
        if self.vllm_server_base_url is not None:
            return self.vllm_server_base_url.rstrip("/")
        return f"http://{self.vllm_server_host}:{self.vllm_server_port}"

    def validate_vllm_server(self, use_vllm: bool = False) -> None:
        """Check the fields of this group.

        Args:
            use_vllm: TRL's switch for its own vLLM.

        Raises:
            ValueError: naming the field, the value, the reason and what to write instead.
        """
        for name in ("vllm_lora_sync", "vllm_full_sync", "async_prefetch"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False.")
        if self.vllm_lora_sync and self.vllm_full_sync:
            raise ValueError(
                "vllm_lora_sync and vllm_full_sync are both on, but a policy is sent either as an "
                "adapter or as full weights; keep vllm_lora_sync with a PEFT policy and "
                "vllm_full_sync without one."
            )
        if self.samples_on_server and use_vllm:
            raise ValueError(
                "use_vllm=True is TRL's own vLLM, which sends weights by NCCL or lives in the "
                "trainer; for a stock server with vllm_lora_sync or vllm_full_sync leave use_vllm "
                "at False."
            )
        if not self.samples_on_server:
            self._refuse_unused()
        _require_whole(self, "vllm_sync_interval", 1)
        _require_whole(self, "vllm_request_retries", 0)
        _require_whole(self, "vllm_max_concurrent_requests", 1)
        for name in ("vllm_server_timeout", "vllm_request_timeout"):
            _require_positive(self, name)
        if self.vllm_handshake_tolerance is not None:
            _require_positive(self, "vllm_handshake_tolerance")
        if self.vllm_dtype not in SERVER_DTYPES:
            raise ValueError(
                f"vllm_dtype={self.vllm_dtype!r} is unknown; choose one of "
                f"{', '.join(SERVER_DTYPES)}."
            )
        if self.vllm_max_lora_rank not in SERVER_RANKS:
            raise ValueError(
                f"vllm_max_lora_rank={self.vllm_max_lora_rank!r} is no rank that vLLM can be "
                f"started with; choose one of {', '.join(map(str, SERVER_RANKS))}."
            )
        if not self.vllm_url.startswith(("http://", "https://")):
            raise ValueError(
                f"vllm_server_base_url={self.vllm_server_base_url!r} is no address; write it as "
                "http://127.0.0.1:8000."
            )

    def _refuse_unused(self) -> None:
        """Raise if a setting of this group is given that nothing would read."""
        for entry in fields(VLLMServerArguments):
            value = getattr(self, entry.name)
            if entry.name not in TRL_FIELDS and value != entry.default:
                raise ValueError(
                    f"{entry.name}={value!r} belongs to rollouts from a stock vLLM server, and "
                    "neither vllm_lora_sync nor vllm_full_sync is on, so nothing would read it; "
                    "turn one of them on or leave this one out."
                )


TRL_FIELDS = (
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
)
"""Fields that TRL's `GRPOConfig` has too, with the same meaning; its own vLLM mode reads them."""


@dataclass
class VLLMServerSettings(VLLMServerArguments):
    """The settings alone, for use with a trainer whose configuration does not have them."""

    def __post_init__(self) -> None:
        self.validate_vllm_server()


def _require_whole(settings: Any, name: str, least: int) -> None:
    value = getattr(settings, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, {least} or more.")


def _require_positive(settings: Any, name: str) -> None:
    value = getattr(settings, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a number above 0.")
