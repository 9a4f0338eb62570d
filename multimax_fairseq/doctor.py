"""``multimax-doctor``: checks what is installed, which backend computes, and whether every mapping is right.

Prints one line per check. Exit status: 0 if all is well, 1 otherwise.
"""

import copy
import importlib.metadata
import logging
import platform
import sys
from typing import Iterator, Tuple

from .tools import ArgumentParser, reason_of

PACKAGE = "multimax_fairseq"
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}  # of probabilities and gradients of a few scores

Finding = Tuple[bool, str]  # (is it well, line to print)


def check_packages() -> Iterator[Finding]:
    """Compare the installed packages with the requirements in this package's metadata."""
    from packaging.requirements import Requirement

    yield True, f"Python {platform.python_version()}"
    try:
        requirements = importlib.metadata.requires(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        yield False, f"{PACKAGE} is not installed, only importable: pip install it (README.md, Install)"
        return
    for wanted in map(Requirement, requirements):
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            try:
                version = importlib.metadata.version(wanted.name)
                fits = wanted.specifier.contains(version, prereleases=True)
            except importlib.metadata.PackageNotFoundError:
                version, fits = "is missing", False
            yield fits, f"{wanted.name} {version}" + ("" if fits else f": install '{wanted.name}{wanted.specifier}'")


def check_fairseq() -> Iterator[Finding]:
    """Without fairseq all is well where it cannot be had; where it can, :func:`check_packages` misses it."""
    from .without_fairseq import advice, has_fairseq

    if not has_fairseq():
        yield True, advice()
        return
    from .models import MultimaxTransformerModel

    yield True, f"fairseq imports, and has {MultimaxTransformerModel.__name__}"


def check_backends() -> Iterator[Finding]:
    """Which code computes here. A missing backend is no fault: another takes its place, and the log says why."""
    import torch

    from .kernels import backend
    from .kernels.attention import gpu
    from .kernels.rows import cpu

    kind = "no C++" if cpu.LIBRARY.functions is None else "C++"
    yield True, f"backend: {backend.backend()} ({backend.ENVIRONMENT_VARIABLE})"
    yield True, f"CPU, {torch.backends.cpu.get_cpu_capability()}: fp32 in {kind}"
    triton = f"Triton {gpu.version()}" if gpu.version() else "no Triton that fits"
    if not torch.cuda.is_available():
        yield True, f"GPU: none that torch {torch.__version__} sees; {triton}"
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        yield gpu.version() is not None, f"GPU {number}: {name}, capability {major}.{minor}; {triton}"


def check_mappings() -> Iterator[Finding]:
    """Compare every mapping, over rows and in attention, and its gradients with their formulas in float64."""
    import torch

    from .attention import mapped_attention
    from .mappings import MAPPINGS, build_mapping

    def results_of(mapping, scores, upstream):
        scores = scores.detach().requires_grad_()
        small = scores.masked_fill(scores.isinf(), 0.0) / 4
        results = mapping(scores), mapped_attention(small, small, small, mapping)
        sum((result * upstream).sum() for result in results).backward()
        return [result.detach().cpu().double() for result in (*results, scores.grad)]

    places = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    if torch.cuda.is_available():
        places += [("cuda", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    for name in MAPPINGS:
        torch.manual_seed(1)
        mapping = build_mapping(name)
        scores = (2 * torch.randn(64, 40)).bfloat16().double()  # the same numbers in every dtype
        scores[torch.rand(64, 40) < 0.1] = float("-inf")
        scores[0] = float("-inf")
        upstream = torch.randn(64, 40, dtype=torch.float64)
        expected = results_of(copy.deepcopy(mapping).double(), scores, upstream)  # which no kernel computes
        well, texts = True, []
        for device, dtype in places:
            kind = str(dtype).removeprefix("torch.")
            try:
                actual = results_of(mapping.to(device), scores.to(device, dtype), upstream.to(device, dtype))
                error = max((a - b).abs().max().item() for a, b in zip(actual, expected))
                well &= error <= TOLERANCE[kind]
                texts.append(f"{device} {kind} {error:.0e}")
            except Exception as failure:  # whatever a compiler or a driver raises
                well = False
                texts.append(f"{device} {kind}: {reason_of(failure)}")
        yield well, f"{name}: error {', '.join(texts)}"


def main() -> int:
    """Print the findings; return the exit status."""
    ArgumentParser(__doc__).parse_args()
    # the reason why something is not compiled is in the log, of this package alone
    logging.basicConfig(stream=sys.stdout, format="%(levelname)-7s %(message)s")
    logging.getLogger(PACKAGE).setLevel(logging.INFO)
    well = True
    for check in (check_packages, check_fairseq, check_backends, check_mappings):
        try:
            for is_well, line in check():
                print(f"{'ok     ' if is_well else 'PROBLEM'} {line}", flush=True)
                well &= is_well
        except Exception as error:  # an import can raise anything; an earlier check may have reported the cause
            print(f"PROBLEM {check.__name__}: {reason_of(error)} (README.md, Install)")
            well = False
    print("All is well." if well else "Not all is well: see the lines that start with PROBLEM.")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
