"""The kernels that PyTorch's compiler makes of the functions of rows for a GPU, as binaries, without a GPU.

    python tests/inductor_binaries.py multimax_rows cross_entropy_rows_        prints a line for each binary

:func:`..kernels.compiler.compile_function` traces as always; then the graph is moved to a GPU that only a description
of exists, Inductor writes its Triton source, and Triton compiles that for sm_90. In a process of its own, as PyTorch
remembers what it has been told of the GPU.
"""

import ast
import importlib.util
import re
import sys
import tempfile
import types
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGET = GPUTarget("cuda", 90, 32)


class Driver:
    """Triton's, of a GPU that is not there."""

    get_current_target = staticmethod(lambda: TARGET)
    get_current_device = staticmethod(lambda: 0)
    get_benchmarker = staticmethod(lambda: None)
    get_device_interface = staticmethod(lambda: torch.cuda)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))


triton.runtime.driver.set_active(Driver())

import torch  # noqa: E402
import torch._dynamo.device_interface  # noqa: E402
import torch._inductor  # noqa: E402
from torch._inductor.decomposition import select_decomp_table  # noqa: E402
from torch._inductor.graph import GraphLowering  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

from multimax_fairseq.kernels.compiler import Kernel, compile_function  # noqa: E402
from multimax_fairseq.kernels.loss import cross_entropy  # noqa: E402
from multimax_fairseq.kernels.rows import compiled as rows  # noqa: E402

H100 = types.SimpleNamespace(
    name="H100", major=9, minor=0, multi_processor_count=132, max_threads_per_multi_processor=2_048, warp_size=32,
    regs_per_multiprocessor=65_536, total_memory=80 << 30, shared_memory_per_block_optin=232_448,
    shared_memory_per_block=49_152, max_threads_per_block=1_024, L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip
BLOCK = {"XBLOCK": 1, "YBLOCK": 1, "R0_BLOCK": 1_024}
HEADER = """import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""


def described_gpu():
    """PyTorch's questions about the GPU, answered."""
    interface = torch._dynamo.device_interface.get_interface_for_device("cuda")
    stack = ExitStack()
    answers = {"is_available": True, "get_device_properties": H100, "get_device_capability": (9, 0),
               "current_device": 0, "device_count": 1}  # fmt: skip
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
    for owner, name, answer in (
        (interface.Worker, "get_device_properties", H100), (interface, "get_device_properties", H100),
        (interface, "get_compute_capability", 90), (interface, "is_available", True),
    ):  # fmt: skip
        function = staticmethod(lambda *_, answer=answer, **__: answer)
        stack.enter_context(mock.patch.object(owner, name, function, create=True))
    return stack


def triton_source(function, examples):
    """What Inductor writes for ``function``, asked as :mod:`..kernels.compiler` asks it."""
    sources = []

    def compile_graph(graph, inputs, options):
        for node in graph.graph.nodes:
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        mode = inputs[0].fake_mode
        with mode:
            moved = [torch.empty_strided(i.shape, i.stride(), dtype=i.dtype, device="cuda") for i in inputs]
        graph = make_fx(graph, decomposition_table=select_decomp_table(), tracing_mode="symbolic")(*moved)
        inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
        with described_gpu() as stack:
            stack.enter_context(torch._inductor.config.patch({**options, "compile_threads": 1}))
            stack.enter_context(V.set_fake_mode(mode))
            lowering = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env)
            stack.enter_context(V.set_graph_handler(lowering))
            stack.enter_context(V.set_debug_handler(mock.MagicMock()))
            lowering.run(*inputs)
            sources.append(lowering.codegen()[0].value)

    with mock.patch.object(torch._inductor, "compile", compile_graph):
        compile_function(function, examples)
    return sources[0]


def binaries(source, folder):
    """Of each Triton kernel in a source its name and its binary for ``TARGET``."""
    for name, text in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", source, re.S):
        meta = re.search(r"triton_meta=(\{.*\}),?$", text, re.M)[1]
        signature, constants = (
            ast.literal_eval(re.search(rf"'{key}': (\{{.*?\}})", meta)[1]) for key in ("signature", "constants")
        )
        path = folder / f"{name}.py"
        path.write_text(HEADER + text[text.index("@triton.jit") :])
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
        constants.update({block: BLOCK[block] for block in function.arg_names if block in BLOCK})
        compiled = triton.compile(ASTSource(fn=function, signature=signature, constexprs=constants), target=TARGET)
        yield name, compiled.asm["cubin"]


def examples_of(name, dtype=torch.float16):
    """Arguments of a function of rows, by their names in its signature."""
    function = getattr(rows, name, None) or getattr(cross_entropy, name)
    assert isinstance(function, Kernel)
    matrix, parameters = torch.zeros(3_072, 160, dtype=dtype), torch.zeros(2, 2)
    known = {"thresholds": parameters, "gains": parameters, "smoothing": torch.zeros(1)}
    names = function.eager.__code__.co_varnames[: function.eager.__code__.co_argcount]
    return function.eager, [known.get(argument, matrix) for argument in names]


def main():
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:]:
            path = Path(folder) / name
            path.mkdir()
            found = list(binaries(triton_source(*examples_of(name)), path))
            for kernel, binary in found:
                print(name, kernel, len(binary), binary[:4] == b"\x7fELF", flush=True)


if __name__ == "__main__":
    main()
