"""How attention's work is cut: the shapes that are launched by default, those worth timing, and what tables tell calls
apart by."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import configs
from .configs import power_of_2

# Numbers a head, of CUDA's kernel and of its blocks of 128 queries: csrc/cuda/attention.cu knows both too.
WIDEST_OF_CUDA, WIDEST_OF_128 = 160, 80


class Cut(NamedTuple):
    """How the work is cut; compile-time."""

    QUERIES: int
    KEYS: int
    PARTS: int  # programs that share a head's values, each with all of its scores
    BLOCKS: int  # blocks of queries that stream by one block of keys; 0: the keys stream by one block of queries
    num_warps: int
    num_stages: int


def tiles(dim: int) -> tuple[int, int]:
    """The widths of a head's tiles, 0 for no second one. Below 64, what is padded costs less than a second product."""
    first = max(16, power_of_2(dim))
    second = max(16, power_of_2(dim - first // 2))
    return (first // 2, second) if dim > 64 and second < first // 2 else (first, 0)


def is_large(arch: int) -> bool:
    """Whether four warps together multiply 64 rows out of shared memory, of which there is much: Hopper and after."""
    return configs.shared_memory(arch) >= 227 * 1024


def default_cut(dim: int, queries: int, keys: int, size: int, masked: int, aligned: bool, arch: int) -> Cut:
    """For `size` bytes a number, in heads that begin where wide loads can if `aligned`: what serves where nothing was
    measured."""
    d1, _ = tiles(dim)
    block = max(16, power_of_2(queries))
    if size == 4:  # no tensor cores in full precision: products in registers, which small tiles leave room for
        most, wide = (32, 32) if d1 <= 128 else (16, 16)
        block = min(block, most)
        return Cut(block, wide, 1, 0, 8 if d1 * block >= 1 << 11 else 4, 2 if d1 <= 128 else 1)
    if is_large(arch) and (block >= 64 or d1 > 128):
        block = 128 if queries > 512 and d1 <= 256 else 64
        if d1 > 128:  # four more warps hold half of the sums
            return Cut(block, 32, 2 if d1 > 256 else 1, 0, 8, 2)
        # 64 queries are four warps, and leave room for another program that multiplies while this one does not.
        return Cut(block, 64 if aligned else 32, 1, 0, block // 16, 3 if block == 128 else 2)
    most, wide = (128, 64) if d1 <= 64 else (128, 32) if d1 <= 128 else (32, 32)
    block = min(block, most)
    if not aligned or (masked and block < 64):  # few rows, spread over many threads: 64 keys spilled
        wide = min(wide, 32)
    return Cut(block, wide, 2 if d1 > 256 else 1, 0, 8 if d1 * block >= 1 << 13 else 4, 2 if d1 <= 128 else 1)


def call_of(q: Tensor, keys: int, mask: Tensor | None) -> tuple[int, int, int, int, int]:
    """What shapes are chosen by: dim, queries, keys, bytes a number, and the mask: 0 none, 1 bool, 2 added."""
    return q.shape[3], q.shape[1], keys, q.element_size(), 0 if mask is None else 1 if mask.dtype == torch.bool else 2


def by_products(dim: int, queries: int, keys: int, size: int, masked: int) -> bool:
    """Whether products of a library, with a softmax between, may serve: heads too wide for one kernel, in 16 bits,
    that begin where a library's wide loads can, and enough scores to fill a GPU."""
    aligned = dim % 8 == 0 and keys % 8 == 0
    return dim > 256 and size == 2 and not masked and aligned and queries * keys >= 1 << 20


def facts(dim: int, queries: int, keys: int, size: int, masked: int) -> str:
    """What a table of shapes tells calls apart by."""
    return configs.key(bytes=size, dim=dim, queries=configs.bucket(queries), keys=configs.bucket(keys), masked=masked)


def candidates(dim: int, queries: int, keys: int, size: int, masked: int, arch: int) -> Iterator[Cut]:
    """The shapes that are worth timing, by what can be known beforehand: 64 queries are what four warps multiply at
    once; a thread has 255 registers for the sums, the scores and the weights of a block."""
    d1, d2 = tiles(dim)
    few = max(16, min(32, power_of_2(queries)))
    for block in () if size != 2 else (64, 128) if queries > 64 else (few, 64):
        for wide in (32, 64, 128, 256):
            if wide >= max(64, 2 * keys) or (wide == 32 and d1 <= 64 and keys > 32) or (wide == 256 and keys > 256):
                continue
            for parts in (1, 2) if d1 > 256 else (1,):
                for warps in (1, 4) if block < 64 else (block // 16 if d1 <= 128 else 8,):
                    sums, scores = block * (d1 // parts + d2), block * wide
                    if sums + scores * 3 // 2 > 192 * 32 * warps:
                        continue
                    for stages in (2, 3) if wide < keys else (1,):
                        stored = (d1 + d2) * (block + stages * wide) + (d1 // parts + d2) * stages * wide
                        if size * stored <= configs.shared_memory(arch):
                            yield Cut(block, wide, parts, 0, warps, stages)
                    # Keys that stay: 3 stages, as with 2 no block is loaded ahead; what is stored passes through.
                    # With what is added to their scores their registers do not do.
                    stored = (d1 + d2) * (3 * block + 2 * wide) + d1 * block
                    if masked < 2 and d1 <= 128 and wide >= keys and size * stored <= configs.shared_memory(arch):
                        for blocks in (2, 4, 8):
                            if (blocks - 1) * block < queries:
                                yield Cut(block, wide, 1, blocks, warps, 3)


def cuda_blocks(dim: int, queries: int, keys: int, size: int, masked: int) -> list[int]:
    """How many queries a block of CUDA's kernel may have, first what serves where nothing was measured; none, if it
    cannot take such a call. 128 use what is read of the keys twice as often, where there is enough work for them and
    room for their sums."""
    if size != 2 or masked or dim % 8 or dim > WIDEST_OF_CUDA:
        return []
    if dim > WIDEST_OF_128 or queries <= 64:
        return [64]
    return [128, 64] if queries > 512 else [64, 128]


def tuning(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, arch: int
) -> tuple[str, list[configs.Shape]]:
    """For the op's arguments: the entry of the table that is theirs, and the shapes to try for it. One in CUDA has only
    the queries of its blocks, by that name."""
    call = call_of(q, k.shape[1], mask)
    library: list[configs.Shape] = [{}] if by_products(*call) else []
    in_cuda = [{configs.CUDA: block} for block in cuda_blocks(*call)]
    return facts(*call), library + in_cuda + [cut._asdict() for cut in candidates(*call, arch)]


@functools.lru_cache(1024)
def _found(call: tuple[int, int, int, int, int], arch: int) -> configs.Tuned | None:
    return configs.tuned("attention", facts(*call), arch)


def measured(q: Tensor, keys: int, mask: Tensor | None) -> configs.Tuned | None:
    """What was measured of such a call on this architecture, or None."""
    return _found(call_of(q, keys, mask), configs.architecture(q.device))


def cut_of(q: Tensor, keys: int, mask: Tensor | None, aligned: bool, arch: int) -> Cut | None:
    """The launch shape for a call: the one on trial, else what was measured as fastest, else the default. All that was
    measured is aligned. None, and no numbers in a table: products of a library."""
    call = call_of(q, keys, mask)
    shape = configs.on_trial("attention", lambda: facts(*call))
    if shape is None and aligned and (found := _found(call, arch)) is not None:
        shape = found.shape
    if shape is None and not by_products(*call):
        return default_cut(*call, aligned, arch)
    return Cut(**shape) if shape else None


def cuda_block(q: Tensor, keys: int) -> int:
    """Queries of a block of CUDA's kernel: of the shape on trial, else what was measured as fastest, else the default.
    By the shape of a sample alone."""
    call = call_of(q, keys, None)
    shape = configs.on_trial("attention", lambda: facts(*call))
    if shape is not None:
        return shape[configs.CUDA]
    found = _found(call, configs.architecture(q.device))
    return found.cuda_block if found is not None and found.cuda_block else cuda_blocks(*call)[0]
