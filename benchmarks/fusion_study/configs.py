"""What is tried: ways to fuse, and the references that they are measured against."""

import math
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase

from minifuse.errors import UsageError

Terms = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Fused:
    """One way to fuse: one stream that sees all segments.

    weights:   (signal, beta) pairs; w = softmax(sum of beta * signal), none for 1/N each
    positions: aligned or restart
    balance:   the segments weigh as N ** (1 - balance) prompts do: the bias is log(w) and that
    sharpness: factor on the scores of segment keys, before any bias
    keep:      only so many segments, the likeliest; weights are those among them
    within:    only segments whose likelihood is at most so many nats below the best one's
    layers:    all, or where the weights hold, late (from the middle on) or early; elsewhere
               segments weigh 1/N, or where there are no weights, have no bias
    split:     separate residual streams, one for each segment, in so many sixths of the layers;
               their weighted mean is the fused stream's from there on
    contrast:  exponent on a segment's attention mass, query by query and head by head, which the
               weights then scale; the total over segments stays. 0 makes masses equal to weights
    total:     factor on the log of the segments' total mass, query by query and head by head
    mixed:     the weighted mean of N attentions, each over one segment, prefix and view
    """

    weights: Terms = ()
    positions: str = "aligned"
    balance: float = 1.0
    sharpness: float = 1.0
    keep: int | None = None
    within: float | None = None
    layers: str = "all"
    split: int = 0
    contrast: float = 1.0
    total: float = 1.0
    mixed: bool = False

    @property
    def name(self) -> str:
        """`fused`, its weights, and every other field that is not the default."""
        parts = ["fused", *([name_terms(self.weights)] if self.weights else [])]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "weights" and value != entry.default:
                text = value if isinstance(value, str) else f"{value:g}"
                parts.append(f"{entry.name}={text}")
        return " ".join(parts)

    def lift(self, num_segments: int) -> float:
        """Nats on the scores of all segment keys."""
        return (1 - self.balance) * math.log(num_segments)

    @property
    def emphasis(self) -> "Fused":
        """What of it can be done to a single prompt as well: more attention to the segment."""
        return Fused(balance=min(self.balance, 1.0), sharpness=max(self.sharpness, 1.0))

    @property
    def is_regrouped(self) -> bool:
        """Whether segments are weighed by the mass that they have, query by query."""
        return self.mixed or self.contrast != 1 or self.total != 1


def name_terms(terms: Terms) -> str:
    """likelihood@1+confidence@0.5, for example."""
    return "+".join(f"{signal}@{beta:g}" for signal, beta in terms) or "uniform"


def _by(**betas: float) -> Terms:
    return tuple(betas.items())


LIKELIHOOD = _by(likelihood=1.0)
CONFIDENCE = _by(confidence=1.0)
BALANCES = (0.0, 0.25, 0.5, 0.75, 1.25, 1.5)
SPLITS = (1, 2, 3, 4, 5)

WEIGHTINGS: tuple[Terms, ...] = (
    *(_by(likelihood=beta) for beta in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)),
    *(_by(confidence=beta) for beta in (0.25, 0.5, 1.0, 2.0, 4.0)),
    *(
        _by(likelihood=one, confidence=other)
        for one, other in ((0.5, 0.5), (1.0, 0.5), (1.0, 1.0), (2.0, 1.0), (2.0, 2.0), (4.0, 1.0))
    ),
    *(_by(agreement=beta) for beta in (0.5, 1.0, 2.0, 4.0)),
    *(_by(agreement_both=beta) for beta in (1.0, 2.0)),
    *(_by(likelihood=1.0, agreement=beta) for beta in (1.0, 2.0)),
    *(_by(mass=beta) for beta in (0.5, 1.0, 2.0)),
    *(_by(mass_late=beta) for beta in (0.5, 1.0, 2.0)),
    *(_by(likelihood_z=beta) for beta in (0.5, 1.0)),
    *(_by(confidence_z=beta) for beta in (0.5, 1.0)),
    *(_by(likelihood_range=beta) for beta in (1.0, 2.0)),
    _by(likelihood_z=0.5, confidence_z=0.5),
    *(_by(likelihood_sum=beta) for beta in (0.1, 0.3)),
    *(_by(top=beta) for beta in (0.5, 1.0)),
    *(_by(first=beta) for beta in (0.5, 1.0)),
    _by(likelihood=1.0, first=0.5),
)

CONFIGS: tuple[Fused, ...] = (
    Fused(),
    Fused(positions="restart"),
    *(Fused(balance=balance) for balance in BALANCES),
    *(Fused(positions="restart", balance=balance) for balance in BALANCES),
    *map(Fused, WEIGHTINGS),
    *(
        Fused(terms, positions="restart")
        for terms in (
            LIKELIHOOD,
            _by(likelihood=2.0),
            CONFIDENCE,
            _by(likelihood=1.0, confidence=1.0),
            _by(likelihood=2.0, confidence=1.0),
        )
    ),
    *(
        Fused(terms, sharpness=factor)
        for factor in (0.7, 0.8, 0.9, 1.1, 1.25, 1.5)
        for terms in ((), LIKELIHOOD)
    ),
    *(
        Fused(terms, balance=balance)
        for balance in BALANCES
        for terms in (*(_by(likelihood=beta) for beta in (0.25, 0.5, 1.0, 2.0)), CONFIDENCE)
    ),
    *(Fused(terms, "restart", 0.5) for terms in (_by(likelihood=0.25), LIKELIHOOD)),
    *(Fused(balance=0.5, sharpness=factor) for factor in (1.1, 1.25)),
    *(Fused(balance=0.5, split=sixths) for sixths in (2, 3)),
    *(Fused(balance=0.5, keep=count) for count in (4, 3)),
    *(Fused(balance=0.5, layers=where) for where in ("late", "early")),
    *(
        Fused(terms, balance=0.5)
        for terms in (
            _by(agreement=0.5),
            _by(agreement=1.0),
            _by(mass=1.0),
            _by(likelihood=0.5, agreement=0.5),
            _by(likelihood=0.5, confidence=0.25),
            _by(first=0.5),
        )
    ),
    *(Fused(keep=count) for count in (4, 3, 2)),
    *(Fused(within=nats) for nats in (0.5, 1.0)),
    *(Fused(terms, split=sixths) for sixths in SPLITS for terms in ((), LIKELIHOOD)),
    *(Fused(terms, layers=where) for where in ("late", "early") for terms in ((), LIKELIHOOD)),
    # Weights that every query and head finds for itself.
    *(
        Fused(terms, contrast=exponent)
        for exponent in (0.0, 0.5, 1.5, 2.0)
        for terms in ((), LIKELIHOOD)
    ),
    *(Fused(terms, mixed=True) for terms in ((), LIKELIHOOD)),
    # Temperature and scale over contexts encoded in parallel, as in APE (arXiv:2502.05431).
    *(
        Fused(balance=0.0, sharpness=sharpness, total=total)
        for sharpness, total in ((1.0, 0.8), (1.0, 0.9), (1.1, 0.8), (1.25, 0.8))
    ),
)

SINGLES = ("origin", "mean single", "best single")
ENSEMBLES = ("logit_avg", "prob_avg", "prob_max")
# Of these the report takes the best with the same weights.
UNIFORM_ENSEMBLES = ("logit_avg", "prob_avg")
WEIGHTED_ENSEMBLES = ("weighted_avg", "weighted_prob_avg", "weighted_max")


def choose_configs(patterns: str) -> tuple[Fused, ...]:
    """Configurations whose names match one of some patterns, as in `fused,fused likelihood*`.

    raises: UsageError for a pattern that matches none
    """
    chosen: list[Fused] = []
    for pattern in patterns.split(","):
        wanted = "*" if pattern.strip() == "all" else pattern.strip()
        found = [config for config in CONFIGS if fnmatchcase(config.name, wanted)]
        if not found:
            known = ", ".join(config.name for config in CONFIGS)
            raise UsageError(f"--configs has {pattern!r}, which no name matches; there are {known}")
        chosen.extend(found)
    return tuple(dict.fromkeys(chosen))
