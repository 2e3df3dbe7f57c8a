#!/usr/bin/env bash
# Basecalls of whole reads, by beam size and by chunk length, behind docs/results. $1 is a basecaller.pt fine-tuned on
# the E. coli reads (benchmark/real_reads.sh), $2 the folder that holds the reads, ../shared/data if not given.
set -eu
cd "$(dirname "$0")/.."
weights=$1
data=${2:-../shared/data}
run=runs/basecalls__$(date +%Y%m%d-%H%M%S)
python=.venv/bin/python
mkdir -p "$run"

call() {  # file reads arguments...
    $python basecall.py "$weights" "$data/$2" -o "$run/$1" "${@:3}"
}
evaluate() {  # file labelled reads, arguments...
    echo "== $1, against $2"
    $python -m benchmark.evaluate_calls "$run/$1" "${@:2}"
}

ecoli=ecoli_r94_mapped.hdf5
for beam in 1 5 32; do
    call ecoli_beam_$beam.fastq $ecoli --beam-size $beam
    evaluate ecoli_beam_$beam.fastq "$data/$ecoli" --picture "$run/qualities_beam_$beam.png"
done

$python prepare_data.py "$data/na12878_r941.pod5" --bam "$data/na12878_r941_moves.bam" -o "$run/na12878"
call na12878.fastq na12878_r941.pod5
evaluate na12878.fastq "$run/na12878" --all-reads

# Identity with the labels, and with calls of the same model in chunks at other places. A window of 100000 is none. In
# the first line chunks overlap by twice the reach of tiny's three layers, 3 x 600 samples, and 48: the read as a whole
while read -r window chunk overlap; do
    name=window_${window}_chunk_${chunk}_overlap_$overlap
    arguments=(--attention-window "$window" --chunk-len "$chunk")
    call "$name.bam" $ecoli "${arguments[@]}" --overlap "$overlap"
    call "$name.shifted.bam" $ecoli "${arguments[@]}" --overlap $((overlap + 80))
    $python prepare_data.py "$data/$ecoli" --bam "$run/$name.bam" -o "$run/$name"
    evaluate "$name.bam" "$data/$ecoli"
    evaluate "$name.shifted.bam" "$run/$name"
done <<END
600 16000 3648
600 3600 400
600 3600 800
600 2400 400
600 1200 200
400 3600 400
800 3600 400
100000 1200 200
100000 2400 400
100000 3600 400
END

# docs/squiggle.png
$python -m benchmark.draw_read "$run/squiggle.png" "$data/$ecoli" --read ce4d48fa-9112-4aa8-b655-10c5064129db \
    --samples 1200 --bam called="$run/window_600_chunk_3600_overlap_400.bam"
