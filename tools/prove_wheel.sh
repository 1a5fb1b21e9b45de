#!/bin/sh
# Proves a wheel:   sh tools/prove_wheel.sh PYTHON WHEEL
# Installs it, from wheels only, into a fresh virtual environment whose PATH and CC/CXX offer no compiler, then runs it.
set -eu
python=$1
wheel=$2
fresh=.wheel-venv
rm -rf "$fresh"
"$python" -m venv "$fresh"
fresh=$(cd "$fresh" && pwd)
wheel=$(cd "$(dirname "$wheel")" && pwd)/$(basename "$wheel")
lock=$(pwd)/requirements.lock
CC=/bin/false
CXX=/bin/false
export CC CXX
"$fresh/bin/python" -m pip --disable-pip-version-check install --quiet --only-binary :all: --constraint "$lock" "$wheel"

PATH=$fresh/bin
export PATH
cd "$fresh" # away from the sources: what is imported must come from the wheel
python - <<'PROOF'
import shutil
from nybble import kernels

assert not any(shutil.which(name) for name in ("cc", "c++", "gcc", "g++", "clang++")), "a compiler is on PATH"
assert kernels.native_available(), "the wheel came without its extension"
print(f"kernels: {kernels.instruction_set()}")
PROOF
nybble --version
nybble compare --variants fp32,int4:g64 --force -o proof
echo "proved: $wheel"
