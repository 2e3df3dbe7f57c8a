#!/usr/bin/env bash
# What was tried to make pretraining pay, behind docs/results: pretraining of the tiny size in several ways, then 400
# steps of fine-tuning with a tenth of the labels, validated on held-out training reads (--tune). $1 is the folder that
# holds the reads, ../shared/data if not given. About 90 minutes of one core. The row with further augmentations
# (--extra-augmentations gain-offset time-warp mask-spans) ran at commit ff17fcc; the option is gone, and a line in
# simclr.py's view() is in its place.
set -eu
cd "$(dirname "$0")/.."
data=${1:-../shared/data}
run=runs/pretraining_study__$(date +%Y%m%d-%H%M%S)
python=.venv/bin/python
export OMP_NUM_THREADS=1

pretrain() {  # name script arguments...
    $python "$2.py" --data "$data/unlabelled_r94.pod5" "$data/na12878_r941.pod5" --size tiny --lr 1e-3 \
        --warmup-steps 25 --cosine --run-dir "$run/pretrained/$1" "${@:3}"
}
finetune() {  # name, name of the pretraining or nothing, arguments...
    $python finetune_basecaller.py --data "$data/ecoli_r94_mapped.hdf5" --size tiny --label-fraction 0.1 --steps 400 \
        --tune --lr 8e-3 --run-dir "$run/finetuned/$1" ${2:+--weights "$run/pretrained/$2/pore_model.pt"} "${@:3}"
}

pretrain moco moco --chunk-len 1200 --batch-size 64 --epochs 1 --queue 2048 --momentum 0.99
pretrain cpc_long cpc --chunk-len 1200 --batch-size 64 --epochs 5
pretrain simclr simclr --chunk-len 1200 --batch-size 64 --epochs 1
pretrain simclr_100 simclr --chunk-len 100 --batch-size 768 --epochs 1
pretrain simclr_200 simclr --chunk-len 200 --batch-size 384 --epochs 1
pretrain simclr_200_long simclr --chunk-len 200 --batch-size 384 --epochs 4
pretrain simclr_200_drop simclr --chunk-len 200 --batch-size 384 --epochs 1 --drop-chance 0 0.2
pretrain barlow_200_drop barlow --chunk-len 200 --batch-size 384 --epochs 1 --drop-chance 0 0.2

finetune scratch ""
for name in moco cpc_long simclr simclr_100 simclr_200 simclr_200_long simclr_200_drop barlow_200_drop; do
    finetune $name $name
done
for name in moco cpc_long simclr_200_drop; do
    finetune ${name}_slower $name --pore-model-lr 2e-3
done
for name in moco simclr; do
    finetune ${name}_frozen_first $name --freeze-steps 100
done
$python -m benchmark.plot_runs "$run/study.png" "$run"/finetuned/*/
