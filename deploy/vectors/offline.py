"""A hospital by itself: fine-tune with no server in reach, look at the outbox, take back."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context, RecordDict

from client_app.finetune import fine_tune
from client_app.hospital import Hospital
from client_app.hospital_file import HospitalFile, HospitalFolder
from client_app.identity import identity_of
from client_app.outbox import Item, Outbox, outbox_of
from common.config import RunConfig
from common.errors import ConfigError
from common.messages import Offer
from server_app.vectors.base import read_base


def fine_tune_offline(folder: HospitalFolder, base: Path) -> tuple[Item, bool]:
    """The vector for a run's base that lies in a file, and whether it was trained now.

    The hospital's policy and ledger hold as they do online, and it is charged as there: once.
    ConfigError for a base that belongs to no run, or whose vector was taken back.
    """
    found, note = read_base(base)
    if not note.run or not note.config:
        raise ConfigError(
            f"{base} says of no run how it is to be fine-tuned",
            "get base.safetensors and base.json of the run from the coordinator",
        )
    config = RunConfig.parse(note.config)
    context = _context(folder, note.config)
    hospital = Hospital.from_context(context)
    hospital.policy.vectors.check_send(private=config.privacy != "none")
    offer = Offer(
        run=note.run, version=found.version, base=found.id, model_digest=found.model_digest,
        weights=found.weights,
    )  # fmt: skip
    outbox = outbox_of(hospital, note.run)
    with outbox.alone(offer.base):
        if outbox.withdrawn(offer):
            raise ConfigError(
                "the vector for this base was taken back", "wait for the run's next base"
            )
        here = [i for i in outbox.items() if i.base == offer.base]
        if here and (here[-1].private or config.privacy == "none"):
            return here[-1], False
        return fine_tune(offer, hospital, context), True


def outbox(folder: HospitalFolder) -> Outbox:
    """A real hospital's outbox."""
    return Outbox(folder.root / "outbox")


def withdraw(folder: HospitalFolder, serial: str) -> Item:
    """Take a vector back; a server that has it is told at the next exchange."""
    identity = identity_of(_context(folder, {}))
    return outbox(folder).withdraw(serial, HospitalFile.load(folder.file).name, identity)


def _context(folder: HospitalFolder, config: object) -> Context:
    values = dict(config) if isinstance(config, dict) else {}
    return Context(run_id=0, node_id=0, node_config={"hospital": str(folder.root)},
                   state=RecordDict(), run_config=values)  # fmt: skip
