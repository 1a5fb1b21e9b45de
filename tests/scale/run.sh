#!/bin/sh
# Jobs inside a control group that the kernel enforces; they say the most memory that they took.
#     tests/scale/run.sh WORK rtn [GB]       60 GB of sparse checkpoint by rounding, in 2 GiB
#     tests/scale/run.sh WORK gptq [MORE...] 1.1 B drawn parameters by GPTQ, in 4 GiB; MORE: options (--windows 128)
# Needs the rights to make a control group; WORK needs room for a quarter of GB, or 6 GB.
set -eu
work=$1
kind=${2:-rtn}
python=${PYTHON:-.venv/bin/python}
rm -rf "$work/model" "$work/out" "$work/out.part"
if [ "$kind" = rtn ]; then
    limit=$((2 << 30))
    "$python" tests/scale/large.py "$work/model" --gb "${3:-60}"
    set -- --memory 1.8GB
else
    limit=$((4 << 30))
    shift 2
    "$python" tests/scale/large.py "$work/model" --drawn
    set -- --memory 3.8GB --method gptq --calibrate "$work/model/calibration.txt" --windows 32 --window 512 "$@"
fi
if [ -d /sys/fs/cgroup/memory ]; then
    group=/sys/fs/cgroup/memory/nybble-scale
    mkdir -p $group
    echo $limit > $group/memory.limit_in_bytes
    peak=$group/memory.max_usage_in_bytes
    echo 0 > $peak
else
    group=/sys/fs/cgroup/nybble-scale
    mkdir -p $group
    echo $limit > $group/memory.max
    echo 0 > $group/memory.swap.max
    peak=$group/memory.peak
fi
sh -c 'echo $$ > "$0/cgroup.procs"; python=$1; shift; exec "$python" - "$@"' $group "$python" \
    "$work/model" --to int4:g64 -o "$work/out" "$@" <<'END'
import resource, sys, time
sys.argv = ["nybble", "quantize", *sys.argv[1:]]
from nybble.cli import main
began = time.monotonic()
try:
    main()
finally:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{time.monotonic() - began:.0f} s; resident at most {most / 1e6:.0f} MB, files that were mapped included")
END
echo "control group, page cache included, at most: $(cat $peak) of $limit bytes"
