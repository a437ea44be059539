"""OpenVINO (2024.4 and later) on a CPU: what one would write, converted with its weights inside, as of a network, and
computed in the dtype of the call. Networks are converted from float32: their bfloat16 is a way to run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.bench.networks import Network, as_loaded
from diffkern.bench.plain import OneOp, convertible
from diffkern.bench.rivals import Args, Bind, Rival, Run, installed
from diffkern.op import Op

PRECISION = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _convert(op: Op) -> Bind:
    def bind(*args: Any) -> Run:
        import openvino

        def given(t: Tensor) -> Any:  # a view, also of bfloat16, which numpy lacks
            if t.dtype != torch.bfloat16:
                return openvino.Tensor(t.numpy(), shared_memory=True)
            return openvino.Tensor(t.view(torch.int16).numpy(), t.shape, openvino.Type.bf16)

        def torch_of(found: Any) -> Tensor:
            if found.element_type != openvino.Type.bf16:
                return torch.from_numpy(found.data)
            return torch.from_numpy(found.data.view("int16")).view(torch.bfloat16)

        module = OneOp(op, args)
        program = torch.export.export(module, module.inputs)
        model = openvino.convert_model(program)
        model.reshape({i: openvino.PartialShape(list(t.shape)) for i, t in enumerate(module.inputs)})
        settings = {
            "INFERENCE_PRECISION_HINT": PRECISION[next(a.dtype for a in args if isinstance(a, Tensor))],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = openvino.compile_model(model, "CPU", settings).create_infer_request()
        for i, t in enumerate(module.inputs):
            request.set_input_tensor(i, given(t))

        def run() -> tuple[Tensor, ...]:
            request.infer()
            return tuple(map(torch_of, request.output_tensors))

        run.held = program, module  # type: ignore[attr-defined]  # OpenVINO reads their memory, and does not keep it
        return run

    return bind


def _ops(op: Op, args: Args, device: str) -> dict[str, Bind]:
    return {"OpenVINO": _convert(op)} if convertible(op, args) else {}


def _network(network: Network, folder: Path, dtype: torch.dtype) -> Run:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": PRECISION[dtype], "INFERENCE_NUM_THREADS": torch.get_num_threads()}

    def change(model: nn.Module) -> Callable[..., Tensor]:
        compiled: list[Any] = []

        def call(*args: Tensor) -> Tensor:
            if not compiled:
                converted = openvino.convert_model(model, example_input=args, input=[tuple(a.shape) for a in args])
                compiled.append(openvino.compile_model(converted, "CPU", settings))
            return torch.from_numpy(compiled[0]([a.numpy() for a in args])[0].copy())

        return call

    return network.theirs(folder, torch.float32, as_loaded, change)


RIVAL = Rival(installed("openvino", "cpu"), _ops, {"OpenVINO": _network})
