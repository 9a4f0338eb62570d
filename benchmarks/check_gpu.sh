#!/usr/bin/env bash
# Does everything work on this machine's GPU, and how fast? Run it first on a machine with a GPU; under 8 minutes.
#
#     bash benchmarks/check_gpu.sh [--out FILE] [--without-gpu] [--short]
#
# Checks kernels against float64 in fp32, fp16 and bf16; benchmarks them against PyTorch's attention and stock fairseq;
# compares training losses in fp32, fp16, bf16 and with --amp and, with two GPUs, of training on both and on one. Each
# line ends in its verdict; the last says how many are wrong. If any is, the exit status is 1.

exec "${PYTHON:-python}" "$(dirname "$0")/check_gpu.py" "$@"
