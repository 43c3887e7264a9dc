"""Where ranks go and how they talk: what does not fit is refused before a process starts."""

import pytest

from ringserve import devices
from ringserve.config import RingConfig
from ringserve.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_cuda_devices", lambda: 3)


@pytest.mark.parametrize("transport", ["nccl", "symm"])
def test_transports_of_gpus_do_not_fit_cpus(transport: str) -> None:
    with pytest.raises(ConfigError, match=f"transport {transport} does not fit ranks on the CPU"):
        devices.place_ranks(RingConfig(ring_size=2, device="cpu", transport=transport))  # type: ignore[arg-type]


@pytest.mark.usefixtures("gpus")
def test_ranks_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = devices.place_ranks(RingConfig(ring_size=3))
    assert (placement.devices, placement.transport) == (["cuda:0", "cuda:1", "cuda:2"], "nccl")
    with pytest.raises(ConfigError, match="transport shm does not fit ranks on CUDA devices"):
        devices.place_ranks(RingConfig(ring_size=3, transport="shm"))
    with pytest.raises(ConfigError, match="needs that many CUDA devices, this machine has 3"):
        devices.place_ranks(RingConfig(ring_size=4, device="cuda"))
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda a, b: True)
    assert devices.place_ranks(RingConfig(ring_size=3, transport="symm")).transport == "symm"
    monkeypatch.setattr("torch.cuda.can_device_access_peer", lambda a, b: {a, b} != {0, 2})
    with pytest.raises(ConfigError, match="cuda:0 and cuda:2 do not: use nccl"):
        devices.place_ranks(RingConfig(ring_size=3, transport="symm"))


def test_ranks_on_a_cpu_share_its_cores() -> None:
    placement = devices.place_ranks(RingConfig(ring_size=2, device="cpu", threads_per_rank=3))
    assert placement.threads == 3 and placement.environment(1)["OMP_NUM_THREADS"] == "3"
    assert devices.place_ranks(RingConfig(ring_size=1, device="cpu")).transport == "none"
