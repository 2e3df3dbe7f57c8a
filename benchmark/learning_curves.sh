#!/usr/bin/env bash
# A learning curve of each method on real reads, for its page: docs/curves/*.png. 130 steps of the tiny model, at the
# learning rates of benchmark/evidence.py. $1 is the folder of the reads, ../shared/data if not given, $2 where the
# runs go. About half an hour of one core.
set -eu
cd "$(dirname "$0")/.."
data=${1:-../shared/data}
run=${2:-runs/learning_curves__$(date +%Y%m%d-%H%M%S)}
python=.venv/bin/python
export OMP_NUM_THREADS=1

pretrain() {  # method arguments...
    $python "$1.py" --data "$data/unlabelled_r94.pod5" "$data/na12878_r941.pod5" --size tiny --chunk-len 1200 \
        --batch-size 64 --max-steps 130 --lr 1e-3 --warmup-steps 25 --run-dir "$run/$1" "${@:2}"
    $python -m benchmark.plot_runs "docs/curves/$1.png" "$run/$1"
}
mkdir -p docs/curves
pretrain barlow
pretrain simclr
pretrain moco --queue 2048 --momentum 0.99
pretrain simsiam --lr 1e-4
pretrain byol --momentum 0.99
pretrain dino --momentum 0.99 --student-temperature 0.5 --teacher-temperature 0.3
pretrain cpc
pretrain masked --lr 2e-3
