#!/usr/bin/env bash
# Set up what the tests need, and run them: `bash scripts/test.sh [pytest arguments]`.
# Without arguments all of them, in a process a core; a file's tests share a process, and what is costly to set up.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

setup_environment requirements.lock requirements-dev.lock
[ $# -gt 0 ] || set -- --numprocesses auto --dist loadfile --no-loadscope-reorder
exec .venv/bin/python -m pytest "$@"
