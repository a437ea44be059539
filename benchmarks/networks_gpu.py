"""Whole networks on a GPU, in bfloat16, with random weights made on it; how `bench_end_to_end.py --device cuda` runs.

A network has a process for all forms that are not compiled, and one for each that is. All get ready in parallel; what
is not ready in time is left out, and the record says so. Then, network by network, a form is refused whose result is
not that of diffusers in float32, and all are timed in turn, one at a time: as they are called, and replayed from a CUDA
graph ("graphed"), without what Python and the launches take. max-autotune makes such a graph by itself.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import children
import gpu
import record
import torch
from networks import CIFAR, SD15, VAE, Change, Emoji, First, Prepare, Run, accelerated, as_loaded, channels_last
from torch import Tensor, nn

import diffkern
from diffkern.models.dit import DiT, DiTConfig
from diffkern.models.folder import lay_out
from diffkern.models.unet import UNet2D, UNet2DConfig
from diffkern.models.unet_condition import UNet2DCondition, UNet2DConditionConfig
from diffkern.models.vae import AutoencoderKL, AutoencoderKLConfig

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DIT_XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8, "sample_size": 32}
_TWO_LEVELS = {"block_out_channels": [32, 64], "layers_per_block": 1, "norm_num_groups": 8}
# What makes each small, to see whether this script runs.
TINY: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **_TWO_LEVELS,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
    "UNet2DConditionModel": {
        **_TWO_LEVELS,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "attention_head_dim": 4,
        "transformer_layers_per_block": 1,
    },
    "DiTTransformer2DModel": {"num_layers": 2},
    "AutoencoderKL": {
        **_TWO_LEVELS,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
}
OURS: dict[str, tuple[Any, Any]] = {
    "UNet2DModel": (UNet2D, UNet2DConfig),
    "UNet2DConditionModel": (UNet2DCondition, UNet2DConditionConfig),
    "DiTTransformer2DModel": (DiT, DiTConfig),
    "AutoencoderKL": (AutoencoderKL, AutoencoderKLConfig),
}
LIBRARY_PRODUCTS = {"max_autotune_gemm_backends": "ATEN", "max_autotune_conv_backends": "ATEN"}
# In the order in which they are compiled, as far as there is time.
COMPILED = ("torch.compile, max-autotune, library products", "torch.compile", "torch.compile, max-autotune")
THEIRS: dict[str, Prepare] = {
    "diffusers": as_loaded,
    "diffusers, channels_last": channels_last,
    "diffusers, accelerated": accelerated,
    **dict.fromkeys(COMPILED, channels_last),
}


EACH = 60.0  # seconds that a process may take for an answer once all are prepared


class OnGpu(NamedTuple):
    """A call of a network. inputs: made of float32 and integers; told: those with names, as our network takes them, and
    as diffusers' does."""

    what: str
    kind: str
    config: dict[str, Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    told: Callable[[], dict[str, Tensor]] = dict
    method: str = "forward"


def latents(batch: int, size: int, channels: int = 4) -> Tensor:
    return torch.randn(batch, channels, size, size)


def vae(pixels: int) -> OnGpu:
    what = f"Stable Diffusion 1.5 VAE, a latent of {pixels // 8} x {pixels // 8} decoded, one call"
    return OnGpu(what, "AutoencoderKL", VAE, lambda: (latents(1, pixels // 8),), method="decode")


def cifar(batch: int) -> OnGpu:
    what = f"CIFAR-10 DDPM UNet, {batch} picture{'s' if batch > 1 else ''} of 32 x 32, one call"
    return OnGpu(what, "UNet2DModel", CIFAR, lambda: (latents(batch, 32, 3), torch.arange(batch) * 15))


NETWORKS: dict[str, OnGpu | None] = {
    "emoji": None,  # a whole run
    "cifar-1": cifar(1),
    "cifar-64": cifar(64),
    "sd15": OnGpu(
        "Stable Diffusion 1.5 UNet, 2 latents of 64 x 64, 77 tokens, one call",
        "UNet2DConditionModel",
        SD15,
        lambda: (latents(2, 64), torch.tensor([500, 500]), torch.randn(2, 77, 768)),
    ),
    "dit-xl": OnGpu(
        "DiT-XL/2, 8 latents of 32 x 32, one call",
        "DiTTransformer2DModel",
        DIT_XL,
        lambda: (latents(8, 32), torch.arange(8) * 100, torch.arange(8)),
    ),
    "vae-512": vae(512),
    "sdxl": OnGpu(
        "SDXL UNet, 2 latents of 128 x 128, 77 tokens, one call",
        "UNet2DConditionModel",
        SDXL,
        lambda: (latents(2, 128), torch.tensor([500, 500]), torch.randn(2, 77, 2048)),
        lambda: {"text_embeds": torch.randn(2, 1280), "time_ids": torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]] * 2)},
    ),
    "vae-1024": vae(1024),
}


def change(variant: str) -> Change:
    """What is called in place of a model."""
    options: dict[str, Any] = {} if variant == "torch.compile" else torch._inductor.list_mode_options("max-autotune")
    if variant.endswith("library products"):
        options = options | LIBRARY_PRODUCTS
    return lambda model: torch.compile(model, options=options) if variant in COMPILED else model


class Built:
    """A network on a device, as diffusers has it in bfloat16, and its inputs: what all forms of it are made from."""

    def __init__(self, network: OnGpu, device: str, tiny: bool) -> None:
        import diffusers

        self.network, self.device = network, device
        config = network.config | (TINY[network.kind] if tiny else {})
        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(diffusers, network.kind).from_config(config).eval()
        for p in model.parameters():  # what starts as zeros, such as DiT's gates, would leave its block without effect
            if p.dim() > 1 and not p.any():
                nn.init.normal_(p, std=0.02)
        self.model = model.to(device, torch.bfloat16)
        torch.manual_seed(1)
        inputs, told = network.inputs(), network.told()
        if tiny:
            inputs = tuple(t[..., :16, :16] if t.dim() == 4 else t for t in inputs)
        self.inputs = tuple(t.to(device) for t in inputs)
        self.told = {k: t.to(device) for k, t in told.items()}

    def weights(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.model.parameters())

    def given(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        def cast(t: Tensor) -> Tensor:
            return t.to(dtype) if t.is_floating_point() else t

        return tuple(map(cast, self.inputs)), {k: cast(t) for k, t in self.told.items()}

    def theirs(self, variant: str, dtype: torch.dtype = torch.bfloat16) -> Run:
        alone = variant == "diffusers" and dtype == torch.bfloat16
        model = self.model if alone else THEIRS[variant](copy.deepcopy(self.model).to(dtype))
        args, told = self.given(dtype)
        named = {"added_cond_kwargs": told} if told else {}
        call = change(variant)(First(model, self.network.method))
        return lambda: call(*args, **named)

    def ours(self) -> Run:
        cls, config = OURS[self.network.kind]
        with torch.device("meta"):
            model = cls(config.from_dict(dict(self.model.config)))
        model.load_state_dict(self.model.state_dict(), assign=True)
        call = getattr(lay_out(model, self.device).eval(), self.network.method)
        args, told = self.given(torch.bfloat16)
        return lambda: call(*args, **told)

    def run(self, variant: str) -> Run:
        return self.ours() if variant == "diffkern" else self.theirs(variant)


class BuiltEmoji:
    """A whole run of the bundled model, whose graphs are those of `diffkern.sample`."""

    def __init__(self, device: str) -> None:
        self.device = device

    def weights(self) -> int:
        model = diffkern.load("emoji-32", dtype=torch.bfloat16).model
        return sum(p.numel() * p.element_size() for p in model.parameters())

    def theirs(self, variant: str, dtype: torch.dtype = torch.bfloat16) -> Run:
        return Emoji.theirs(Path(), dtype, THEIRS[variant], change(variant), self.device)

    def run(self, variant: str) -> Run:
        if variant in THEIRS:
            return self.theirs(variant)
        return Emoji.ours(Path(), torch.bfloat16, self.device)


def build(name: str, options: argparse.Namespace) -> Built | BuiltEmoji:
    network = NETWORKS[name]
    return BuiltEmoji(options.device) if network is None else Built(network, options.device, options.tiny)


def graphed(run: Run) -> Run:
    """The run in a CUDA graph: nothing is left for the host to do but to start it."""
    replay = gpu.Replay(lambda: run, [()], calls=1)

    def again() -> Tensor:
        replay.graph.replay()
        return replay.results[0]

    return again


class Forms:
    """One process's part: some forms of one network, in the order in which the parent asks for the methods."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.cuda = options, options.device == "cuda"
        self.rows: dict[str, dict[str, Any]] = {}
        self.refused: dict[str, str] = {}
        self.runs: dict[str, Run] = {}

    def prepare(self, name: str, variants: list[str], folder: str) -> bool:
        """Build the network, and run every form once: that compiles, and finds kernels, which may happen in parallel.
        The process that has diffkern among its forms leaves the result expected of all."""
        self.built, self.variants = build(name, self.options), variants
        self.expected = Path(folder) / f"{name}.pt"
        if "diffkern" in variants:
            torch.save(self.built.theirs("diffusers", torch.float32)().float(), self.expected)
        for variant in variants:
            start = time.perf_counter()
            run = self.try_out(variant, functools.partial(self.built.run, variant))
            if run is not None:
                self.rows[variant] = {"first call, seconds": time.perf_counter() - start}
            if variant in COMPILED and run is not None:
                self.runs[variant] = run  # not to be compiled again
            del run
            if self.cuda:
                torch.cuda.empty_cache()  # the memory is for the other processes
        return True

    def try_out(self, variant: str, make: Callable[[], Run]) -> Run | None:
        """The run, after a first call; or None, and it is refused."""
        try:
            run = make()
            run()
            if self.cuda:
                torch.cuda.synchronize()
            return run
        except RuntimeError as error:
            if "illegal" in str(error):  # nothing runs in this process any more
                raise
            self.refused[variant] = str(error).strip().splitlines()[0][:200]
            return None

    def admit(self) -> dict[str, Any]:
        """Make every form again and compare it with what is expected. Returns the rows so far, and what is refused."""
        expected = torch.load(self.expected)
        for variant in list(self.rows):
            run = self.runs.get(variant) or self.built.run(variant)
            self.judge(variant, run, expected, self.rows[variant]["first call, seconds"])
            if self.cuda and not variant.startswith("torch.compile, max") and isinstance(self.built, Built):
                name = f"{variant}, graphed"
                if (replay := self.try_out(name, functools.partial(graphed, run))) is not None:
                    self.judge(name, replay, expected, 0.0)
        return {"rows": self.rows, "refused": self.refused}

    def judge(self, variant: str, run: Run, expected: Tensor, first: float) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if self.cuda else 0
        for _ in range(3):  # max-autotune records its graph in the second call
            out = run()
        delta = ((out.float() - expected).abs().max() / expected.std()).item()
        peak = (torch.cuda.max_memory_allocated() - before if self.cuda else 0) + self.built.weights()
        self.rows.pop(variant, None)
        if not delta <= 1.0:  # bfloat16: three digits in a few hundred layers
            self.refused[variant] = f"another result, max |delta| {delta:.3g} of its std"
            self.runs.pop(variant, None)
            return
        self.runs[variant] = run
        self.rows[variant] = {
            "first call, seconds": float(f"{first:.4g}"),
            "later call, seconds": float(f"{record.measured(run, 1):.4g}"),
            "peak memory, MB": peak >> 20,
            "max delta": float(f"{delta:.2g}"),
        }

    def round(self) -> dict[str, float]:
        """Seconds a call of every form, measured once."""
        repeats = {v: max(1, int(0.05 / row["later call, seconds"])) for v, row in self.rows.items()}
        return {variant: record.measured(self.runs[variant], n) for variant, n in repeats.items()}

    def profile(self) -> dict[str, float]:
        return profile(self.runs["diffkern"], self.cuda)

    @torch.no_grad()
    def answer(self, item: list[Any]) -> Any:
        method, *args = item
        return getattr(self, method)(*args)


def profile(run: Run, cuda: bool) -> dict[str, float]:
    """The share of every kernel that takes 1 % or more."""
    with torch.profiler.profile() as found:
        run()
    times = {e.key[:80]: e.self_device_time_total if cuda else e.self_cpu_time_total for e in found.key_averages()}
    total = sum(times.values()) or 1
    ordered = sorted(times.items(), key=lambda entry: -entry[1])
    return {name: round(t / total, 3) for name, t in ordered if t / total >= 0.01}


def prepared(options: argparse.Namespace, folder: str, until: float) -> dict[str, list[tuple[list[str], Any]]]:
    """For each network its processes, and of which forms each is: a Child that is ready, or why it is not."""
    eager = [v for v in options.variants if v not in COMPILED]
    largest_first = sorted(options.networks, key=list(NETWORKS).index, reverse=True)
    jobs = [(name, eager) for name in largest_first]
    jobs += [(name, [v]) for v in COMPILED if v in options.variants for name in largest_first]
    found: dict[str, list[tuple[list[str], Any]]] = {name: [] for name in options.networks}

    def prepare(job: tuple[str, list[str]]) -> None:
        name, variants = job
        left = until - time.monotonic()
        answer: Any = children.Failure("no time was left to compile it")
        if left > 0:
            child = children.Child([*sys.argv, "--child"])
            answer = child.ask(["prepare", name, variants, folder], left)
            if isinstance(answer, children.Failure):
                child.end()
            else:
                answer = child
        print(f"{name}, {', '.join(variants)}: {answer if isinstance(answer, str) else 'ready'}", flush=True)
        found[name].append((variants, answer))

    with concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(prepare, jobs))
    for entries in found.values():  # the one that diffkern is in comes first
        entries.sort(key=lambda entry: "diffkern" not in entry[0])
    return found


def measure(name: str, processes: list[tuple[list[str], Any]], rounds: int, until: float) -> Any:
    """The record of a network, or a Failure."""
    rows: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    alive: list[children.Child] = []

    def ask(child: children.Child, method: str) -> Any:
        return child.ask([method], max(1.0, min(EACH, until - time.monotonic())))

    for variants, child in processes:
        answer = child if isinstance(child, children.Failure) else ask(child, "admit")
        if isinstance(answer, children.Failure):
            refused |= dict.fromkeys(variants, str(answer))
        else:
            rows |= answer["rows"]
            refused |= answer["refused"]
            alive.append(child)
    if "diffkern" not in rows:
        return children.Failure(f"diffkern is refused: {refused.get('diffkern')}")
    seconds: dict[str, list[float]] = {variant: [] for variant in rows}
    for _ in range(rounds):
        for child in alive:
            answer = ask(child, "round")
            if isinstance(answer, children.Failure):
                return answer
            for variant, value in answer.items():
                seconds[variant].append(value)
    for variant, row in rows.items():
        alone = variant.endswith("graphed") or variant.startswith("torch.compile, max")
        against = "diffkern, graphed" if alone and "diffkern, graphed" in rows else "diffkern"
        row["ms"] = record.spread([1000 * s for s in seconds[variant]])
        row |= {"against": against, "diffkern is faster by": record.ratio(seconds[variant], seconds[against])}
    network = NETWORKS[name]
    what = f"emoji-32, {Emoji.N} pictures, {Emoji.STEPS} steps" if network is None else network.what
    shares = ask(alive[0], "profile")
    return {
        "network": name, "what": what, "dtype": "bfloat16", "variants": rows, "refused": refused,
        "profile": {} if isinstance(shares, children.Failure) else shares,
    }  # fmt: skip


def records(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(network, its record or why there is none)."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = prepared(options, folder, start + 0.7 * options.seconds)
        print(f"prepared in {time.monotonic() - start:.0f} s", flush=True)
        for name, processes in found.items():
            yield name, measure(name, processes, options.rounds, start + options.seconds)
            for _, child in processes:  # their memory is for the next network
                if isinstance(child, children.Child):
                    child.end()


def main(options: argparse.Namespace) -> None:
    """options: networks, variants, device, rounds, processes, seconds, tiny, out, child."""
    if options.device == "cuda":
        gpu.settings()
    if options.child:
        children.serve(Forms(options).answer)
        return
    failed = False
    for name, found in records(options):
        if isinstance(found, children.Failure):
            print(f"{name}: {found}", flush=True)
            failed = True
            continue
        for variant, row in found["variants"].items():
            print(f"{name:10}{variant:50}{row['ms']['median']:9.3f} ms  {row['diffkern is faster by']['median']:.2f}")
        for variant, reason in found["refused"].items():
            print(f"{name:10}{variant:50}not timed: {reason}")
        print(record.write(f"end_to_end-{name}-bfloat16", options.device, found, options.out), flush=True)
    raise SystemExit(1 if failed else 0)
