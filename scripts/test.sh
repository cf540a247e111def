#!/usr/bin/env bash
# Set up what the tests need, and run them: `bash scripts/test.sh [pytest arguments]`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

setup_environment requirements.lock requirements-dev.lock
exec .venv/bin/python -m pytest "$@"
