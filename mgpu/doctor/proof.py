"""What a probe measured, and what that proves: copies and all-reduces that arrive, and links under load."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from mgpu.doctor.check import Area, Check, Evidence, Finding, Purpose, Said, Severity, Skip, check
from mgpu.doctor.facts import without_peers
from mgpu.doctor.pcie_rates import lane_gb_s
from mgpu.machine.inspection import CardHealth, Inspection, Readings

# Packet headers leave 80 to 88 % of what the lanes carry; a copy below this share of it has another reason.
_LEAST_SHARE = 0.65


@dataclass(frozen=True, slots=True, kw_only=True)
class CardCopy:
    """A copy from pinned host memory to a card, and its PCIe link meanwhile."""

    gpu: int
    gb_s: float
    pcie_gen: int | None = None
    pcie_width: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCopy:
    """A copy from card `a` to card `b`, compared on `b`; `outcome` is "right", "wrong" or "hang"."""

    a: int
    b: int
    outcome: str
    gb_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """An all-reduce over cards with its values checked: as engines do it, or with peer access switched off
    (`control`). `outcome` is "right", "wrong", "hang", "error" or "unfinished"; `gb_s` is the bandwidth of the bus."""

    gpus: tuple[int, ...]
    control: bool
    outcome: str
    gb_s: float | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """All that a probe found in `seconds`; `problem` is why it could not be (or not finish), None where it did."""

    copies: tuple[CardCopy, ...] = ()
    pairs: tuple[PairCopy, ...] = ()
    collectives: tuple[Collective, ...] = ()
    seconds: float = 0.0
    torch: str | None = None
    problem: str | None = None

    def shows_peers(self, gpus: Collection[int]) -> bool:
        """Return whether all copies between these cards, both ways, arrived, and all sums over them and others."""
        arrived = {(each.a, each.b) for each in self.pairs if each.outcome == "right"}
        sums = [each for each in self.collectives if not each.control]
        return (
            len(gpus) > 1
            and arrived.issuperset(itertools.permutations(gpus, 2))
            and all(each.outcome == "right" for each in sums)
            and any(set(gpus) <= set(each.gpus) for each in sums)
        )


def proof_checks(proof: Proof | None) -> tuple[Check, ...]:
    """Return the checks of a probe; without one they say nothing."""

    def arrives(inspection: Inspection, _: Purpose) -> Said:
        if proof:
            yield from _arrives(proof, without_peers(inspection))

    def is_fast(_: Inspection, __: Purpose) -> Said:
        if proof:
            yield from _slow_copies(proof)

    return replace(_PROOF, run=arrives), replace(_MEASURED, run=is_fast)


def with_links_under_load(inspection: Inspection, proof: Proof) -> Inspection:
    """Return the inspection with each card's link as it was while the probe copied: what is judged only of busy cards
    can then be judged."""
    loaded = {copy.gpu: copy for copy in proof.copies if copy.pcie_gen is not None}

    def busy(card: CardHealth) -> CardHealth:
        copy = loaded.get(card.gpu)
        if copy is None:
            return card
        at_s = max((reading.at_s for reading in card.readings), default=0.0) + 1.0
        reading = Readings(at_s=at_s, utilisation_percent=100, pcie_gen=copy.pcie_gen, pcie_width=copy.pcie_width)
        return replace(card, readings=(*card.readings, reading))

    return replace(inspection, cards=tuple(map(busy, inspection.cards)))


def _arrives(proof: Proof, without: str) -> Iterator[Finding | Skip]:
    yield from _bad_pairs(proof, without)
    runs = {(each.gpus, each.control): each for each in proof.collectives}
    for (gpus, control), run in runs.items():
        if control or run.outcome == "right":
            continue
        other = runs.get((gpus, True))
        if run.outcome == "unfinished":
            yield Skip(reason=f"the all-reduce over {_cards(gpus)} was not finished in time")
        elif other is not None and other.outcome == "right":
            yield _collective(
                run,
                f"all-reduce over {_cards(gpus)} {_WORDS[run.outcome]}; without peer access it is right",
                (without, "mgpu doctor --explain p2p-grant-unsafe"),
                other,
            )
        elif other is None or other.outcome == "unfinished":
            yield _collective(
                run,
                f"all-reduce over {_cards(gpus)} {_WORDS[run.outcome]}; the control run was not finished",
                (without, "mgpu doctor --probe --only p2p-proof"),
                other,
            )
        else:
            yield _collective(
                run,
                f"all-reduce over {_cards(gpus)} {_WORDS[run.outcome]}, without peer access too",
                ("NCCL_DEBUG=INFO mgpu doctor --probe --only p2p-proof", "nvidia-smi topo -m"),
                other,
            )
        break  # the larger groups fail with the smaller one
    if proof.problem:
        yield Skip(reason=f"not proved: {proof.problem}")


def _bad_pairs(proof: Proof, without: str) -> Iterator[Finding]:
    for outcome, words in (("wrong", "arrives wrong"), ("hang", "never arrives")):
        bad = [pair for pair in proof.pairs if pair.outcome == outcome]
        if bad:
            first, more = bad[0], f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            yield Finding(
                severity=Severity.fail,
                summary=f"what GPU{first.a} copies to GPU{first.b} {words}{more}",
                evidence=tuple(Evidence(path=f"copy GPU{p.a} to GPU{p.b}, read on GPU{p.b}", value=words) for p in bad),
                fix=(without, "mgpu doctor --explain p2p-grant-unsafe"),
                gpus=tuple(sorted({gpu for pair in bad for gpu in (pair.a, pair.b)})),
                confidence="probed",
            )


_WORDS = {"wrong": "gives wrong sums", "hang": "hangs", "error": "fails"}


def _collective(run: Collective, summary: str, fix: tuple[str, ...], other: Collective | None) -> Finding:
    seen = [Evidence(path="all-reduce", value=": ".join(filter(None, (run.outcome, run.detail))))]
    if other is not None:
        seen.append(Evidence(path="all-reduce, NCCL_P2P_DISABLE=1", value=other.outcome))
    return Finding(
        severity=Severity.fail, summary=summary, evidence=tuple(seen), fix=fix, gpus=run.gpus, confidence="probed"
    )


def _cards(gpus: tuple[int, ...]) -> str:
    return "GPUs " + ",".join(map(str, gpus)) if len(gpus) <= 4 else f"{len(gpus)} GPUs"


def _slow_copies(proof: Proof) -> Iterator[Finding | Skip]:
    if proof.problem and not proof.copies:
        yield Skip(reason=f"not proved: {proof.problem}")
    for copy in proof.copies:
        lane = lane_gb_s(copy.pcie_gen)
        if lane is None or not copy.pcie_width:
            yield Skip(reason=f"GPU{copy.gpu} copies at {copy.gb_s:.1f} GB/s, but its link could not be read meanwhile")
            continue
        raw = lane * copy.pcie_width
        if copy.gb_s < _LEAST_SHARE * raw:
            link = f"Gen{copy.pcie_gen} x{copy.pcie_width}"
            yield Finding(
                severity=Severity.warn,
                summary=f"GPU{copy.gpu} copies at {copy.gb_s:.1f} GB/s; {link} carries {0.8 * raw:.1f}",
                evidence=(Evidence(path=f"copy of pinned memory to GPU{copy.gpu}", value=f"{copy.gb_s:.1f} GB/s"),),
                fix=("mgpu doctor --only pcie-replay-rate,pcie-aer,iommu-translated -v",),
                gpus=(copy.gpu,),
                confidence="probed",
            )


@check("p2p-proof", Area.p2p, "A")
def _proof(_: Inspection, __: Purpose) -> Said:
    """Copies between cards, or sums over them, that finish and do not arrive (only with --probe).

    Read: each card copies a pattern to each other card, which compares it in its own memory: reading it back over the
    same way would show what was sent, not what arrived. Then one process a card sums tensors with NCCL over 2, 4 ...
    all cards and checks every value; and once more with NCCL_P2P_DISABLE=1. It needs the PyTorch of an installed vLLM,
    lasts 20 s at most, and leaves busy cards alone.
    Rule: fail for wrong or missing data. Where the control run is right, peer access is to blame; where it is wrong as
    well, something else is.
    Why: the driver's "peer access: OK" is a claim. Behind an IOMMU that translates, or bridges that redirect, writes to
    a peer are lost without an error: engines then hang at their first all-reduce, or answer `!!!!` at full speed.
    Do: NCCL_P2P_DISABLE=1 works at once, and costs little; the cause is in iommu-translated and acs-redirect.
    """
    yield from ()


@check("pcie-measured", Area.pcie, "B")
def _measured(_: Inspection, __: Purpose) -> Said:
    """Copies to a card that are slower than its PCIe link (only with --probe).

    Read: 300 ms of copies from pinned host memory to each card; its link's generation and width are read meanwhile,
    because an idle link is slow on purpose.
    Rule: warn below 65 % of what the lanes carry (Gen3 0.985, Gen4 1.97, Gen5 3.94 GB/s a lane); 80 to 88 % is what
    packet headers leave.
    Why: a link that must resend, or host memory on the far socket, slows the loading of models and every exchange
    between cards that goes through the host.
    Do: look for link errors (pcie-replay-rate, pcie-aer), and try another slot or riser.
    """
    yield from ()


_PROOF, _MEASURED = _proof, _measured
