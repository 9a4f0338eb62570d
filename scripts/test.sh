#!/usr/bin/env bash
# Installs what the tests need, as scripts/demo.sh does; runs ruff and shellcheck, if they are installed, then the tests.
#
#     bash scripts/test.sh [OPTION OF PYTEST …]        for example: bash scripts/test.sh -m "not slow"
#
# The tests run in as many processes as there are cores; -n 0 runs them in one.
#
# MULTIMAX_DATA=DIR   a folder with multi30k/ (gzipped, raw) and brown/ (train, valid, test .tokens.gz):
#                     for tests on real data; without it they are skipped
# MULTIMAX_TEST_EXTRAS=test,gpu-tests
#                     installs Triton too (1 GB), and tests the GPU kernels without a GPU; else they are skipped;
#                     `checks` adds ruff, shellcheck, and build, which the test of the wheel uses

set -euo pipefail
[[ ${1:-} != --help && ${1:-} != -h ]] || { sed -n '2,/^$/s/^# \?//p' "$0"; exit; }
scripts=$(cd "$(dirname "$0")" >/dev/null && pwd)
root=$(dirname "$scripts")
# shellcheck source=scripts/environment.sh
source "$scripts/environment.sh"

use_environment "$root" "${MULTIMAX_TEST_EXTRAS:-test}"
cd "$root"
! command -v ruff >/dev/null || ruff check .
! command -v shellcheck >/dev/null || shellcheck -x .ci/run ./*/*.sh examples/*/*.sh
exec python -m pytest -n auto --dist loadfile "$@"
