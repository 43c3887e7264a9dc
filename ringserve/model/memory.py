"""Memory that a rank's device has free."""

from pathlib import Path

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Memory to be had: of the GPU, or of the host within its control group's limit."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return max(int(free), 0)
