#!/usr/bin/env bash
# Each method for 100 steps on real reads, then three epochs of fine-tuning from each and from scratch, behind
# docs/results. $1 is the folder that holds the reads, ../shared/data if not given.
set -eu
cd "$(dirname "$0")/.."
data=${1:-../shared/data}
run=runs/all_methods__$(date +%Y%m%d-%H%M%S)
python=.venv/bin/python

pretrain() {  # name script arguments...
    $python "$2.py" --data "$data/unlabelled_r94.pod5" --size tiny --max-steps 100 --run-dir "$run/pretrained/$1" "${@:3}"
}
finetune() {  # name arguments...
    $python finetune_basecaller.py --data "$data/ecoli_r94_mapped.hdf5" --size tiny --epochs 3 \
        --run-dir "$run/finetuned/$1" "${@:2}"
}

finetune scratch
for method in cpc simclr moco simsiam byol dino barlow masked; do
    pretrain $method $method
    finetune $method --weights "$run/pretrained/$method/pore_model.pt"
done
pretrain cpc_thin cpc --encoder thin
finetune cpc_thin --encoder thin --weights "$run/pretrained/cpc_thin/pore_model.pt"
finetune byol_target --weights "$run/pretrained/byol/target_pore_model.pt"
finetune scratch_thin --encoder thin

$python -m benchmark.plot_runs "$run/pretrained.png" "$run"/pretrained/*/
$python -m benchmark.plot_runs "$run/finetuned.png" "$run"/finetuned/*/
