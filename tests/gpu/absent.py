"""A CUDA device that is not there: the project's code runs as if on a GPU, on a build of torch without CUDA.

Its tensors are torch's `FakeTensor`s. They carry shapes, types and devices, and nothing is computed. What the host
computes on its own is true where it is small. Two things would need a CUDA build all the same, and are done here
instead:

- Autograd asks each tensor for its device, to find the device's streams. It is told "meta", a device without any, which
  every build has. Only C++ asks in this way; Python code reads the true device, "cuda:0".
- `torch.cuda` is replaced by `Cuda`, whose streams and events do nothing.

Triton's kernels are not compiled; each launch is handed to `Ops.launch`.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clt_losses.late import Late

CUDA, META = torch.device("cuda:0"), torch.device("meta")
LARGEST_TRUE = 2**16
"""Numbers of a tensor on the host that is a true one; what is larger has no content."""


class Ops(TorchDispatchMode):
    """Sees every operation of the device. What watches or counts is a subclass."""

    step = 0
    """The training step that is running."""
    to_meta = False
    """Whether Python code is asking for "meta" itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            device = args[0].fake_device
            return META if device.type == "cuda" else device
        # C++ makes a tensor on the device of another one, of which it was told "meta".
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta" and not self.to_meta:
            kwargs["device"] = CUDA
        if "generator" in kwargs:
            kwargs["generator"] = None
        if "pin" not in func._schema.name and not kwargs.get("pin_memory") and _on_host(args, kwargs):
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        return self.op(func, args, kwargs)

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operation of torch, to be done by `do`."""
        return self.do(func, args, kwargs)

    def do(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shapes, types and devices of an operation's results."""
        if func._schema.name.startswith("aten::_fused_adam"):
            return None  # changes its arguments; with a rate on the device it has no rule for fake tensors
        if isinstance(out := kwargs.get("out"), Tensor):
            # Fake tensors compute such a result and copy it, which needs a CUDA build.
            name = func._overloadname.removesuffix("out").removesuffix("_") or "default"
            made = getattr(func.overloadpacket, name)(*args, **{k: v for k, v in kwargs.items() if k != "out"})
            assert made.shape == out.shape and made.device == out.device, (func, made.shape, out.shape)
            return out
        return func(*args, **kwargs)

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """A Triton kernel (a `JITFunction`) is launched."""

    def waits(self, what: str) -> None:
        """The host waits for the device."""


def _on_host(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation is the host's alone and small: then it is done, and its result is true."""
    inputs = tensors((args, kwargs))
    device = kwargs.get("device")
    if any(isinstance(x, FakeTensor) for x in inputs) or (device is not None and torch.device(device).type != "cpu"):
        return False
    sizes = [math.prod(x) for x in args if isinstance(x, list | tuple) and all(isinstance(n, int) for n in x)]
    return max([0, *sizes, *(x.numel() for x in inputs)]) <= LARGEST_TRUE


def on_gpu(x: Tensor) -> bool:
    """Whether a tensor is on the absent GPU. (`x.is_cuda` asks C++, which was told "meta".)"""
    return x.device.type == "cuda"


def tensors(tree: Any) -> list[Tensor]:
    """All tensors in nested containers."""
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


class _Fake(FakeTensorMode):
    """Never touches a CUDA device, even where `torch.cuda` says that there is one."""

    avoid_device_init = True


class _Devices(TorchFunctionMode):
    """Names the device where C++ would ask a CUDA build which one is current, or compare with "meta"."""

    def __init__(self, ops: Ops):
        super().__init__()
        self.ops = ops

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.new_tensor:
            func, args, kwargs = torch.tensor, args[1:], {"dtype": args[0].dtype, "device": args[0].device} | kwargs
        if func is not Tensor.to and str(kwargs.get("device")) == "cuda":
            kwargs["device"] = CUDA
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], CUDA)
        if func is Tensor.to:
            x, rest = args[0], list(args[1:])
            if rest and isinstance(rest[0], Tensor):
                rest[:1] = [rest[0].device, rest[0].dtype]
            if rest and isinstance(rest[0], str | torch.device):
                kwargs["device"] = rest.pop(0)
                if rest:
                    kwargs["dtype"] = rest.pop(0)
                if rest:
                    kwargs["non_blocking"] = rest.pop(0)
            if kwargs.get("device") is not None:
                device = torch.device(kwargs.pop("device"))
                device = CUDA if device.type == "cuda" else device
                dtype = kwargs.get("dtype") or x.dtype
                if device == META:
                    self.ops.to_meta = True
                    try:
                        return func(x, device)
                    finally:
                        self.ops.to_meta = False
                if device != x.device or kwargs.get("copy"):
                    return func(x, device, dtype, **{k: v for k, v in kwargs.items() if k != "dtype"})
                kwargs.pop("non_blocking", None)
                if dtype == x.dtype:
                    return x
                return func(x, dtype, **{k: v for k, v in kwargs.items() if k != "dtype"})
            args = (x, *rest)
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """`torch.Generator("cuda")` needs a CUDA build; nothing is drawn from it."""

    def __new__(cls, device: Any = None) -> _Generator:
        return super().__new__(cls)


class _Stream:
    """A CUDA stream. All work is on the same one."""

    cuda_stream, device = 0, CUDA

    def __init__(self, *args: Any, ops: Ops, **kwargs: Any):
        self.ops = ops

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event(ops=self.ops)
        event.record()
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.ops.waits("Stream.synchronize")

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None: ...


class _Event(_Stream):
    """A CUDA event. Of the step before the last one it is over: only a host that is too far ahead would wait."""

    recorded = -1

    def record(self, stream: Any = None) -> None:
        self.recorded = self.ops.step

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None:
        if self.recorded < 0 or self.ops.step - self.recorded < 2:
            self.ops.waits("Event.synchronize")

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _replacements(ops: Ops) -> dict[str, Any]:
    """What stands in place of `torch.cuda`'s functions."""
    properties = types.SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80 * 10**9,
        L2_cache_size=50 * 2**20,
        warp_size=32,
        shared_memory_per_block_optin=232448,
    )

    def stream(*args: Any, **kwargs: Any) -> _Stream:
        return _Stream(ops=ops)

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: properties.name,
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: ops.waits("torch.cuda.synchronize"),
        "Stream": stream,
        "Event": lambda *args, **kwargs: _Event(ops=ops),
        "current_stream": stream,
        "default_stream": stream,
        "stream": lambda other: _Stream(ops=ops),
        "set_stream": lambda other: None,
    }


def _launcher(ops: Ops) -> Callable[..., None]:
    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
        chosen = grid(arguments) if callable(grid) else grid
        ops.launch(self, tuple(int(n) for n in chosen), arguments)

    return run


@contextmanager
def absent_gpu(ops: Ops | None = None, dead: list[int] | None = None) -> Iterator[Ops]:
    """The block runs on the absent GPU: `device="cuda"` can be used.

    Args:
        ops: sees every operation.
        dead: what the host knows of dead features: the most in a layer of this rank, and of all. None: nothing, since
            nothing is computed; AuxK then looks at all, which costs most.
    """
    ops = ops or Ops()
    patches = [mock.patch.object(torch.cuda, name, value) for name, value in _replacements(ops).items()]
    patches.append(mock.patch.object(torch, "Generator", _Generator))
    # Older versions of torch make a first tensor on the device when they are told that there is one.
    patches.append(mock.patch("torch._subclasses.fake_tensor.init_gpu_context", return_value=None))
    patches.append(mock.patch.object(Late, "exchange", return_value=dead))
    try:
        from triton.runtime.jit import JITFunction
    except ModuleNotFoundError:
        pass
    else:
        patches.append(mock.patch.object(JITFunction, "run", _launcher(ops)))
    _forget_tensors()
    try:
        with _Fake(allow_non_fake_inputs=True), ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            stack.enter_context(ops)
            stack.enter_context(_Devices(ops))
            yield ops
    finally:
        _forget_tensors()


def _forget_tensors() -> None:
    """Empty the caches of tensors on a device: a fake one must not outlive its mode, nor a true one come in."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0].startswith("clt_"):
            for value in vars(module).values():
                if callable(getattr(value, "cache_clear", None)) and getattr(value, "__module__", "") == name:
                    value.cache_clear()
