"""What the textbooks say of the eight kinds of cell, as ranges to draw from.

Written from the literature on Romanowsky-stained (Wright, May-Grünwald-Giemsa) films of
peripheral blood and from general knowledge: B. J. Bain, "Blood Cells: A Practical Guide"
(chapters 2 and 3); A. V. Hoffbrand and P. A. H. Moss, "Essential Haematology"; the ICSH
recommendations on the grading of cell morphology (Palmer et al. 2015). **No real image was looked
at, plotted or measured to write this file.** Lengths are micrometres on the film, where cells lie
flat; stains are concentrations in the units of :mod:`common.prior.stains`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

KINDS: tuple[str, ...] = (
    "basophil",
    "eosinophil",
    "erythroblast",
    "immature granulocyte",
    "lymphocyte",
    "monocyte",
    "neutrophil",
    "platelet",
)

# Forms of nucleus. The weights below are in this order.
FORMS: tuple[str, ...] = ("none", "round", "kidney", "band", "two lobes", "more lobes", "folded")

Range = tuple[float, float]


@dataclass(frozen=True)
class Stage:
    """One stage or variant of a kind; every range is (low, high), drawn from uniformly."""

    name: str
    kind: int
    share: float
    forms: tuple[float, float, float, float, float, float, float]
    diameter: Range  # micrometres
    filling: Range  # nucleus area / cell area
    eccentricity: Range  # 0: nucleus in the middle, 1: touching the membrane
    elongation: Range  # long axis / short axis of the nucleus
    ruggedness: Range  # of the cell's outline, fraction of its radius
    clumping: Range  # contrast of the chromatin
    coarseness: Range  # 0: fine and lacy, 1: coarse blocks
    nucleus_purple: Range
    nucleus_blue: Range
    nucleoli: Range  # strength
    cytoplasm_eosin: Range
    cytoplasm_blue: Range
    cytoplasm_haemoglobin: Range
    mottling: Range  # unevenness of the cytoplasm
    halo: Range  # pale zone beside the nucleus
    granule_density: Range  # per square micrometre
    granule_radius: Range  # micrometres
    granule_purple: Range
    granule_orange: Range
    granule_cover: Range  # how far granules show over the nucleus
    vacuoles: Range  # per square micrometre


RANGE_FIELDS: tuple[str, ...] = tuple(f.name for f in fields(Stage))[4:]


def _stage(name: str, kind: int, share: float, forms: tuple[float, ...], **given: Range) -> Stage:
    """Fill in what a stage leaves out with the values of an unremarkable cell."""
    usual: dict[str, Range] = {
        "eccentricity": (0.0, 0.5),
        "elongation": (1.0, 1.25),
        "ruggedness": (0.01, 0.05),
        "clumping": (0.15, 0.4),
        "coarseness": (0.3, 0.8),
        "nucleus_purple": (0.8, 1.25),
        "nucleus_blue": (0.0, 0.3),
        "nucleoli": (0.0, 0.05),
        "cytoplasm_eosin": (0.05, 0.2),
        "cytoplasm_blue": (0.03, 0.15),
        "cytoplasm_haemoglobin": (0.0, 0.02),
        "mottling": (0.1, 0.4),
        "halo": (0.0, 0.2),
        "granule_density": (0.0, 0.05),
        "granule_radius": (0.15, 0.3),
        "granule_purple": (0.1, 0.4),
        "granule_orange": (0.0, 0.05),
        "granule_cover": (0.0, 0.2),
        "vacuoles": (0.0, 0.01),
    }
    if len(forms) != len(FORMS):
        raise ValueError(f"{name}: {len(forms)} weights for {len(FORMS)} forms of nucleus")
    return Stage(name=name, kind=kind, share=share, forms=forms, **(usual | given))  # type: ignore[arg-type]


STAGES: tuple[Stage, ...] = (
    _stage(
        "basophil", 0, 1.0, (0, 0.15, 0.15, 0.1, 0.35, 0.15, 0.1),
        diameter=(10, 14.5), filling=(0.35, 0.6), clumping=(0.1, 0.3),
        nucleus_purple=(0.55, 1.1), cytoplasm_eosin=(0.05, 0.25), cytoplasm_blue=(0.03, 0.25),
        mottling=(0.2, 0.6), granule_density=(0.3, 1.4), granule_radius=(0.3, 0.7),
        granule_purple=(0.6, 1.6), granule_cover=(0.4, 1.0), vacuoles=(0, 0.05),
    ),
    _stage(
        "eosinophil", 1, 1.0, (0, 0.03, 0.1, 0.12, 0.55, 0.2, 0.0),
        diameter=(12, 17), filling=(0.2, 0.42), eccentricity=(0.1, 0.8), clumping=(0.2, 0.5),
        nucleus_purple=(0.7, 1.2), cytoplasm_eosin=(0.1, 0.3), cytoplasm_blue=(0.0, 0.1),
        mottling=(0.2, 0.6), granule_density=(1.0, 4.0), granule_radius=(0.3, 0.65),
        granule_purple=(0.0, 0.1), granule_orange=(0.25, 0.8), granule_cover=(0.0, 0.4),
    ),
    _stage(
        "basophilic erythroblast", 2, 0.25, (0, 1, 0, 0, 0, 0, 0),
        diameter=(10, 17), filling=(0.5, 0.8), elongation=(1.0, 1.12), clumping=(0.25, 0.55),
        coarseness=(0.4, 1.0), nucleus_purple=(0.9, 1.4), nucleus_blue=(0.1, 0.5),
        cytoplasm_eosin=(0.0, 0.08), cytoplasm_blue=(0.45, 0.95), halo=(0.0, 0.3),
    ),
    _stage(
        "polychromatic erythroblast", 2, 0.4, (0, 1, 0, 0, 0, 0, 0),
        diameter=(8, 13), filling=(0.3, 0.6), elongation=(1.0, 1.12), clumping=(0.3, 0.7),
        coarseness=(0.6, 1.0), nucleus_purple=(1.0, 1.6), nucleus_blue=(0.1, 0.6),
        cytoplasm_eosin=(0.0, 0.12), cytoplasm_blue=(0.12, 0.5), cytoplasm_haemoglobin=(0.1, 0.35),
    ),
    _stage(
        "orthochromatic erythroblast", 2, 0.35, (0, 0.92, 0, 0, 0.04, 0.04, 0),
        diameter=(7, 11), filling=(0.15, 0.4), eccentricity=(0.0, 0.9), elongation=(1.0, 1.15),
        clumping=(0.0, 0.3), coarseness=(0.5, 1.0), nucleus_purple=(1.1, 1.8),
        nucleus_blue=(0.1, 0.7), cytoplasm_eosin=(0.0, 0.15), cytoplasm_blue=(0.0, 0.2),
        cytoplasm_haemoglobin=(0.25, 0.55), mottling=(0.05, 0.2),
    ),
    _stage(
        "promyelocyte", 3, 0.3, (0, 0.85, 0.1, 0, 0, 0, 0.05),
        diameter=(14, 22), filling=(0.45, 0.75), eccentricity=(0.2, 0.9), clumping=(0.05, 0.25),
        coarseness=(0.0, 0.5), nucleus_purple=(0.5, 0.9), nucleoli=(0.0, 0.4),
        cytoplasm_blue=(0.2, 0.55), halo=(0.0, 0.6), granule_density=(0.2, 1.5),
        granule_radius=(0.15, 0.4), granule_purple=(0.2, 0.8), granule_cover=(0.1, 0.8),
    ),
    _stage(
        "myelocyte", 3, 0.4, (0, 0.8, 0.2, 0, 0, 0, 0),
        diameter=(12, 19), filling=(0.35, 0.6), eccentricity=(0.2, 0.95), elongation=(1.0, 1.4),
        clumping=(0.15, 0.35), nucleus_purple=(0.6, 1.0), cytoplasm_eosin=(0.08, 0.25),
        cytoplasm_blue=(0.08, 0.35), mottling=(0.2, 0.6), halo=(0.0, 0.5),
        granule_density=(0.2, 2.0), granule_radius=(0.12, 0.3), granule_purple=(0.08, 0.4),
        granule_orange=(0.0, 0.1), granule_cover=(0.0, 0.4),
    ),
    _stage(
        "metamyelocyte", 3, 0.3, (0, 0.05, 0.85, 0.1, 0, 0, 0),
        diameter=(12, 17), filling=(0.3, 0.5), eccentricity=(0.1, 0.8), elongation=(1.1, 1.6),
        clumping=(0.15, 0.4), nucleus_purple=(0.65, 1.05), cytoplasm_eosin=(0.1, 0.25),
        cytoplasm_blue=(0.05, 0.2), granule_density=(0.2, 2.0), granule_radius=(0.1, 0.25),
        granule_purple=(0.05, 0.3), granule_orange=(0.0, 0.1), granule_cover=(0.0, 0.3),
    ),
    _stage(
        "small lymphocyte", 4, 0.65, (0, 0.9, 0.1, 0, 0, 0, 0),
        diameter=(7, 11.5), filling=(0.65, 0.93), elongation=(1.0, 1.2), clumping=(0.15, 0.45),
        coarseness=(0.5, 1.0), nucleus_purple=(0.8, 1.35), nucleus_blue=(0.0, 0.4),
        cytoplasm_eosin=(0.0, 0.1), cytoplasm_blue=(0.15, 0.55),
    ),
    _stage(
        "large lymphocyte", 4, 0.35, (0, 0.75, 0.2, 0, 0, 0, 0.05),
        diameter=(11, 16), filling=(0.4, 0.75), eccentricity=(0.1, 0.9), clumping=(0.1, 0.35),
        coarseness=(0.3, 0.8), nucleus_purple=(0.7, 1.1), nucleoli=(0.0, 0.2),
        ruggedness=(0.02, 0.12), cytoplasm_eosin=(0.0, 0.08), cytoplasm_blue=(0.08, 0.4),
        granule_density=(0.0, 0.2), granule_radius=(0.2, 0.4), granule_purple=(0.3, 0.9),
    ),
    _stage(
        "monocyte", 5, 1.0, (0, 0.1, 0.35, 0.2, 0.03, 0.02, 0.3),
        diameter=(13, 21), filling=(0.35, 0.65), elongation=(1.1, 1.7), ruggedness=(0.02, 0.14),
        clumping=(0.08, 0.3), coarseness=(0.0, 0.5), nucleus_purple=(0.5, 0.95),
        nucleus_blue=(0.0, 0.2), cytoplasm_eosin=(0.03, 0.2), cytoplasm_blue=(0.12, 0.42),
        mottling=(0.2, 0.7), granule_density=(0.0, 1.0), granule_radius=(0.1, 0.2),
        granule_purple=(0.05, 0.3), vacuoles=(0.0, 0.12),
    ),
    _stage(
        "segmented neutrophil", 6, 0.7, (0, 0, 0, 0.05, 0.2, 0.75, 0),
        diameter=(11, 15.5), filling=(0.2, 0.42), clumping=(0.2, 0.5), coarseness=(0.5, 1.0),
        nucleus_purple=(0.75, 1.3), cytoplasm_eosin=(0.06, 0.25), cytoplasm_blue=(0.0, 0.12),
        granule_density=(0.5, 3.0), granule_radius=(0.1, 0.2), granule_purple=(0.03, 0.25),
        granule_orange=(0.0, 0.08), granule_cover=(0.0, 0.2), vacuoles=(0.0, 0.03),
    ),
    _stage(
        "band neutrophil", 6, 0.3, (0, 0, 0.1, 0.9, 0, 0, 0),
        diameter=(11, 16), filling=(0.22, 0.45), clumping=(0.2, 0.5), coarseness=(0.4, 1.0),
        nucleus_purple=(0.7, 1.2), cytoplasm_eosin=(0.06, 0.25), cytoplasm_blue=(0.0, 0.14),
        granule_density=(0.5, 3.0), granule_radius=(0.1, 0.2), granule_purple=(0.03, 0.25),
        granule_orange=(0.0, 0.08), granule_cover=(0.0, 0.2),
    ),
    _stage(
        "platelet", 7, 1.0, (1, 0, 0, 0, 0, 0, 0),
        diameter=(1.8, 5.5), filling=(0.0, 0.0), ruggedness=(0.03, 0.2),
        cytoplasm_eosin=(0.02, 0.15), cytoplasm_blue=(0.08, 0.3), mottling=(0.2, 0.7),
        granule_density=(1.0, 4.0), granule_radius=(0.15, 0.35), granule_purple=(0.15, 0.7),
    ),
)  # fmt: skip
