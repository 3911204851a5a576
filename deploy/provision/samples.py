"""The files that a hospital starts from: commented, complete, and its own to edit."""

from __future__ import annotations

import json

_POLICY = {
    "secagg": 'or "optional": then a server may ask for the update in the clear',
    "min-cohort": "fewest hospitals whose sum may be revealed",
    "min-threshold": "smallest reconstruction threshold",
    "require-roster": "refuse rounds whose hospitals are not on a signed roster",
    "accept-members": 'who joins later: must be accepted by `hospital members`; or "auto"',
    "min-trusted": "fewest accepted hospitals in a sum, this one included; 0: as min-cohort",
    "roster-max-age-days": "refuse rounds under a roster signed longer ago; 0: of any age",
    "total-epsilon": "what any image may ever cost, over all runs (inf: no limit)",
    "total-delta": "the δ at which that holds",
    "run-epsilon": "of one run",
    "min-noise-multiplier": "smallest noise of a training step, in clipping norms",
    "min-clipping-norm": "smallest clipping norm of a run",
    "allow-non-private": "whether privacy=none is allowed at all",
    "shared-noise": "whether ε may hold for the hospitals' sum alone (privacy=distributed)",
    "unit": 'or "patient": what ε is promised for',
    "metrics": 'validation figures; or "withheld", or "exact" (outside ε)',
    "hold-days": "for which an unfinished run keeps the rest of its budget",
    "send": 'single task vectors, which the server sees: or "private" (with ε), or "any"',
    "retrain": "train again when the server no longer takes a vector's base",
    "evaluate": "judge candidates on validation images: two counts, told in a sum only",
}
"""What each entry of a policy means. The values are those of :mod:`client_app.policy`."""


def policy_toml() -> str:
    """A policy with every entry at its default: what it is without the file, said aloud."""
    from client_app.policy import Aggregation, Privacy, Vectors

    lines = [
        "# The limits of this hospital. No server can lift them. An entry that is left out has the",
        "# value below; one that is unknown is an error, and then nothing is trained.",
        "version = 1",
    ]
    for table in (Aggregation(), Privacy(), Vectors()):
        lines += ["", f"[{type(table).__name__.lower()}]"]
        for entry, value in table.model_dump(by_alias=True).items():
            comment = f"  # {_POLICY[entry]}" if entry in _POLICY else ""
            lines.append(f"{entry} = {_toml(value)}{comment}")
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    # repr writes a float so that TOML reads the same one: 8.0, 0.0002, inf.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def hospital_toml(name: str, data: str) -> str:
    """A ``hospital.toml`` for pictures in the folder ``data``; ConfigError for a bad name."""
    from client_app.hospital_file import check_document

    text = f"""\
# This hospital's node. What is not here comes from the coordinator's kit.
version = 1
name = {_toml(name)}  # as in the request; not to be changed once that was sent

[data]
# The pictures: one folder for each class, or any folders with a manifest.csv that has the columns
# file, label and patient. Relative to this file, or absolute. The pictures never leave it.
folder = {_toml(data)}
manifest = ""  # a manifest that lies elsewhere; "": manifest.csv in the folder, if there is one
crop = 0  # side in pixels of the centre that is cut out of each picture (0: the whole square)

[classes]
# Names of your own folders or labels, where they differ from the federation's:
# "segmented neutrophils" = "neutrophil"

[server]
address = ""  # HOST:PORT where your network has another way to the server; "": as in the kit
"""
    check_document(text, "hospital.toml")
    return text
