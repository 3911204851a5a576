"""One round's aggregation over secure aggregation: the server learns sums, and nothing else.

Hospitals train first; their answer carries this round's public keys. The stages that follow
(share, masked input, consistency, unmask) are short and have short deadlines. A hospital that
is late has dropped; the round goes on while the threshold holds, else it fails closed.
The protocol itself is :mod:`common.secagg`; here its messages travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from common.aggregation import (
    GRADIENT,
    TRAIN,
    VALIDATE,
    flat_length,
    layout_for,
    params_for,
    terms_for,
    unflatten,
)
from common.config import RunConfig
from common.errors import RoundError
from common.messages import Envelope, Job
from common.model import weights_digest
from common.secagg import RoundBinding, ServerRound, decode
from common.secagg.masks import RingArray
from server_app.exchange import Absence, ask, tell
from server_app.fixed import FixedParts
from server_app.rounds import Outcome
from server_app.server_step import ServerStep


@dataclass
class _Talk:
    """Who is where, and how long each stage took."""

    grid: Grid
    nodes: Mapping[str, int]
    server: ServerRound
    seconds: dict[str, float] = field(default_factory=dict)

    def stage(
        self,
        stage: str,
        content: Callable[[str], RecordDict],
        collect: Callable[[str, bytes], bool],
        *,
        message_type: str,
        timeout: float,
        instead: Callable[[str, str], RecordDict | None] | None = None,
    ) -> None:
        """Ask everybody whom the protocol awaits; who does not answer has dropped."""
        started = time.monotonic()

        def take(name: str, record: RecordDict) -> None:
            collect(name, Envelope.from_record(record).payload)

        answers = ask(
            self.grid,
            {name: (self.nodes[name], content(name)) for name in self.server.pending},
            message_type=message_type,
            stage=stage,
            timeout=timeout,
            on_answer=take,
            instead=instead,
        )
        for absence in answers.absent:
            self.server.drop(absence.hospital, absence.reason)
        self.seconds[stage] = round(time.monotonic() - started, 3)


@dataclass
class SecureSum:
    """What one exchange brought: sums by segment, or why there are none; who was there."""

    values: Mapping[str, np.ndarray]
    """Segment → sums; empty if the exchange failed closed."""
    failure: str | None
    contributed: list[str]
    absent: list[Absence]
    seconds: dict[str, float]
    survivors: list[str]
    """Whose signatures under this very list were asked for; empty if it did not come to that."""


@dataclass(frozen=True)
class Question:
    """What hospitals are asked first; the answer carries their keys.

    ``task``: by hospital's name; ``kind``: its message type; ``stage``: its name in records;
    ``timeout``: seconds that it has; ``stage_timeout``: seconds of the stage which begins now.
    """

    task: Callable[[str], RecordDict]
    kind: str
    stage: str
    timeout: float
    stage_timeout: Callable[[], float]
    on_survivors: Callable[[list[str]], None] = lambda names: None
    """Told whose vectors are in the sum, before anybody signs for it."""
    instead: Callable[[str, str], RecordDict | None] | None = None
    """Another task for whoever refused the first, by its refusal's code (:func:`exchange.ask`)."""


def secure_sum(
    grid: Grid,
    cohort: Mapping[str, int],
    binding: RoundBinding,
    question: Question,
    *,
    roster: Mapping[str, bytes] | None = None,
) -> SecureSum:
    """Ask ``cohort`` (name → node) ``question`` and learn the sums that ``binding`` lays out.

    Whatever goes wrong, nothing of a single hospital is opened, and hospitals that dropped are told
    to forget the round. ConfigError if the settings can work for no cohort.
    """
    server = ServerRound(binding, cohort, roster=roster)
    talk = _Talk(grid, cohort, server)
    failure = None
    values: Mapping[str, np.ndarray] = {}
    survivors: list[str] = []

    def agreed(names: list[str]) -> None:
        survivors.extend(names)
        question.on_survivors(names)

    try:
        values = decode(binding.layout, binding.params, _exchange(talk, question, agreed))
    except RoundError as error:
        failure = error.what
    outcome = server.outcome
    # Who dropped, or was cut off by a failure, still holds this round's secrets.
    left = set(cohort) if failure is not None else set(outcome.dropped)
    stragglers = {name: cohort[name] for name in sorted(left)}
    tell(grid, stragglers, message_type="query.close", content=RecordDict())
    absent = [
        Absence(name, question.stage if d.stage == "advertise" else d.stage, d.reason)
        for name, d in sorted(outcome.dropped.items())
    ]
    absent += [Absence(n, "unmask", what) for n, what in sorted(outcome.misbehaved.items())]
    contributed = sorted(outcome.contributed) if failure is None else []
    return SecureSum(values, failure, contributed, absent, talk.seconds, survivors)


def secure_round(
    grid: Grid,
    cohort: Mapping[str, int],
    job: Job,
    config: RunConfig,
    *,
    train: bool,
    roster: Mapping[str, bytes] | None = None,
    step: ServerStep | None = None,
    parts: FixedParts | None = None,
    least: int = 0,
) -> Outcome:
    """Let ``cohort`` (name → node) train (or only validate) ``job``'s model; learn the sums.

    With ``step`` hospitals do not train but send the sums of one step. ``parts``: who holds the
    model's fixed entries already. ``least``: contributors below which no sum is opened: hospitals
    sign for one set of survivors of a model, which must not be wasted on a round that is not used.

    The outcome has no mean update, and says why, when too few took part: the round failed
    closed, nothing was opened. ConfigError if the settings can work for no cohort.
    """
    purpose = TRAIN if train else VALIDATE
    shares = None if step is None else step.shares(job.round)
    length = flat_length(job.weights) if shares is None else shares.dimension
    rate = 0.0 if step is None else step.rate(job.round)
    binding = RoundBinding(
        run=job.run,
        round=job.round,
        purpose=purpose,
        # Fewer may be there than the run needs: then the round fails closed, not the run.
        params=params_for(config, max(len(cohort), config.num_shares, config.min_cohort)),
        layout=layout_for(purpose, length, config, grid=0.0 if shares is None else shares.step),
        model_hash=bytes.fromhex(weights_digest(job.model)),
        terms=terms_for(config, shares, sampling_rate=rate),
    )
    invited = replace(job, invitation=binding.to_bytes())
    parts = parts or FixedParts()
    messages = parts.messages(invited, cohort)

    def enough(survivors: list[str]) -> None:
        if len(survivors) < least:
            raise RoundError(
                f"{len(survivors)} of {len(cohort)} hospitals were left, and {least} are needed",
                "wait for the others, or lower the quorum",
            )

    question = Question(
        messages.__getitem__,
        kind="train" if train else "evaluate",
        stage="train" if train else "validate",
        timeout=config.round_timeout,
        stage_timeout=lambda: config.stage_timeout,
        on_survivors=enough,
        instead=parts.again(invited),
    )
    found = secure_sum(grid, cohort, binding, question, roster=roster)
    parts.answered(cohort, [a.hospital for a in found.absent if a.stage == question.stage])
    mean, total = None, None
    sums = {n: float(v[0]) for n, v in found.values.items() if n not in ("update", GRADIENT)}
    if train and found.failure is None:
        # What a hospital that lies adds may be anything, below nothing too.
        sums["examples"] = sums.pop("weight")
        examples = max(sums["examples"], 1.0)
        if step is None:
            mean = unflatten(found.values["update"] / examples, job.weights)
        else:
            opened = found.values[GRADIENT]
            believed = min(examples, float(config.max_examples * len(found.contributed)))
            total = step.summed(job.round, opened, believed, len(found.contributed))
    return Outcome(
        expected=sorted(cohort),
        contributed=found.contributed,
        absent=found.absent,
        mean_update=mean,
        total=total,
        sums=sums,
        failure=found.failure,
        seconds=found.seconds,
    )


def _exchange(talk: _Talk, question: Question, agreed: Callable[[list[str]], None]) -> RingArray:
    """All stages in their order; returns the sum as ring elements. RoundError fails closed."""
    server = talk.server
    talk.stage(
        question.stage,
        question.task,
        server.collect_advertisement,
        message_type=question.kind,
        timeout=question.timeout,
        instead=question.instead,
    )
    everyone = Envelope(server.close_advertise()).to_record()
    talk.stage(
        "share", lambda name: everyone, server.collect_shares,
        message_type="query.share", timeout=question.stage_timeout(),
    )  # fmt: skip
    relays = server.close_shares()
    talk.stage(
        "masked", lambda name: Envelope(relays[name]).to_record(), server.collect_masked,
        message_type="query.masked", timeout=question.stage_timeout(),
    )  # fmt: skip
    survivors = Envelope(server.close_masked()).to_record()
    agreed(sorted(set(talk.nodes) - set(server.outcome.dropped)))
    talk.stage(
        "consistency", lambda name: survivors, server.collect_consistency,
        message_type="query.consistency", timeout=question.stage_timeout(),
    )  # fmt: skip
    signatures = Envelope(server.close_consistency()).to_record()
    talk.stage(
        "unmask", lambda name: signatures, server.collect_unmask,
        message_type="query.unmask", timeout=question.stage_timeout(),
    )  # fmt: skip
    return server.finish()
