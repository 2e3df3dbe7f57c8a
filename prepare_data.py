"""Raw reads in, a read store out, or Bonito's training arrays; with an account of what was left out, and an audit.

    python prepare_data.py reads/ more.pod5 -o store/
    python prepare_data.py reads/ --bam calls.bam -o store/
    python prepare_data.py reads/ --reference genome.fasta --basecaller basecaller.pt -o store/
    python prepare_data.py reads/ --reference genome.fasta --bam calls.bam -o store/
    python prepare_data.py store/ -o arrays/ --bonito

Scripts that are given raw reads prepare them on their own, once. Do it yourself to see the audit, to keep the store
where you like, or for data so large that reading all of it to find the prepared copy takes long.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from pydantic import PositiveInt
from tqdm import tqdm

import basecall
from common import InputError
from common.args import Share, parse_args
from common.chunks import Chunks
from common.ctc import best_path, ctc_steps_needed
from common.device import pick_device
from common.pore_model import frames_of
from common.reads.bam import Basecalls
from common.reads.bonito import write_bonito
from common.reads.chemistry import say_chemistry
from common.reads.files import written_whole
from common.reads.formats import is_bonito
from common.reads.genome import MIN_IDENTITY, Genome, open_genome
from common.reads.kmers import shared_kmers
from common.reads.store import open_stores, prepare


@dataclass
class Args:
    data: tyro.conf.Positional[tuple[Path, ...]]
    """POD5, FAST5, BLOW5, mapped-signal HDF5, folders of them or of Bonito's arrays; with --bonito read stores, too"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """the folder to make"""
    chunk_len: PositiveInt = 3600
    """samples per chunk; reads shorter than one are left out"""
    labelled_only: bool = False
    """leave out reads without bases, as --bonito, --bam and --basecaller always do"""
    bam: tuple[Path, ...] = ()
    """basecalls of the reads with move tables (dorado basecaller --emit-moves): BAM, SAM or CRAM, files or folders of
    them; their bases become the labels, or with --reference the genome's; with --basecaller they need no move tables"""
    reference: Path | None = None
    """FASTA of the genome: its bases become the labels; for a BAM that is aligned, what it is aligned to, not needed if
    it has MD tags, but for CRAM; calls that are not are aligned by mappy"""
    basecaller: Path | None = None
    """a basecaller.pt of finetune_basecaller.py: calls the reads, if there is no --bam, and places the bases of
    --reference in the signal; needs mappy"""
    validation_region: tuple[str, ...] = ()
    """where labels are split by locus: the parts of the genome, CONTIG or CONTIG:FIRST-LAST, whose reads are
    validation; if not given, one in eight of its windows, by hash"""
    min_coverage: Share = 0.5
    """leave out aligned reads with less than this share of the called bases in the alignment"""
    min_identity: Share | None = None
    """leave out aligned reads with less than this share of matches in the alignment; 0.7 if not given, and 0.6 where
    mappy aligns"""
    bonito: bool = False
    """write the labelled reads as Bonito's training arrays: chunks.npy, references.npy, reference_lengths.npy"""


def audit(stores, chunk_len):
    """Prints reads, chunks, and for labelled reads samples per base, chunks infeasible for CTC and shared 21-mers."""
    needed, sequences = [], []
    any_bases = any(store.reads["bases_length"].any() for store in stores)
    for split in ("training", "validation"):
        for labelled in (False, True)[: 1 + any_bases]:
            try:
                chunks = Chunks(stores, chunk_len, split, labelled)
            except InputError as error:
                print(f"  {error}")
                continue
            if not len(chunks):
                continue
            kind = "labelled " if labelled else ""
            short = f"; {chunks.too_short} reads are shorter" if chunks.too_short else ""
            print(f"  {split}: {chunks.number_of_reads} {kind}reads, {len(chunks)} chunks of {chunk_len}{short}")
            if labelled:
                needed += [ctc_steps_needed(batch.targets, batch.target_lengths) for batch in chunks.tiles(64)]
                sequences.append(chunks.sequences())
    if not needed:
        return
    labelled = np.concatenate([store.reads[store.reads["bases_length"] > 0] for store in stores])
    print(f"  {labelled['length'].sum() / labelled['bases_length'].sum():.2f} samples per base")
    needed, frames = torch.cat(needed), frames_of(chunk_len)
    for head, steps in (("one time step per frame", frames), ("two, as finetune_basecaller.py", 2 * frames)):
        share = (needed > steps).float().mean()
        print(f"  {share:.1%} of chunks are infeasible for CTC at stride 8 with {head} ({steps} steps)")
    if len(sequences) == 2:
        same, either = shared_kmers(sequences[1], sequences[0])
        print(f"  training reads hold {same:.1%} of validation reads' 21-mers (same strand), {either:.1%} (either)")


def export_bonito(stores, out, chunk_len):
    """Writes all tiles of the labelled reads as Bonito's arrays; `out` appears when they are whole."""
    with written_whole(out) as folder:
        folder.mkdir()
        for split, part in (("training", folder), ("validation", folder / "validation")):
            chunks = Chunks(stores, chunk_len, split, labelled=True)
            if not len(chunks):
                continue
            longest = max(batch.targets.shape[1] for batch in chunks.tiles(64))
            batches = tqdm(chunks.tiles(64), f"writing {split}", -(-len(chunks) // 64), unit=" batches")
            write_bonito(part, batches, chunk_len, longest)


def caller_of(args):
    """What a Genome takes for `call`, with --basecaller."""
    device, settings = pick_device("auto"), basecall.Args(args.basecaller, args.data, args.out)
    model = basecall.open_basecaller(args.basecaller, None, device)

    def call(reads):
        for raw, log_probs in basecall.log_probabilities(model, reads, settings, device):
            log_probs = log_probs[: -(-len(raw.dacs) // basecall.STRIDE)]  # the last frame may go on beyond the signal
            yield raw, log_probs.double().numpy(), *best_path(log_probs)

    return call


def labels_of(args):
    """The Basecalls or the Genome that labels the reads; None where they bring labels of their own."""
    aligned, mapped = (0.7, MIN_IDENTITY) if args.min_identity is None else (args.min_identity,) * 2
    calls = call = aligner = None
    if args.bam:
        calls = Basecalls(args.bam, args.reference, args.min_coverage, aligned, moves=not args.basecaller)
    if not args.basecaller and (not calls or calls.aligned or not args.reference):
        if args.validation_region:
            raise InputError("--validation-region: has no use without --basecaller, or --reference and unaligned --bam")
        return calls
    if args.basecaller:
        call = caller_of(args)
    if not (calls and calls.aligned):
        aligner = open_genome(args.reference)
    return Genome(aligner, call, basecall.STRIDE, args.min_coverage, mapped, args.validation_region, calls)


def main(args):
    if not args.data:
        raise InputError("no input; name raw files, folders of them or a read store")
    if args.out.exists():
        raise InputError(f"--out {args.out}: exists; choose another folder or remove it")
    source = "--bam" if args.bam else "--basecaller" if args.basecaller else None
    if source:
        if args.bonito:
            raise InputError(f"--bonito: not with {source}; prepare a read store first, then give that with --bonito")
        if any(is_bonito(path) for path in args.data):
            raise InputError(f"{source}: Bonito's arrays have bases of their own; give raw reads")
    elif args.reference:
        raise InputError("--reference: has no use without --basecaller or --bam")
    if args.basecaller and not args.reference:
        raise InputError("--basecaller: give it the genome, --reference")
    labels = labels_of(args)
    if args.bonito:
        stores = open_stores(args.data)
        export_bonito(stores, args.out, args.chunk_len)
    else:
        stores = [prepare(args.data, args.out, args.chunk_len, args.labelled_only, labels)]
    for store in stores:
        print("\n".join(store.report()))
    if labels:
        print(labels.report(stores[0].reads))
    say_chemistry(stores)
    print("audit:")
    audit(stores, args.chunk_len)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main(parse_args(Args))
