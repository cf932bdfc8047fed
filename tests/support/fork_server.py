"""A process that has imported everything and forks a child for each command; started by `commands`.

It reads requests from a socket. It runs nothing itself, so that it has a single thread when it forks. A child gets the
arguments, environment, folder and descriptors of the request. It ends by exit handlers and flushed files, without
taking down every module, which would take longer than most commands.
"""

from __future__ import annotations

import array
import atexit
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import signal
import socket
import struct
import sys
import threading
import types
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("!I")
PACKAGES = ("clt_plugins", "clt_datasets", "clt_exporters", "clt_kernels", "clt_loggers", "clt_parallel")
PACKAGES += ("clt_activations", "clt_crosslayer_coding", "clt_losses", "clt_reports", "clt_stream", "clt_synthetic")
PACKAGES += ("clt_encoders", "clt_tyings")
IMPORTED_LATE = (
    "datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "nnsight",
    "tensorboard.summary.writer.event_file_writer",
    "torch._dynamo",
    "torch.distributed.run",
    "torch.distributed.nn.functional",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
)
"""What functions of the project import when they are called."""


def import_all() -> None:
    """Every module of the project that can be imported here, and what these import when they are called."""
    # First, as in a new process: nnsight gives every object an attribute, and a plugin of pytest stumbles over it.
    for plugin in entry_points(group="pytest11"):
        plugin.load()
    for package in PACKAGES:
        found = importlib.import_module(package)
        for module in pkgutil.walk_packages(found.__path__, f"{package}."):
            if ".templates." in module.name or module.name.endswith("__main__"):
                continue
            try:
                importlib.import_module(module.name)
            except ImportError:  # an optional library is missing
                continue
    for name in IMPORTED_LATE:
        importlib.import_module(name)
    # What Numba and Pillow do before they compile or save for the first time.
    target = sys.modules["numba"].core.registry.cpu_target
    target.typing_context.refresh()
    target.target_context.refresh()
    sys.modules["PIL.Image"].preinit()


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """A request and the descriptors 0, 1 and 2 of its child; None if no more will come."""
    descriptors = array.array("i")
    head, messages, _, _ = connection.recvmsg(LENGTH.size, socket.CMSG_SPACE(3 * descriptors.itemsize))
    if not head:
        return None
    for _, _, data in messages:
        descriptors.frombytes(data)
    (length,) = LENGTH.unpack(head)
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return json.loads(body), list(descriptors)


def orphan() -> int:
    """Fork a child that is not this process's but the tests' (which adopt orphans): they wait for it and see its exit
    code. Returns its number; 0 in the child."""
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        child = os.fork()
        if child == 0:
            os.close(reader)
            os.close(writer)
            return 0
        os.write(writer, str(child).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(between, 0)
    child = int(os.read(reader, 32))
    os.close(reader)
    return child


def become(request: Mapping[str, Any], descriptors: list[int]) -> Callable[[], object]:
    """Take on what the request says; returns the program."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["cwd"])
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(request["environment"])
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in paths]
    if "OMP_NUM_THREADS" in os.environ and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - by descriptor, for the process
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    kind, program, *arguments = request["arguments"]
    sys.argv = [kind if kind == "-c" else program, *arguments]
    sys.path[:0] = ["" if kind == "-c" else str(Path.cwd()), *more]
    if kind == "-m":
        return lambda: runpy.run_module(program, run_name="__main__", alter_sys=True)
    assert kind == "-c", request["arguments"]
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    return lambda: exec(compile(program, "<string>", "exec"), vars(module))


def serve(connection: socket.socket) -> Callable[[], object] | None:
    """Answer requests until the tests end; returns the program in a child."""
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page
    while received := receive(connection):
        child = orphan()
        if child == 0:
            connection.close()
            return become(*received)
        for descriptor in received[1]:
            os.close(descriptor)
        connection.sendall(LENGTH.pack(child))
    return None


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    import_all()
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    assert threads == 1, f"{threads} threads: a lock that another thread holds would stay locked in every child"
    program = serve(connection)
    if program is None:
        return
    code: int | str | None = None
    try:
        program()
    except SystemExit as end:
        code = end.code
        if not (code is None or isinstance(code, int)):
            raise
    threading._shutdown()  # threads that are no daemons are waited for
    gc.collect()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 255)


if __name__ == "__main__":
    main()
