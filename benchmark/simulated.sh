#!/usr/bin/env bash
# What worked with few labelled R9.4 reads: train a basecaller on simulated reads and their labels, then fine-tune it on
# a tenth of the labelled reads in $1. docs/results/studies.md has what it adds. With one read or two, halve the learning rates
# and give a --batch-size that they can fill, as benchmark/evidence.py does. About 11 minutes of one core.
set -eu
cd "$(dirname "$0")/.."
data=${1:-../shared/data/ecoli_r94_mapped.hdf5}
run=runs/simulated__$(date +%Y%m%d-%H%M%S)
python=.venv/bin/python
export OMP_NUM_THREADS=1

mkdir -p "$run"
$python -m common.reads.simulate "$run/reads.hdf5" --reads 1000 --seed 1
$python finetune_basecaller.py --data "$run/reads.hdf5" --size tiny --steps 1419 --lr 4e-3 --run-dir "$run/simulated"
$python finetune_basecaller.py --data "$data" --label-fraction 0.1 --size tiny --steps 400 --lr 8e-3 \
    --weights "$run/simulated/basecaller_last.pt" --run-dir "$run/finetuned"
