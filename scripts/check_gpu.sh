#!/usr/bin/env bash
# Does everything work on this machine's GPU, and how fast? Run it once on a machine with a GPU; under 8 minutes.
#
#     bash scripts/check_gpu.sh [--out FILE] [--without-gpu] [--short]
#
#   --out FILE       all figures, as JSON (default: check_gpu.json)
#   --without-gpu    the checks that need no GPU: kernels interpreted on the CPU, a short training in fp32
#   --short          fewer cases and updates
#   --help           show this text
#
# Checks kernels against float64 in fp32, fp16 and bf16; benchmarks them against PyTorch's attention and stock fairseq;
# compares training losses in fp32, fp16, bf16 and with --amp and, with two GPUs, of training on both and on one. Each
# line ends in its verdict; the last says how many are wrong. If any is, the exit status is 1.

set -euo pipefail

scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
# shellcheck source=scripts/common.sh
source "$scripts/common.sh"

table='
    --out          out      text
    --without-gpu  without  =yes
    --short        short    =yes
'
out=check_gpu.json
without=
short=
parse_options "$table" "$@"
need_python
need_fairseq
need_module multimax_fairseq
[[ -d $(dirname "$out") ]] || die "--out: there is no folder $(dirname "$out")"
if [[ -z $without ]]; then
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        die "torch sees no GPU here: run this on a machine with one, or --without-gpu for what goes without"
    need_module triton
fi
exec "$PYTHON" "$scripts/check_gpu.py" --out "$out" ${without:+--without-gpu} ${short:+--short}
