#!/bin/sh
# The environment of `make interop`: other people's readers beside this checkout.
#   sh tools/interop.sh wheel VENV               llama-cpp-python's wheel, built once (2 to 10 minutes) and kept
#   sh tools/interop.sh environment VENV FOLDER  FOLDER: a virtual environment with the readers; it sees all that VENV has
# The wheel lies in ${XDG_CACHE_HOME:-~/.cache}/nybble/wheels, in a folder of this version, processor and recipe: it is built for
# the processor that builds it.
set -eu
version=0.3.36
# Only the library: no multimodal part, no chat templates, no https. What is left out is no part of reading or writing a file.
# The compiler's flags stay llama.cpp's own. Its quantizers are compiled for the oldest x86, where a product and an addition are
# rounded apart; where a compiler fuses them (arm64), tests/formats/ggml_library.py finds that out.
options="-C cmake.define.LLAVA_BUILD=OFF -C cmake.define.LLAMA_OPENSSL=OFF"
root=$(cd "$(dirname "$0")/.." && pwd)

say() { echo "nybble: $*" >&2; }

key_of_machine() { # names the system, the processor and the recipe
  processor=$(grep -m 2 -E '^(model name|flags|Features)' /proc/cpuinfo 2>/dev/null || sysctl -n machdep.cpu.brand_string 2>/dev/null || true)
  echo "$(uname -s)-$(uname -m)-$(printf '%s %s' "$processor" "$options" | cksum | cut -d' ' -f1)"
}
folder=${XDG_CACHE_HOME:-$HOME/.cache}/nybble/wheels/llama_cpp_python-$version-$(key_of_machine)

wheel_in() { find "$1" -maxdepth 1 -name 'llama_cpp_python-*.whl' 2>/dev/null | head -n 1; }

build_wheel() {
  venv=$1
  [ -z "$(wheel_in "$folder")" ] || return 0
  mkdir -p "$folder"
  work=$(mktemp -d "$folder/work.XXXXXX")
  trap 'rm -rf "$work"' EXIT INT TERM
  say "building llama-cpp-python $version; 2 to 10 minutes, once: the wheel is kept in $folder"
  # llama-cpp-python asks for llama.cpp's `common` library whatever is set before; a file that project() reads has the last word.
  echo 'set(LLAMA_BUILD_COMMON OFF)' >"$work/lean.cmake"
  # Not through pip's own cache: whoever asks pip for this version elsewhere should get all of it.
  # shellcheck disable=SC2086  # the options are several words
  if ! PATH="$(cd "$venv" && pwd)/bin:$PATH" CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-$(nproc 2>/dev/null || echo 2)} \
    sh "$root/tools/with_compiler.sh" "$venv" "$venv/bin/python" -m pip --disable-pip-version-check wheel --quiet \
    --no-cache-dir --retries 1 --timeout 20 --no-deps --no-build-isolation --no-binary llama-cpp-python --wheel-dir "$work" \
    $options -C "cmake.define.CMAKE_PROJECT_llama.cpp_INCLUDE=$work/lean.cmake" "llama-cpp-python==$version" >"$work/log" 2>&1; then
    mv "$work/log" "$folder/log"
    say "cannot build llama-cpp-python $version (it takes a package index and a C++ compiler); what was said is in $folder/log"
    return 1
  fi
  mv "$(wheel_in "$work")" "$folder/"
}

make_environment() {
  venv=$1
  target=$2
  build_wheel "$venv"
  requirements=$root/tools/interop-requirements.txt
  gptqmodel=$root/tools/interop-gptqmodel.txt
  state=$(cat "$requirements" "$gptqmodel" "$0" | cksum)$folder$root
  [ "$(cat "$target/.installed" 2>/dev/null)" != "$state" ] || return 0
  rm -rf "$target"
  "$venv/bin/python" -m venv "$target"
  # A line that runs the .pth files of VENV too, so that nybble is this checkout with its built extension.
  "$venv/bin/python" - "$target" <<'LINK'
import subprocess
import sys
import sysconfig

where = "import sysconfig; print(sysconfig.get_path('purelib'))"
theirs = subprocess.run([f"{sys.argv[1]}/bin/python", "-c", where], check=True, capture_output=True, text=True).stdout.strip()
with open(f"{theirs}/venv.pth", "w", encoding="utf-8") as file:
    file.write(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
LINK
  say "installing other projects' readers into $target; a minute or two"
  install="$target/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --retries 1 --timeout 20"
  if ! $install -r "$requirements" "$(wheel_in "$folder")"; then
    say "cannot install the readers of $requirements; it takes a package index"
    return 1
  fi
  $install -r "$gptqmodel" >"$target/gptqmodel.log" 2>&1 ||
    say "could not install GPTQModel ($target/gptqmodel.log); tests that need it are skipped"
  echo "$state" >"$target/.installed"
}

case ${1:-} in
  wheel) build_wheel "$2" ;;
  environment) make_environment "$2" "$3" ;;
  *)
    say "interop.sh: '${1:-}' is none of wheel, environment"
    exit 2
    ;;
esac
