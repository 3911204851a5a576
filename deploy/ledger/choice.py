"""Which privacy ledger is meant, and which policy holds for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from common.errors import ConfigError
from common.files import consilium_home

if TYPE_CHECKING:
    from common.privacy.limits import PrivacyLimits

LISTED = 20
"""At most so many names in an error."""

# readable=False: what cannot be read is told here, in two parts, and not as a wrong option.
HomeOption = Annotated[
    Path | None,
    typer.Option("--home", help="The hospital's directory, where its ledger lies.", readable=False),
]
HospitalOption = Annotated[
    str | None, typer.Option("--hospital", help="A simulated hospital, by its name.")
]
RunOption = Annotated[
    str | None,
    typer.Option(
        "--run", help="One run: its entries, and its ledger where each run has one (else: latest)."
    ),
]
PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        readable=False,
        help="The hospital's policy file; else policy.toml in its directory, "
        "or in $CONSILIUM_HOME; without one there is no limit.",
    ),
]


@dataclass(frozen=True)
class Place:
    """One ledger, and whose it is."""

    home: Path
    path: Path
    hospital: str = ""
    """A simulated hospital's name; empty for a ledger in a hospital's own directory."""
    others: tuple[str, ...] = ()
    """The same hospital's other ledgers, relative to its home."""


@dataclass(frozen=True)
class Policy:
    """A hospital's privacy limits, and the file that says so; both None: no policy, no limit."""

    path: Path | None
    limits: PrivacyLimits | None


def choose(home: Path | None, hospital: str | None, run: str | None) -> Place:
    """The ledger that the options mean; ConfigError, saying what there is, if that is not one.

    ``home``; else the simulated ``hospital``; else consilium's home; else the only ledger among
    the simulated hospitals. Where each run has a ledger: ``run``'s, or the latest.
    """
    with readable():
        if home is not None:
            if not home.is_dir():
                raise ConfigError(
                    f"there is no directory {home}", "give --home the hospital's own directory"
                )
            return _place(home, "", run)
        simulated = consilium_home() / "simulation"
        homes = {path.name: _ledgers(path) for path in sorted(simulated.glob("*"))}
        found = {name: ledgers for name, ledgers in homes.items() if ledgers}
        if hospital is not None:
            if hospital not in found:
                raise ConfigError(
                    f"there is no simulated hospital '{hospital}' with a ledger in {simulated}",
                    f"give --hospital one of: {listed(found) or '(there is none)'}",
                )
            return _place(simulated / hospital, hospital, run)
        own = _ledgers(consilium_home())
        if "" in own:
            return _place(consilium_home(), "", run)
        fit = {
            name: [of for of in ledgers if run is None or of in ("", run)]
            for name, ledgers in found.items()
        }
        fit = {name: ledgers for name, ledgers in fit.items() if ledgers}
        if len(fit) == 1:
            ((name, ledgers),) = fit.items()
            if run is not None or len(ledgers) == 1:
                return _place(simulated / name, name, run)
        if own:
            found[f"{consilium_home()} (--home)"] = own
        raise _undecided(found, run)


def _ledgers(home: Path) -> dict[str, Path]:
    """Run → its own ledger; under the empty name, the one for all runs."""
    from common.simulation import LEDGER

    paths = {path.name: path / LEDGER for path in sorted((home / "runs").glob("*"))}
    # A ledger that is gone has left its head behind: that must be told, not passed over.
    return {
        run: path
        for run, path in ({"": home / LEDGER} | paths).items()
        if path.exists() or path.with_suffix(".head").exists()
    }


def _place(home: Path, hospital: str, run: str | None) -> Place:
    found = _ledgers(home)
    if not found:
        raise ConfigError(
            f"there is no privacy ledger in {home}",
            "check the directory; a ledger is made when a hospital first trains with privacy",
        )
    if run is not None and run in found:
        path = found[run]
    elif "" in found:
        path = found[""]
    elif run is None:
        path = max(found.values(), key=lambda p: p.stat().st_mtime_ns if p.exists() else 0)
    else:
        raise ConfigError(
            f"{home} has no ledger of run {run}", f"it has ledgers of the runs {listed(found)}"
        )
    others = tuple(str(p.relative_to(home)) for p in found.values() if p != path)
    return Place(home, path, hospital, others)


def _undecided(found: dict[str, dict[str, Path]], run: str | None) -> ConfigError:
    if not found:
        return ConfigError(
            f"there is no privacy ledger in {consilium_home()} or in its simulation/",
            "give --home the hospital's own directory, or set CONSILIUM_HOME; a ledger is made "
            "when a hospital first trains with privacy",
        )
    lines = [f"  {name}: {listed(ledgers)}" for name, ledgers in found.items()]
    of = "" if run is None else f" of run {run}"
    return ConfigError(
        "\n".join([f"it is not clear which privacy ledger{of} is meant:", *lines]),
        "choose with --hospital NAME (and --run RUN), or with --home DIRECTORY",
    )


def policy_for(place: Place, path: Path | None) -> Policy:
    """The policy at ``path``; else the one in the hospital's directory, or in consilium's home.

    ConfigError for one that is wrong, or that was named and is not there.
    """
    from client_app.policy import HospitalPolicy

    if path is None:
        usual = [place.home / "policy.toml", consilium_home() / "policy.toml"]
        with readable():
            path = next((p for p in usual if p.exists()), None)
    return Policy(path, None if path is None else HospitalPolicy.load(path).privacy)


@contextmanager
def readable() -> Iterator[None]:
    """What the operating system does not let one read becomes a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename} cannot be read: {error.strerror}",
            "run this as the user that the hospital's node runs as",
        ) from None


def listed(names: Iterable[str]) -> str:
    """``names`` in one line, the first of them if they are many."""
    every = [name or "one for all runs" for name in names]
    more = [f"and {len(every) - LISTED} more"] if len(every) > LISTED else []
    return ", ".join(every[:LISTED] + more)
