"""Each of the attention kernels that PyTorch chooses from on a GPU, by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffkern.bench.plain import torch_attention
from diffkern.bench.rivals import Args, Bind, Rival, later
from diffkern.op import Op

KERNELS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def _by(backend: SDPBackend) -> Bind:
    def run(*args: Any) -> Tensor:
        with sdpa_kernel(backend):
            return torch_attention(*args)

    return later(run)


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    return {name: _by(kernel) for name, kernel in KERNELS.items()} if op.name == "attention" else {}


RIVAL = Rival(lambda device: None if device == "cuda" else "runs on cuda only", _ops)
