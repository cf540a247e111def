#!/usr/bin/env bash
# Set everything up and distil a small model: `bash scripts/quickstart.sh [key=value ...]`.
# Ends with the scorecard and the path of the report. A second call reuses everything, and works offline.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

setup_environment requirements.lock
.venv/bin/distill fetch configs/quickstart.yaml "$@"
exec .venv/bin/distill run configs/quickstart.yaml "$@"
