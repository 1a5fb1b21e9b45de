#!/bin/sh
# Runs a command with a C++ compiler in its environment:   sh tools/with_compiler.sh VENV COMMAND...
# Takes $CXX or the machine's own compiler; where there is none, installs ziglang (Clang, from PyPI) into VENV and uses
# that. One line says what to install when nothing works.
set -eu
venv=$1
shift
python=$venv/bin/python

has_headers='import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'
if ! "$python" -c "$has_headers"; then
    echo "nybble: Python's headers (Python.h) are missing; install them (Debian, Ubuntu: apt install python3-dev)" >&2
    exit 1
fi

compiler=${CXX:-}
if [ -z "$compiler" ]; then
    for name in c++ g++ clang++; do
        if command -v "$name" >/dev/null 2>&1; then
            compiler=$name
            break
        fi
    done
fi

if [ -z "$compiler" ]; then
    echo "nybble: no C++ compiler found; taking one from PyPI (ziglang)" >&2
    if ! "$python" -m pip install --quiet "ziglang==0.16.0"; then
        echo "nybble: no C++ compiler; install one (Debian, Ubuntu: apt install g++) or set CXX" >&2
        exit 1
    fi
    tools=$(cd "$venv" && pwd)/zig
    mkdir -p "$tools"
    absolute=$(cd "$venv" && pwd)/bin/python
    # Without a stated processor zig compiles for this very machine; the extension chooses instruction sets itself.
    printf '#!/bin/sh\nexec "%s" -m ziglang cc -mcpu=baseline "$@"\n' "$absolute" >"$tools/cc"
    printf '#!/bin/sh\nexec "%s" -m ziglang c++ -mcpu=baseline "$@"\n' "$absolute" >"$tools/c++"
    for name in ar ranlib; do
        printf '#!/bin/sh\nexec "%s" -m ziglang %s "$@"\n' "$absolute" "$name" >"$tools/$name"
    done
    chmod +x "$tools"/*
    CC=$tools/cc
    CXX=$tools/c++
    PATH=$tools:$PATH
    export CC CXX PATH
fi

exec "$@"
