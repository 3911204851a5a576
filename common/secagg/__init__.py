"""Secure aggregation: SecAgg+ for active adversaries, as pure state machines.

**Goal.** The server learns the sum of the hospitals' vectors (weighted updates, weights,
metrics) over at least ``min_cohort`` of them, and nothing else about any one.

**Adversary.** A server that does anything it likes, with some of a hospital's neighbours on
its side. With ``k`` hospitals in a neighbourhood, threshold ``t`` and ``c`` colluding
neighbours in each, no single hospital is opened while ``c <= min(2 t - k - 1, k - 2)``: two
for 4 of 5, and for all of 4. Both secrets of one hospital would need ``2 t`` shares, and there
are ``k + c``, since each honest neighbour reveals one; and quorums of ``t`` that signed
different survivors would overlap in more than ``c`` hospitals. For cohorts of at most ``k``
this holds for every allowed ``t``; in a ring it is shown for ``t >= k - 1`` (4 of 5), and for
a lower threshold only without colluders. Against a server that follows the protocol and only
reads along, the bound is ``t - 1``.

**Limits.** False inputs (poisoning) and what the sum itself reveals (differential privacy's
task) are out of scope. Without a roster the server can invent hospitals and stand in the
middle. In a ring, four or more dropped and colluding hospitals that lie so as to cut it twice
reveal the sum of an arc (of two hospitals or more), and colluders can influence the ring's
order by choosing their keys last. Two sums over cohorts that differ in one hospital differ by
its input: an update that was masked once must never be masked again, not even after a
failure. Python cannot promise that wiped memory is overwritten.

**Sources.** Bonawitz et al., CCS 2017; Bell et al., CCS 2020. No Flower, no clock, no global
random state, nothing that unpickles. A hospital runs :class:`HospitalRound`, the server
:class:`ServerRound`; both are bytes in, bytes out.
"""

from common.secagg.binding import RoundBinding, RoundTerms
from common.secagg.encoding import Encoded, decode, encode
from common.secagg.errors import Refusal
from common.secagg.hospital import HospitalRound
from common.secagg.keys import Identity
from common.secagg.layout import WEIGHT, Segment, SegmentPlan, VectorLayout, update_layout
from common.secagg.outcome import Dropout, RoundOutcome
from common.secagg.params import SecAggParams, SecAggPolicy, check_cohort
from common.secagg.roster import Roster, RosterEntry
from common.secagg.server import ServerRound

__all__ = [
    "WEIGHT",
    "Dropout",
    "Encoded",
    "HospitalRound",
    "Identity",
    "Refusal",
    "Roster",
    "RosterEntry",
    "RoundBinding",
    "RoundOutcome",
    "RoundTerms",
    "SecAggParams",
    "SecAggPolicy",
    "Segment",
    "SegmentPlan",
    "ServerRound",
    "VectorLayout",
    "check_cohort",
    "decode",
    "encode",
    "update_layout",
]
