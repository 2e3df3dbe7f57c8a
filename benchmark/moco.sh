#!/usr/bin/env bash
# A method between simulated labels and few real ones: benchmark/simulated.sh with MoCo on raw reads in the middle. $1
# is the folder that holds the reads. docs/results.md has what it brings over training from scratch, and that MoCo's
# part in it does not show; the other methods fare alike. These are the commands of the grid's row simulated+moco, seed
# 0. About 15 minutes of one core.
set -eu
cd "$(dirname "$0")/.."
data=${1:-../shared/data}
run=runs/moco__$(date +%Y%m%d-%H%M%S)
python=.venv/bin/python
export OMP_NUM_THREADS=1

mkdir -p "$run"
$python -m common.simulate "$run/reads.hdf5" --reads 1000 --seed 1
$python finetune_basecaller.py --data "$run/reads.hdf5" --size tiny --steps 1419 --lr 4e-3 --run-dir "$run/simulated"
$python moco.py --data "$data/unlabelled_r94.pod5" "$data/na12878_r941.pod5" --size tiny --chunk-len 1200 \
    --batch-size 64 --epochs 1 --lr 1e-4 --warmup-steps 25 --cosine --queue 2048 --momentum 0.99 \
    --weights "$run/simulated/basecaller_last.pt" --run-dir "$run/moco"
$python finetune_basecaller.py --data "$data/ecoli_r94_mapped.hdf5" --label-fraction 0.1 --size tiny --steps 400 \
    --lr 8e-3 --pore-model-lr 2e-3 --weights "$run/moco/pore_model.pt" --run-dir "$run/finetuned"
