"""Removes what killed trainers left on the server and on the disk; names identify them."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import socket
from pathlib import Path

import psutil

from hf_ebft.structured.vllm.client import VLLMClient
from hf_ebft.structured.vllm.errors import VLLMServerError

logger = logging.getLogger(__name__)

RUN_NAME = re.compile(
    r"ebft-(?P<host>.+)-(?P<process>\d+)-(?P<started>\d+)-[0-9a-f]{6}(?P<version>-\d{6})?"
)
CLOCK_TOLERANCE = 2.0
"""Seconds by which two reports of a process's start may differ."""


def new_run_name() -> str:
    """A name for the folders and adapters of one run, which identifies its trainer.

    Other runs, earlier ones or parallel ones, use the same server and folder.
    """
    process = psutil.Process()
    started = int(process.create_time())
    return f"ebft-{_host()}-{process.pid}-{started}-{secrets.token_hex(3)}"


def is_abandoned(name: str) -> bool:
    """Whether a run, or an adapter of it, belongs to a trainer of this machine that has ended.

    Nothing is known about trainers of other machines, so theirs do not count as abandoned.
    """
    found = RUN_NAME.fullmatch(name)
    if found is None or found["host"] != _host():
        return False
    try:
        started = psutil.Process(int(found["process"])).create_time()
    except psutil.NoSuchProcess:
        return True
    # The system may give the process id to a new process, which has another start time.
    return abs(started - int(found["started"])) > CLOCK_TOLERANCE


def remove_leftovers(client: VLLMClient, parent: Path) -> None:
    """Unload the adapters and remove the folders of trainers that have ended; log problems.

    Args:
        client: the client of the server.
        parent: folder that contains a folder for each run.
    """
    try:
        for adapter in filter(is_abandoned, client.adapter_names()):
            logger.info("unloading %s, which an ended trainer left on the server", adapter)
            client.unload_adapter(adapter)
    except VLLMServerError as error:
        logger.warning("could not unload the adapters of ended trainers: %s", error)
    if not parent.is_dir():
        return
    for entry in os.scandir(parent):
        if entry.is_dir(follow_symlinks=False) and is_abandoned(entry.name):
            logger.info("removing %s, which an ended trainer left behind", entry.path)
            shutil.rmtree(entry.path, ignore_errors=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "-", socket.gethostname())
