#!/usr/bin/env bash
# The main job on real reads, behind docs/results. $1 is the folder that holds the reads, ../shared/data if not given.
set -eu
cd "$(dirname "$0")/.."
data=${1:-../shared/data}
run=runs/real_reads__$(date +%Y%m%d-%H%M%S)
python=.venv/bin/python

$python barlow.py --data "$data/unlabelled_r94.pod5" "$data/na12878_r941.pod5" --size tiny --max-steps 300 \
    --run-dir "$run/barlow"
$python finetune_basecaller.py --data "$data/ecoli_r94_mapped.hdf5" --size tiny \
    --weights "$run/barlow/pore_model.pt" --run-dir "$run/finetuned"
$python finetune_basecaller.py --data "$data/ecoli_r94_mapped.hdf5" --size tiny --run-dir "$run/scratch"
$python -m benchmark.plot_runs "$run/comparison.png" \
    "from scratch=$run/scratch" "Barlow Twins, then fine-tuned=$run/finetuned"
