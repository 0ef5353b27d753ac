"""What kind of machine figures were made on."""

from __future__ import annotations

import os
import platform

import torch


def machine_kind(accelerated: bool = False) -> str:
    """The CPU, without its name; where work was `accelerated` and there are GPUs, those."""
    if accelerated and torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"
