"""Ways of distributing a run that are not supported are refused, in both modes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.parallelism_config import ParallelismConfig
from transformers import Trainer

from hf_ebft import EBFTTrainer
from tests.support.tiny import config, tiny_llama


def strided(folder: Path) -> tuple[Any, Callable[[], Any]]:
    args = config(folder)
    return args, lambda: EBFTTrainer(tiny_llama(), args)


def structured(folder: Path) -> tuple[Any, Callable[[], Any]]:
    pytest.importorskip("trl")
    from hf_ebft.structured import EBFTGRPOTrainer
    from tests.support import tiny_structured as tiny

    args = tiny.config(folder)
    return args, lambda: EBFTGRPOTrainer(
        tiny.policy(), args, train_dataset=tiny.rows(), processing_class=tiny.tokenizer()
    )


both_modes = pytest.mark.parametrize("mode", [strided, structured])


@both_modes
@pytest.mark.parametrize("way", ["argument", "launcher"])
def test_deepspeed_is_refused(mode: Any, way: str, tmp_path: Path) -> None:
    """Set on made arguments: making them asks for the library, which is not installed here."""
    args, make = mode(tmp_path)
    if way == "argument":
        args.deepspeed = {"zero_optimization": {"stage": 2}}
    else:
        args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match=r"DeepSpeed is not supported.*fsdp2\.yaml"):
        make()


@both_modes
@pytest.mark.parametrize("size", ["cp_size", "sp_size", "tp_size"])
def test_rows_and_tensors_are_not_split(mode: Any, size: str, tmp_path: Path) -> None:
    args, make = mode(tmp_path)
    args.parallelism_config = ParallelismConfig(**{size: 2})
    with pytest.raises(ValueError, match=rf"parallelism_config with {size}=2 is not supported"):
        make()


@both_modes
def test_settings_of_the_launcher_are_refused_too(
    mode: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, make = mode(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(ValueError, match="cp_size=2"):
        make()


@both_modes
@pytest.mark.parametrize(
    ("version", "full", "message"),
    [
        (1, False, r"FSDP1 is not supported.*fsdp_version: 2"),
        (2, True, r"bf16_full_eval and fp16_full_eval cast the weights.*bf16=True"),
    ],
)
def test_unsupported_settings_of_fsdp_are_refused(
    mode: Any,
    version: int,
    full: bool,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its plugin alone: accelerate starts FSDP on an accelerator only."""
    args, make = mode(tmp_path)
    args.bf16_full_eval = full
    original = Trainer.create_accelerator_and_postprocess

    def create(trainer: Trainer) -> None:
        original(trainer)
        plugin = SimpleNamespace(fsdp_version=version)
        monkeypatch.setitem(trainer.accelerator.state._shared_state, "fsdp_plugin", plugin)
        monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create)
    with pytest.raises(ValueError, match=message):
        make()
