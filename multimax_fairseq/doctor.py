"""``multimax-doctor``: checks what is installed, which backend computes, and whether every mapping is right.

Prints one line per check. Exit status: 0 if all is well, 1 otherwise.
"""

import importlib
import importlib.metadata
import logging
import os
import platform
import sys
from contextlib import contextmanager
from typing import Iterator, List, Tuple
from unittest.mock import patch

PACKAGE = "multimax_fairseq"
PYTHONS = ((3, 10), (3, 14))
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}  # of probabilities and gradients of a few scores

Finding = Tuple[bool, str]  # (is it well, line to print)


def check_python() -> List[Finding]:
    lowest, highest = (".".join(map(str, version)) for version in PYTHONS)
    fits = PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]
    advice = "" if fits else f": this package needs {lowest} to {highest}; make an environment with one of them"
    return [(fits, f"Python {platform.python_version()}{advice}")]


def check_packages() -> List[Finding]:
    """Compare the installed packages with the requirements in this package's metadata."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or ()]
    except importlib.metadata.PackageNotFoundError:
        return [(False, f"{PACKAGE} is not installed, only importable: pip install it (README.md, Install)")]
    findings = []
    for wanted in (one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})):
        try:
            version = importlib.metadata.version(wanted.name)
            fits = wanted.specifier.contains(version, prereleases=True)
        except importlib.metadata.PackageNotFoundError:
            fits, version = False, "is missing"
        advice = "" if fits else f": pip install '{wanted.name}{wanted.specifier}'"
        findings.append((fits, f"{wanted.name} {version}{advice}"))
    return findings


def check_fairseq() -> List[Finding]:
    """Without fairseq all is well where it cannot be had; where it can, :func:`check_packages` misses it."""
    from .without_fairseq import advice, has_fairseq

    if not has_fairseq():
        return [(True, advice())]
    try:
        importlib.import_module("fairseq")
        models = importlib.import_module(f"{PACKAGE}.models")
    except Exception as error:  # anything that fairseq imports can raise
        return [(False, f"fairseq does not import ({type(error).__name__}: {error}): install what README.md says")]
    return [(True, f"fairseq imports, and has {models.MultimaxTransformerModel.__name__}")]


def check_backends() -> List[Finding]:
    """Which code computes here, and why. A missing backend is no fault: another takes its place."""
    import torch

    from .kernels import backend
    from .kernels.rows import cpu

    findings = [(True, f"backend: {backend.backend()} ({backend.ENVIRONMENT_VARIABLE})")]
    with messages() as said:
        compiled = cpu.LIBRARY.functions is not None
    capability = torch.backends.cpu.get_cpu_capability()
    reason = f" ({'; '.join(said)})" if not compiled else ""
    findings.append((True, f"CPU, {capability}: fp32 in {'C++' if compiled else 'no C++'}{reason}"))
    try:
        triton = f"Triton {importlib.import_module('triton').__version__}"
    except ImportError:
        triton = "no Triton"
    if not torch.cuda.is_available():
        return [*findings, (True, f"GPU: none that torch {torch.__version__} sees; {triton}")]
    for number in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        name = torch.cuda.get_device_name(number)
        findings.append((triton != "no Triton", f"GPU {number}: {name}, capability {major}.{minor}; {triton}"))
    return findings


def check_mappings() -> List[Finding]:
    """Compare every mapping, over rows and in attention, and its gradients with their formulas in float64."""
    import torch

    from .kernels.backend import ENVIRONMENT_VARIABLE
    from .mappings import MAPPINGS, build_mapping

    places = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    if torch.cuda.is_available():
        places += [("cuda", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    findings = []
    for name in MAPPINGS:
        torch.manual_seed(1)
        mapping = build_mapping(name)
        scores = (2 * torch.randn(64, 40)).bfloat16().double()  # the same numbers in every dtype
        scores[torch.rand(64, 40) < 0.1] = float("-inf")
        scores[0] = float("-inf")
        upstream = torch.randn(64, 40, dtype=torch.float64)
        with patch.dict(os.environ, {ENVIRONMENT_VARIABLE: "eager"}):
            expected = _result(mapping.double(), scores, upstream)
        errors = []
        for device, dtype in places:
            kind = str(dtype).removeprefix("torch.")
            try:
                result = _result(mapping.float().to(device), scores.to(device, dtype), upstream.to(device, dtype))
                error = max((a.cpu().double() - b).abs().max().item() for a, b in zip(result, expected))
            except Exception as failure:  # whatever a compiler or a driver raises
                errors.append((False, f"{device} {kind}: {type(failure).__name__}: {str(failure).splitlines()[0]}"))
                continue
            errors.append((error <= TOLERANCE[kind], f"{device} {kind} {error:.0e}"))
        findings.append((all(well for well, _ in errors), f"{name}: error " + ", ".join(text for _, text in errors)))
    return findings


def _result(mapping, scores, upstream):
    from .attention import mapped_attention

    scores = scores.detach().requires_grad_()
    small = scores.masked_fill(scores.isinf(), 0.0) / 4
    results = mapping(scores), mapped_attention(small, small, small, mapping)
    sum((result * upstream).sum() for result in results).backward()
    return *(result.detach() for result in results), scores.grad


@contextmanager
def messages() -> Iterator[List[str]]:
    """Collect what the package logs."""
    said: List[str] = []
    logger, handler = logging.getLogger(PACKAGE), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def main() -> int:
    """Print the findings; return the exit status."""
    if sys.argv[1:]:
        print(__doc__.strip())
        return 0 if sys.argv[1:] in (["--help"], ["-h"]) else 2
    logging.basicConfig(handlers=[logging.NullHandler()])  # otherwise importing fairseq makes the root logger print
    well = True
    for check in (check_python, check_packages, check_fairseq, check_backends, check_mappings):
        try:
            findings = check()
        except ImportError as error:  # an earlier check has reported the cause
            findings = [(False, f"{check.__name__}: {error}")]
        for is_well, line in findings:
            print(f"{'ok     ' if is_well else 'PROBLEM'} {line}", flush=True)
            well &= is_well
    print("All is well." if well else "Not all is well: see the lines that start with PROBLEM.")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
