#!/bin/sh
# A checkpoint of GB gigabytes quantized by rounding inside a control group of 2 GiB; says the most memory that it took.
#     tests/scale/run.sh WORK [GB]
# Needs the rights to make a control group; WORK needs room for a quarter of GB.
set -eu
work=$1
gb=${2:-60}
limit=$((2 << 30))
python=${PYTHON:-.venv/bin/python}
rm -rf "$work/sparse" "$work/out" "$work/out.part"
"$python" tests/scale/sparse.py "$work/sparse" --gb "$gb"
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
sh -c "echo \$\$ > $group/cgroup.procs; exec $python - '$work/sparse' '$work/out'" <<'END'
import resource, sys, time
sys.argv = ["nybble", "quantize", sys.argv[1], "--to", "int4:g64", "--memory", "1.8GB", "-o", sys.argv[2]]
from nybble.cli import main
began = time.monotonic()
try:
    main()
finally:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{time.monotonic() - began:.0f} s; resident at most {most / 1e6:.0f} MB, files that were mapped included")
END
echo "control group, page cache included, at most: $(cat $peak) of $limit bytes"
