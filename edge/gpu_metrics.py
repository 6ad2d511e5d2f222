"""GPU memory and utilization through NVML (package `nvidia-ml-py`, extra `gpu`), read when the page is asked for.

Owns loading the library and turning its answers into the series that `series` declares. Where the package, the driver
or a GPU is missing there are none, and the line does not care: whether an engine can run is the engine's to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from edge.series import SERIES


class GpuMetrics(Collector):
    """The GPUs of this machine as NVML numbers them; a reading that fails leaves that GPU's series out.

    `nvml` is the module `pynvml`, initialized.
    """

    def __init__(self, nvml: Any) -> None:
        self._nvml = nvml
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]

    def collect(self) -> Iterator[Metric]:
        """One reading of every GPU."""
        used, size, busy = (
            GaugeMetricFamily(name, SERIES[name].text, labels=["gpu"])
            for name in ("kizu_gpu_memory_used_bytes", "kizu_gpu_memory_size_bytes", "kizu_gpu_utilization_ratio")
        )
        for index, handle in enumerate(self._handles):
            try:
                memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
                share = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
            except self._nvml.NVMLError:  # lost, or a driver that does not tell: the engine's errors say what it means
                continue
            used.add_metric([str(index)], memory.used)
            size.add_metric([str(index)], memory.total)
            busy.add_metric([str(index)], share)
        yield from (used, size, busy)


def find_gpus() -> GpuMetrics | None:
    """The collector for this machine's GPUs; None where nothing can be read."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return GpuMetrics(pynvml)
    except pynvml.NVMLError:  # no driver, no GPU, or not ours to look at
        return None
