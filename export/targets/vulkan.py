"""Vulkan: the GPU of Android phones. Lowers anywhere; the wheel's runtime cannot run it."""

from __future__ import annotations

from edgetune.export.targets.target import Target

VULKAN = Target(
    name="vulkan",
    serves="the GPU of Android phones",
    partitioner="executorch.backends.vulkan.partitioner.vulkan_partitioner:VulkanPartitioner",
    takes=("fp32", "fp16", "int8"),
    runtime="VulkanBackend",
)
