"""ONNX Runtime on a CPU: what one would write, exported by torch.onnx with its weights inside, as of a network. It has
no bfloat16 there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.bench.networks import Network, as_loaded
from diffkern.bench.plain import OneOp, convertible
from diffkern.bench.rivals import Args, Bind, Rival, Run, installed
from diffkern.op import Op

BFLOAT16 = "has no bfloat16 on a CPU"


def _session(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "module.onnx"
        torch.onnx.export(module, inputs, file, dynamo=True, verbose=False)
        settings = onnxruntime.SessionOptions()
        # Its threads would spin for some 40 ms after a run, on the cores of what is timed next. With a millisecond,
        # which is more than lies between runs, its own are as fast.
        settings.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
        settings.intra_op_num_threads = torch.get_num_threads()
        return onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])


def _feed(session: Any, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    return {i.name: t.contiguous().numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}


def _convert(op: Op) -> Bind:
    def bind(*args: Any) -> Run:
        module = OneOp(op, args)
        if any(t.dtype == torch.bfloat16 for t in module.inputs):
            raise NotImplementedError(BFLOAT16)
        session = _session(module, module.inputs)
        feed = _feed(session, module.inputs)
        return lambda: tuple(map(torch.from_numpy, session.run(None, feed)))

    return bind


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    return {"ONNX Runtime": _convert(op)} if convertible(op, args) else {}


def _network(network: Network, folder: Path, dtype: torch.dtype) -> Run:
    if dtype == torch.bfloat16:
        raise NotImplementedError(BFLOAT16)

    def change(model: nn.Module) -> Callable[..., Tensor]:
        sessions: list[Any] = []

        def call(*args: Tensor) -> Tensor:
            if not sessions:
                sessions.append(_session(model, args))
            return torch.from_numpy(sessions[0].run(None, _feed(sessions[0], args))[0])

        return call

    return network.theirs(folder, dtype, as_loaded, change)


def _why_not(device: str) -> str | None:
    return installed("onnxruntime", "cpu")(device) or installed("onnxscript", "cpu")(device)


RIVAL = Rival(_why_not, _ops, {"ONNX Runtime": _network})
