#!/usr/bin/env bash
# Basecalls of whole reads and what the chunks' lengths do to them, behind docs/results.md. $1 is a basecaller.pt that
# was fine-tuned on the E. coli reads (benchmark/real_reads.sh), $2 the folder that holds the reads, ../shared/data if
# not given.
set -eu
cd "$(dirname "$0")/.."
weights=$1
data=${2:-../shared/data}
run=runs/basecalls__$(date +%Y%m%d-%H%M%S)
python=.venv/bin/python
mkdir -p "$run"

call() {  # name reads arguments...
    $python basecall.py "$weights" "$data/$2" -o "$run/$1.fastq" "${@:3}"
}
evaluate() {  # name labelled reads, arguments...
    echo "== $1, against $2"
    $python -m benchmark.evaluate_calls "$run/$1.fastq" "${@:2}"
}

ecoli=ecoli_r94_mapped.hdf5
for beam in 1 5 32; do
    call ecoli_beam_$beam $ecoli --beam-size $beam
    evaluate ecoli_beam_$beam "$data/$ecoli" --picture "$run/qualities_beam_$beam.png"
done

$python prepare_data.py "$data/na12878_r941.pod5" --bam "$data/na12878_r941_moves.bam" -o "$run/na12878"
call na12878 na12878_r941.pod5
evaluate na12878 "$run/na12878" --all-reads

# as if each read were one chunk: the overlap is twice what the three layers of tiny see, 3 x 600 samples, and 48
$python basecall.py "$weights" "$data/$ecoli" -o "$run/whole.bam" --beam-size 1 --chunk-len 16000 --overlap 3648
$python prepare_data.py "$data/$ecoli" --bam "$run/whole.bam" -o "$run/whole"
while read -r window chunk overlap; do
    name=window_${window}_chunk_${chunk}_overlap_$overlap
    call "$name" $ecoli --beam-size 1 --attention-window "$window" --chunk-len "$chunk" --overlap "$overlap"
    evaluate "$name" "$data/$ecoli"
    evaluate "$name" "$run/whole"
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
