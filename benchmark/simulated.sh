#!/usr/bin/env bash
# What worked best with few labelled R9.4 reads: train a basecaller on simulated reads and their labels, then go on with
# the labelled ones. docs/results.md has what it brings. $1 is the labelled reads, $2 the share of them to train on; the
# rates are those of the grid at 10 %. About 11 minutes of one core.
set -eu
cd "$(dirname "$0")/.."
data=${1:-../shared/data/ecoli_r94_mapped.hdf5}
run=runs/simulated__$(date +%Y%m%d-%H%M%S)
python=.venv/bin/python
export OMP_NUM_THREADS=1

mkdir -p "$run"
$python -m common.simulate "$run/reads.hdf5" --reads 1000 --seed 1
$python finetune_basecaller.py --data "$run/reads.hdf5" --size tiny --steps 1419 --lr 4e-3 --run-dir "$run/simulated"
$python finetune_basecaller.py --data "$data" --label-fraction "${2:-0.1}" --size tiny --steps 400 --lr 8e-3 \
    --pore-model-lr 2e-3 --weights "$run/simulated/basecaller_last.pt" --run-dir "$run/finetuned"
