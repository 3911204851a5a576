"""``consilium federation`` and ``consilium hospital``: thin readings of their arguments.

The apps are here, and are joined by the commands of other modules. What the commands of enrolment
do is in :mod:`deploy.provision`, which is imported when one of them runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ConfigError

if TYPE_CHECKING:
    from client_app.hospital_file import HospitalFolder
    from deploy.provision.federation import FederationFolder

WIDTH = 100
"""Columns of a table where no terminal says how many it has."""

federation = typer.Typer(
    no_args_is_help=True, help="For the coordinator: make a federation, admit and revoke hospitals."
)
hospital = typer.Typer(
    no_args_is_help=True, help="For a hospital: make its keys, ask to be admitted, join."
)

# readable=False: what cannot be read is told in two parts, and not as a wrong option.
FederationDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="The coordinator's folder.", readable=False)
]
HospitalDir = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="The hospital's folder.", readable=False, envvar="CONSILIUM_HOSPITAL"
    ),
]
Hosts = Annotated[
    list[str],
    typer.Option("--host", help="A further DNS name or IP address of the server; repeatable."),
]
Fingerprint = Annotated[
    str | None,
    typer.Option(help="As told by telephone; without it you are asked to compare."),
]
MaxImages = Annotated[
    int | None,
    typer.Option(
        help="Most images that the hospital may claim to have trained on: a hospital proposes, "
        "the coordinator's admission decides.",
        min=1,
        max=1_000_000_000,
    ),
]
CertificateDays = Annotated[
    int, typer.Option(help="Days that the server's certificate is valid.", min=1, max=3650)
]


@federation.command("init")
def federation_init(
    dir: FederationDir,
    name: Annotated[str, typer.Option(help="The federation's name.")],
    address: Annotated[str, typer.Option(help="HOST:PORT where hospitals reach the server.")],
    classes: Annotated[str, typer.Option(help="The classes, in order, with commas between.")],
    host: Hosts = [],  # noqa: B006 (typer's way to say: none given)
    image_size: Annotated[int, typer.Option(help="Side of an image in pixels.")] = 28,
    channels: Annotated[int, typer.Option(help="1: grey, 3: colour.")] = 3,
    days: CertificateDays = 825,
) -> None:
    """Make a federation: its keys, certificates and an empty roster."""
    from deploy.provision.federation import init, make_settings

    settings = make_settings(
        name=name,
        address=address,
        hosts=host,
        classes=[part.strip() for part in classes.split(",")],
        image_size=image_size,
        channels=channels,
    )
    folder = _federation(dir)
    with on_disk():
        made = init(folder, settings, right_now(), days)
    typer.echo(
        f"the federation {settings.name} {'is made' if made else 'was there already'}: {dir}"
    )
    _tell_coordinator(folder)


@federation.command("renew")
def federation_renew(dir: FederationDir, days: CertificateDays = 825) -> None:
    """Make a new server certificate under the same authority, for the names in federation.toml."""
    from deploy.provision.certificates import hosts_of, load_certificate
    from deploy.provision.federation import renew

    folder = _federation(dir)
    with on_disk():
        renew(folder, right_now(), days)
    certificate = load_certificate(folder.server)
    ends = certificate.not_valid_after_utc.date()
    typer.echo(f"{folder.server} is for {', '.join(hosts_of(certificate))}, until {ends}")
    typer.echo("a running server takes it within seconds; hospitals need nothing new")


@federation.command("admit")
def federation_admit(
    dir: FederationDir,
    request: Annotated[
        Path, typer.Argument(help="The request.json that the hospital sent.", readable=False)
    ],
    fingerprint: Fingerprint = None,
    days: Annotated[
        int, typer.Option(help="Days that the admission is valid.", min=0, max=3650)
    ] = 365,
    begins: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="YYYY-MM-DD",
            help="First day on which it may be in a sum: leaves the others time to accept it. "
            "Default: today.",
        ),
    ] = None,
    max_images: MaxImages = None,
) -> None:
    """Admit a hospital by its request, or extend its admission, and write the kits."""
    from common.federation_file import read_limited
    from deploy.provision.members import admit, check_admissible
    from deploy.provision.requests import Request

    folder = _federation(dir)
    asked = Request.parse(read_limited(request))
    before = check_admissible(folder, asked)
    typer.echo(f"request of {asked.name}, made {asked.time}")
    if before is not None:
        typer.echo(f"{asked.name} is admitted already, until {before.expires}")
    known = asked.max_images if before is None else before.max_images
    if known is not None:
        typer.echo(f"it {'proposes' if before is None else 'may claim'} up to {known} images")
    _confirm("the hospital, by telephone", "request", asked.fingerprint, fingerprint)
    with on_disk():
        changed = admit(folder, asked, right_now(), days, begins=begins, max_images=max_images)
    typer.echo(f"{asked.name} is admitted: send it {folder.kits / asked.name}")
    typer.echo("a server that runs lets its node connect within seconds")
    others = [name for name in changed if name != asked.name]
    _tell_kits(folder, others)
    if before is None and others:
        typer.echo(
            "each of them must accept it (consilium hospital members) before it takes part in a "
            "round with it: ask them to"
        )


@federation.command("revoke")
def federation_revoke(
    dir: FederationDir,
    name: Annotated[str, typer.Argument(help="The hospital.")],
    reason: Annotated[str, typer.Option(help="Kept in revoked.json, not sent to anybody.")] = "",
) -> None:
    """Take a hospital out of the roster; its keys are never admitted again."""
    from deploy.provision.members import revoke

    folder = _federation(dir)
    with on_disk():
        changed = revoke(folder, name, right_now(), reason)
    typer.echo(f"{name} is revoked: a server that runs cuts its node off within seconds")
    _tell_kits(folder, changed)


@federation.command("refresh")
def federation_refresh(
    dir: FederationDir,
    reissue: Annotated[
        bool,
        typer.Option(
            "--reissue",
            help="Sign them again with today's date though nothing has changed: for hospitals "
            "whose policy has roster-max-age-days.",
        ),
    ] = False,
) -> None:
    """Make roster and kits anew from who is admitted and from federation.toml."""
    from deploy.provision.files import locked
    from deploy.provision.kit import refresh

    folder = _federation(dir)
    folder.load()
    with on_disk(), locked(folder.root):
        changed = refresh(folder, right_now(), reissue=reissue)
    if not changed:
        typer.echo("all kits were up to date")
    _tell_kits(folder, changed)


@federation.command("status")
def federation_status(
    dir: FederationDir,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Who is admitted until when, when certificates end, and what to see to."""
    from deploy.provision.status import describe, render

    with on_disk():
        document = describe(_federation(dir), right_now())
    if as_json:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        render(document, width=None if sys.stdout.isatty() else WIDTH)


@federation.command("demo")
def federation_demo(
    dir: FederationDir,
    hospitals: Annotated[int, typer.Option(help="How many.", min=1, max=100)],
    data: Annotated[
        Path | None,
        typer.Option(help="A .npz file in MedMNIST's form; else synthetic cells.", readable=False),
    ] = None,
    images: Annotated[int, typer.Option(help="Synthetic images in all.", min=96)] = 6000,
    image_size: Annotated[int, typer.Option(help="Of synthetic images.", min=16, max=512)] = 28,
    name: Annotated[str, typer.Option(help="The federation's name.")] = "demo",
    address: Annotated[str, typer.Option(help="HOST:PORT of the server.")] = "localhost:9092",
    host: Hosts = [],  # noqa: B006 (typer's way to say: none given)
) -> None:
    """Make a federation with hospitals and pictures in one folder, joined, to try out."""
    from deploy.provision.demo import Demo, fingerprint, make

    asked = Demo(
        hospitals=hospitals,
        name=name,
        address=address,
        hosts=host or ["localhost", "127.0.0.1"],
        data=data,
        images=images,
        image_size=image_size,
    )
    with on_disk():
        folders = make(dir, asked, right_now())
    typer.echo(f"coordinator: {dir / 'coordinator'} (key: {fingerprint(dir)})")
    for folder in folders:
        count = sum(1 for _ in (folder / "data").rglob("*.png"))
        typer.echo(f"{folder.name}: {folder}, joined, {count} pictures")
    typer.echo("all keys lie on this machine: for trying out only, with nobody's real data")


@hospital.command("init")
def hospital_init(
    dir: HospitalDir,
    name: Annotated[str, typer.Option(help="The hospital's name, such as st-mary.")],
    max_images: MaxImages = None,
) -> None:
    """Make this hospital's own keys and the request to send to the coordinator."""
    from deploy.provision.hospital import init

    folder = _hospital(dir)
    with on_disk():
        request = init(folder, name, right_now(), max_images=max_images)
    typer.echo(f"send {folder.request} to the coordinator; nothing in it is secret")
    typer.echo("and read out on the telephone, when the coordinator asks for it:")
    typer.echo(f"fingerprint of the request: {request.fingerprint}")
    typer.echo(f"never send anything from {folder.private}")


@hospital.command("join")
def hospital_join(
    dir: HospitalDir,
    kit: Annotated[
        Path, typer.Argument(help="The folder that the coordinator sent.", readable=False)
    ],
    fingerprint: Fingerprint = None,
) -> None:
    """Install the coordinator's kit, once its key is confirmed by its fingerprint.

    The first kit's hospitals are accepted with it; later ones by `consilium hospital members`.
    """
    from client_app.hospital_file import HospitalFile
    from client_app.members import Members
    from deploy.provision.hospital import join, pinned
    from deploy.provision.keys import load_identity
    from deploy.provision.kit import Kit, entry_of
    from deploy.provision.member_commands import show

    folder, now = _hospital(dir), right_now()
    # All that can be checked without asking is checked before anybody is asked.
    name = HospitalFile.load(folder.file).name
    identity = load_identity(folder.identity_key)
    received = Kit.read(kit)
    known = pinned(folder)
    told, roster = received.verify(known or received.coordinator, now)
    entry_of(roster, name, identity.public, now)
    typer.echo(f"kit of the federation {told.description.name}, issued {told.issued}")
    if known is None:
        typer.echo("joining accepts the hospitals on its roster into sums with this one:")
        show(Members().standings(roster, identity.public))
    if known is None or fingerprint is not None:
        _confirm("the coordinator, by telephone", "coordinator's key", received.fingerprint,
                 fingerprint)  # fmt: skip
    with on_disk():
        joined = join(folder, received, received.coordinator, now)
    typer.echo(f"{name} has joined, admitted until {joined.entry.expires}")
    others = [entry.name for entry in joined.roster.entries if entry.name != name]
    typer.echo(f"with it on the roster: {', '.join(others) or 'nobody yet'}")
    if joined.waiting:
        typer.echo(
            f"! {', '.join(one.name for one in joined.waiting)} must be accepted before a sum is "
            f"shared with them: consilium hospital members {folder.root}"
        )
    if joined.before and joined.before.description != told.description:
        typer.echo(f"! the federation's description has changed: see {folder.federation}")
    typer.echo(f"next: say in {folder.file} where the pictures are, and read {folder.policy}")


def _federation(dir: Path) -> FederationFolder:
    from deploy.provision.federation import FederationFolder

    return FederationFolder(dir)


def _hospital(dir: Path) -> HospitalFolder:
    from client_app.hospital_file import HospitalFolder

    return HospitalFolder(dir)


def right_now() -> datetime:
    """This moment (UTC), in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)


@contextmanager
def on_disk() -> Iterator[None]:
    """What the file system refuses, in two parts."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or 'a file'}: {error.strerror or error}",
            "check the folder's owner and permissions and the space on the disk, then repeat the "
            "command: it completes what was begun",
        ) from None


def _confirm(whom: str, what: str, actual: str, told: str | None) -> None:
    """Go on only if ``actual`` is what ``whom`` told: by option, or by asking now."""
    from common.federation_file import EnrolmentError
    from deploy.provision.keys import same_fingerprint

    typer.echo(f"fingerprint of the {what}: {actual}")
    if told is None:
        try:
            told = typer.prompt(f"Compare it with {whom}. The same? (yes, or type what you hear)")
        except typer.Abort:
            raise ConfigError(
                f"nobody confirmed the fingerprint of the {what}; nothing was changed",
                f"ask {whom}, and repeat the command with --fingerprint",
            ) from None
        if told.strip().lower() == "yes":
            return
    if not same_fingerprint(told, actual):
        raise EnrolmentError(
            f"the fingerprint of the {what} is not the one that was told; nothing was changed",
            f"ask {whom} again; if it still differs, somebody changed it on its way: use another "
            "way",
        )


def _tell_coordinator(folder: FederationFolder) -> None:
    from deploy.provision.keys import coordinator_fingerprint

    key = folder.public_key()
    typer.echo(f"coordinator's key: {folder.coordinator.read_text().strip()}")
    typer.echo(f"its fingerprint:   {coordinator_fingerprint(key)}")
    typer.echo("tell hospitals the fingerprint by telephone or in person, not with the kit")
    typer.echo(f"keep a backup of {folder.private}, locked away: nothing can stand in for it")


def _tell_kits(folder: FederationFolder, changed: list[str]) -> None:
    if changed:
        typer.echo(f"the roster has changed: send the new kits to {', '.join(changed)} as well")
        typer.echo(f"(in {folder.kits}; a node that is connected fetches its own within minutes)")
