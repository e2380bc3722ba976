"""Backends that compute the loss: plain PyTorch, the C++ extension, and Triton kernels."""

from tal_fast.loss.backends.base import Backend, BatchStatistics, KernelBackend, LossInputs
from tal_fast.loss.backends.cpp import CppBackend
from tal_fast.loss.backends.pytorch import PyTorchBackend
from tal_fast.loss.backends.triton import TritonBackend

__all__ = ["Backend", "BatchStatistics", "CppBackend", "KernelBackend", "LossInputs", "PyTorchBackend", "TritonBackend"]
