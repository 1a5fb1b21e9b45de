#!/bin/sh
# Builds the kernels and the engine with a driver (tests/native/driver.cpp) under AddressSanitizer with
# UndefinedBehaviorSanitizer, and again under ThreadSanitizer, and runs both. No Python, no torch: what is found is ours.
# tools/sanitize.sh [address|thread]...   (both unless given; CXX chooses the compiler, g++ by default; JOBS how many at once)
set -eu
cd "$(dirname "$0")/.."
compiler=${CXX:-g++}
jobs=${JOBS:-$(nproc 2>/dev/null || echo 2)}
kernels=src/nybble/kernels
build=build/sanitize

flags_of() { # the flags of one source, as CMakeLists.txt gives them
  avx2="-mavx2 -mfma -mf16c -mprfchw"
  avx512="$avx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512 -Wno-maybe-uninitialized -Wno-uninitialized"
  case $1 in
    */isa_avx2.cpp) echo "$avx2" ;;
    */isa_avx2vnni.cpp) echo "$avx2 -mavxvnni" ;;
    */isa_avx512.cpp) echo "$avx512" ;;
    */isa_avx512vnni.cpp) echo "$avx512 -mavx512vnni" ;;
  esac
}

sources="$kernels/weight.cpp $kernels/cpu.cpp $kernels/threads.cpp $kernels/isa_scalar.cpp src/nybble/engine/engine.cpp
  src/nybble/engine/attention.cpp src/nybble/engine/sample.cpp tests/native/driver.cpp"
define=
case $(uname -m) in
  x86_64 | amd64)
    define=-DNYBBLE_X86
    sources="$kernels/isa_avx512vnni.cpp $kernels/isa_avx512.cpp $kernels/isa_avx2vnni.cpp $kernels/isa_avx2.cpp $sources"
    ;;
esac

for kind in ${*:-address thread}; do
  case $kind in
    address) sanitize="-fsanitize=address,undefined -fno-sanitize-recover=all" ;;
    thread) sanitize="-fsanitize=thread" ;;
    *)
      echo "sanitize.sh: '$kind' is not a sanitizer; use address or thread" >&2
      exit 2
      ;;
  esac
  mkdir -p "$build/$kind"
  echo "sanitize: building with $kind"
  for source in $sources; do
    object=$build/$kind/$(basename "$source" .cpp).o
    # A change in any header builds all again: there are few files.
    newer=$(find src/nybble tests/native -name '*.[ch]pp' -newer "$object" 2>/dev/null || echo all)
    [ -z "$newer" ] ||
      echo "$compiler -std=c++20 -O1 -g1 -fno-omit-frame-pointer -ffp-contract=off $define $sanitize $(flags_of "$source") -c $source -o $object"
  done | xargs -P "$jobs" -I '{}' sh -c '{}'
  # shellcheck disable=SC2086  # the flags are several words
  "$compiler" $sanitize "$build/$kind"/*.o -o "$build/$kind/driver" -pthread
  ASAN_OPTIONS=${ASAN_OPTIONS:-detect_stack_use_after_return=1} TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1} "$build/$kind/driver"
done
echo "sanitize: clean"
