"""The registry: choosing, forcing and explaining backends, on an op made for the purpose."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern.backend import BackendError, forced_backend
from diffkern.op import OPS, Backend, Op, op

RAN: list[str] = []


@pytest.fixture(scope="module", name="double")
def make_double():
    """An op with a backend that takes float32 on the CPU and one that runs nowhere here."""

    @op
    def double_for_test(x: Tensor, times: int = 2) -> Tensor:
        """x times a number. Returns a new tensor."""
        RAN.append("reference")
        return x * times

    @double_for_test.backend("cuda", devices=("cuda",))
    def _(x: Tensor, times: int) -> Tensor:
        raise AssertionError("there is no GPU here")

    # In place of the native library, which is not what is tested here.
    def fast(x: Tensor, times: int) -> Tensor:
        RAN.append("fast")
        return x * times

    class Ready(Backend):
        def cannot(self, args):
            return None if args[0].dtype == torch.float32 else "takes float32"

    double_for_test.backends.append(Ready("cpu", fast, ("cpu",)))
    yield double_for_test
    del OPS["double_for_test"]


def ran(call) -> str:
    RAN.clear()
    call()
    return RAN[-1]


def test_the_first_backend_that_can_is_taken(double):
    assert ran(lambda: double(torch.ones(2))) == "fast"
    assert ran(lambda: double(torch.ones(2, dtype=torch.float64))) == "reference"


def test_forcing(double, monkeypatch):
    x = torch.ones(2)
    with diffkern.use_backend("reference"):
        assert ran(lambda: double(x)) == "reference"
        with diffkern.use_backend("cpu"):
            assert ran(lambda: double(x)) == "fast"
        assert ran(lambda: double(x)) == "reference"
    assert ran(lambda: double(x)) == "fast"
    monkeypatch.setenv("DIFFKERN_BACKEND", "reference")
    assert ran(lambda: double(x)) == "reference"
    with diffkern.use_backend("auto"):
        assert ran(lambda: double(x)) == "fast"


def test_forcing_ends_when_the_block_raises():
    with pytest.raises(ZeroDivisionError), diffkern.use_backend("reference"):
        raise ZeroDivisionError
    assert forced_backend() is None


def test_forcing_holds_for_one_thread_only():
    seen = []
    with diffkern.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_forced_backend_that_cannot_run_raises(double):
    with diffkern.use_backend("cpu"), pytest.raises(BackendError, match="'cpu' was forced but takes float32"):
        double(torch.ones(2, dtype=torch.float64))
    with diffkern.use_backend("triton"), pytest.raises(BackendError, match="this op has only: cuda, cpu, reference"):
        double(torch.ones(2))
    with diffkern.use_backend("cuda"), pytest.raises(BackendError, match="'cuda' was forced but"):
        double(torch.ones(2))


def test_unknown_names_name_what_there_is(monkeypatch):
    with pytest.raises(ValueError, match="no backend is named 'gpu': choose one of auto, cpu, triton"):
        diffkern.use_backend("gpu").__enter__()
    monkeypatch.setenv("DIFFKERN_BACKEND", "gpu")
    with pytest.raises(ValueError, match="no backend is named 'gpu'"):
        forced_backend()
    with pytest.raises(KeyError, match="no op is named 'conv'"):
        diffkern.explain("conv")


def test_explain_gives_a_reason_for_every_backend(double):
    said = {c.backend: c for c in diffkern.explain(double, torch.ones(2))}
    assert list(said) == ["cuda", "cpu", "reference"]
    assert said["cpu"] == ("cpu", True, "first that can run")
    assert said["reference"] == ("reference", False, "can run, but 'cpu' comes first")
    assert not said["cuda"].chosen
    assert said["cuda"].reason
    said = {c.backend: c for c in diffkern.explain(double, torch.ones(2, dtype=torch.float64))}
    assert said["cpu"].reason == "takes float32"
    assert said["reference"].chosen
    with diffkern.use_backend("reference"):
        said = {c.backend: c for c in diffkern.explain("double_for_test", torch.ones(2))}
    assert said["reference"] == ("reference", True, "forced")
    assert said["cpu"].reason == "can run, but 'reference' is forced"


def test_a_backend_may_leave_a_call_to_the_next(double):
    """Which is another one, at worst the reference; forcing it asks for no opinion."""
    first = double.backends[-1]
    later = type(first)("torch", first.run, ("cpu",))
    long = type(first)("cpu", first.run, ("cpu",), defers=lambda x, times: "it is long" if len(x) > 2 else None)
    short, x = torch.ones(2), torch.ones(3)
    try:
        double.backends[-1:] = [long, later]
        assert double.choose((short, 2)) is long
        assert double.choose((x, 2)) is later
        said = {c.backend: c for c in diffkern.explain(double, x)}
        assert said["cpu"] == ("cpu", False, "can run, but leaves it to the next: it is long")
        assert said["torch"] == ("torch", True, "next that can run")
        assert said["reference"].reason == "can run, but 'torch' comes first"
        with diffkern.use_backend("cpu"):
            assert double.choose((x, 2)) is long
            assert diffkern.explain(double, x)[1] == ("cpu", True, "forced")
        double.backends[-1:] = []
        assert double.choose((x, 2)) is double.fallback
    finally:
        double.backends[1:] = [first]


def test_devices_are_checked():
    backend = Backend("reference", lambda x: x)
    assert backend.why_not((torch.ones(1),)) is None
    wrong = Backend("cpu", lambda x: x, ("cpu",))
    if diffkern.available.availability("cpu") is None:
        assert wrong.why_not((torch.ones(1, device="meta"),)) == "runs on cpu tensors, not on meta"


def test_defaults_and_keywords(double):
    x = torch.arange(3.0)
    assert torch.equal(double(x), x * 2)
    assert torch.equal(double(x, 5), x * 5)
    assert torch.equal(double(times=3, x=x), x * 3)
    assert torch.equal(torch.ops.diffkern.double_for_test(x, 4), x * 4)
    with pytest.raises(TypeError):
        double()


def test_no_tensor_is_compared_to_bind_it(monkeypatch):
    """In a list a tensor is found by ==, which took 10 us for each that was given by its name."""
    x, add = torch.ones(2, 4, 3, 3), torch.ones(2, 4)
    monkeypatch.setattr(Tensor, "__eq__", lambda *_: pytest.fail("compared"))
    bound = OPS["group_norm_silu"].bind(x, 2, add=add)
    assert bound[0] is x
    assert bound[1] == 2
    assert bound[6] is add
    with pytest.raises(TypeError, match="missing a required argument: 'num_groups'"):
        OPS["group_norm_silu"].bind(x, add=add)


def test_the_reference_is_the_fake_kernel(double):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        out = double(torch.empty(3, 5))
    assert out.shape == (3, 5)


def test_without_a_gradient_training_runs_the_reference(double):
    x = torch.ones(2, requires_grad=True)
    assert ran(lambda: double(x)) == "reference"
    double(x, 7).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full((2,), 7.0))
    with torch.no_grad():
        assert ran(lambda: double(x)) == "fast"


def test_two_ops_of_one_name_are_refused(double):
    with pytest.raises(ValueError, match="an op named 'double_for_test' already"):
        op(double.reference)


def test_every_op_is_public():
    assert all(isinstance(getattr(diffkern, name), Op) for name in ("randn", "add_noise", "sampler_step"))
    assert "group_norm_silu: " in repr(diffkern.group_norm_silu)
