"""What chemistry reads are of, as far as their files tell: DNA or RNA, the pore, the sample rate."""

import itertools
import re
from collections import Counter
from typing import NamedTuple

# Pores by the number in a product code (FLO-MIN106D, SQK-NBD114-24), after the flow cells and kits of Dorado's models
FLOW_CELLS = dict.fromkeys(("001", "002", "106", "SP6"), "R9.4.1") | {"114": "R10.4.1", "004": "RNA004"}
KITS = dict.fromkeys(("004", "108", "109", "110", "111"), "R9.4.1") | {"114": "R10.4.1"}
RNA_KITS = {"RNA001": "RNA002", "RNA002": "RNA002", "RNA004": "RNA004"}
MOST = 4  # sorts of reads that a line names


def product_code(text):
    """A kit's or a flow cell's product code, str or bytes, in capitals; "" if it is none, as "not_set"."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return text.upper() if re.fullmatch(r"[a-z]{3}-[a-z0-9_.-]{1,28}", text, re.I | re.A) else ""


class Chemistry(NamedTuple):
    """What a basecaller is for. A part that is not known is empty, or 0."""

    molecule: str = ""  # DNA or RNA
    pore: str = ""  # R9.4.1 or R10.4.1, and for RNA the kit that names the chemistry: RNA002 or RNA004
    sample_rate: int = 0  # Hz, in hundreds: RNA002 is at 3000 or 3012, by the sequencer

    @classmethod
    def of(cls, kit, flow_cell, rna, sample_rate):
        """The chemistry of a read with these product codes, or ""; whether it is known as RNA; sample rate in Hz."""
        pore = RNA_KITS.get(kit[4:10]) or (FLOW_CELLS.get(flow_cell[7:10]) if flow_cell else KITS.get(kit[7:10])) or ""
        if rna and not pore.startswith("RNA"):
            pore = "RNA002" if pore == "R9.4.1" else ""
        molecule = "RNA" if rna or pore.startswith("RNA") else "DNA" if kit or flow_cell else ""
        return cls(molecule, pore, int(round(sample_rate, -2)) if 0 < sample_rate < 1e6 else 0)

    def __str__(self):
        what = f"{self.pore} DNA" if self.pore and self.molecule == "DNA" else self.pore or self.molecule
        return (what or "unknown chemistry") + (f" at {self.sample_rate / 1000:g} kHz" if self.sample_rate else "")

    def differs(self, other):
        """Whether a part that both know is another."""
        return any(one and two and one != two for one, two in zip(self, other, strict=True))


def agreed(chemistries):
    """What those of `chemistries` that know a part agree on; a part that they disagree on is not known."""
    parts = [set(filter(None, part)) for part in zip(*chemistries, strict=True)]
    return Chemistry(*(found.pop() if len(found) == 1 else no for found, no in zip(parts, Chemistry(), strict=True)))


def chemistries_of(reads):
    """{(Chemistry, its product codes in words): number of reads} of a table of READ_DTYPE."""
    counts = Counter()
    for (kit, flow_cell, *rest), number in Counter(reads[["kit", "flow_cell", "rna", "sample_rate"]].tolist()).items():
        codes = [product_code(kit), product_code(flow_cell)]
        counts[Chemistry.of(*codes, *rest), ", ".join(filter(None, codes))] += number
    return counts


def in_words(counts):
    """{what: number of reads} in words, the most frequent first."""
    shown = Counter(counts).most_common(MOST)
    others = sum(counts.values()) - sum(number for _, number in shown)
    return "; ".join([f"{number} of {what}" for what, number in shown] + [f"{others} of others"] * (others > 0))


def say_chemistry(stores):
    """Says of which chemistries the reads of `stores` are, and that a basecaller is for one, if there are several."""
    counts = sum((chemistries_of(store.reads) for store in stores), Counter())
    words = {f"{chemistry} ({codes})" if codes else str(chemistry): n for (chemistry, codes), n in counts.items()}
    print(f"reads: {in_words(words)}")
    if any(one.differs(two) for one, two in itertools.combinations({chemistry for chemistry, _ in counts}, 2)):
        print("--data: chemistries or sample rates differ; a basecaller is for one of them")
