# Sourced by quickstart.sh and test.sh: makes .venv in the repository's root and installs exactly what the locks name.
#
#   setup_environment requirements.lock [requirements-dev.lock]
#
# The second call sees from a stamp that nothing changed, and touches neither pip nor the network. TORCH_INDEX, if set,
# is the package index that torch (and nothing else) comes from. PYTHON, if set, is the Python to use.

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    .venv/bin/python -m pip --version >/dev/null 2>&1 && return
    local python
    python=$(find_python) || fail "python3: 3.11 or later is needed, found $(python3 --version 2>&1 || true) (install it, or set PYTHON)"
    "$python" -c 'import ensurepip, venv' 2>/dev/null \
        || fail "$python: cannot make a virtual environment (install python3-venv)"
    echo "making .venv with $("$python" --version) ..."
    "$python" -m venv --clear .venv || fail ".venv: could not be made (install python3-venv, or free space)"
}

# Say which build of torch pip will take, and its size, before it is installed.
install_torch() {
    local options=(--constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch)
    .venv/bin/python -m pip install --quiet --dry-run --report .venv/torch.json "${options[@]}"
    .venv/bin/python scripts/torch_size.py .venv/torch.json
    .venv/bin/python -m pip install --quiet "${options[@]}"
}

# Print what the environment must hold: the hash of each file that decides it.
wanted_packages() {
    .venv/bin/python -c 'import hashlib, sys
for name in sys.argv[1:]: print(name, hashlib.sha256(open(name, "rb").read()).hexdigest())
' "$@" constraints.txt pyproject.toml
}

setup_environment() {
    unset PYTHONPATH PYTHONHOME
    export PYTHONNOUSERSITE=1
    make_venv
    local wanted stamp=.venv/installed.sha256 locks=("$@")
    wanted=$(wanted_packages "${locks[@]}")
    if [ -f "$stamp" ] && ! grep -qvxFf "$stamp" <<<"$wanted"; then
        return
    fi
    echo "installing the packages of ${locks[*]} into .venv ..."
    local files=()
    for lock in "${locks[@]}"; do files+=(--requirement "$lock"); done
    .venv/bin/python -m pip install --quiet --no-deps --require-hashes "${files[@]}"
    install_torch
    .venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
    .venv/bin/python -m pip check --quiet || fail ".venv: the installed packages do not fit together (remove .venv, run again)"
    printf '%s\n' "$wanted" >"$stamp"
}
