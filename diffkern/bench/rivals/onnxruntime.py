"""ONNX Runtime on a CPU: what one would write, exported by torch.onnx with its weights inside, as of a network."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from diffkern.bench.plain import OneOp, convertible
from diffkern.bench.rivals import Args, Bind, Rival, Run, installed
from diffkern.op import Op


def _convert(op: Op) -> Bind:
    def bind(*args: Any) -> Run:
        import onnxruntime

        module = OneOp(op, args)
        if any(t.dtype == torch.bfloat16 for t in module.inputs):
            raise NotImplementedError("has no bfloat16 on a CPU")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "op.onnx"
            torch.onnx.export(module, module.inputs, file, dynamo=True, verbose=False)
            settings = onnxruntime.SessionOptions()
            settings.intra_op_num_threads = torch.get_num_threads()
            session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), module.inputs, strict=True)}
        return lambda: tuple(map(torch.from_numpy, session.run(None, feed)))

    return bind


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    return {"ONNX Runtime": _convert(op)} if convertible(op, args) else {}


def _why_not(device: str) -> str | None:
    return installed("onnxruntime", "cpu")(device) or installed("onnxscript", "cpu")(device)


RIVAL = Rival(_why_not, _ops)
