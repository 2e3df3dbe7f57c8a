#!/usr/bin/env bash
# How much each default of fine-tuning matters to the tiny size, from scratch, in three epochs; behind docs/results.
# $1 is mapped-signal HDF5; two runs at a time, of one thread each.
set -eu
cd "$(dirname "$0")/.."
data=${1:-../shared/data/ecoli_r94_mapped.hdf5}
run=runs/recipe_study__$(date +%Y%m%d-%H%M%S)
mkdir -p "$run"
export OMP_NUM_THREADS=1

xargs -P 2 -L 1 sh -c '.venv/bin/python finetune_basecaller.py --data "$0" --size tiny --epochs 3 --run-dir "$@" \
    >"$1.log" 2>&1' "$data" <<END
$run/defaults
$run/lr_4e-3 --lr 4e-3
$run/chunk_3600 --chunk-len 3600 --batch-size 11
$run/batch_64 --batch-size 64
$run/warmup_10 --warmup-steps 10
$run/jitter_0 --gain-jitter 0 --offset-jitter 0
END
.venv/bin/python -m benchmark.plot_runs "$run/study.png" "$run"/*/
