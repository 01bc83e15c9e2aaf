"""The table of contents: what there is of each kind, by name.

Adding one of a kind is one file plus one line here. A value is `"module:attribute"`; the same
spelling works from outside (`dataset="my_lab.thermal:Thermal"`). Nothing is imported until it is named.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import Any

from models.errors import UsageError, unknown

DATASETS = {
    "toy": "models.datasets.toy:Toy",
    "folder": "models.datasets.folder:Folder",
    "msrs": "models.datasets.msrs:MSRS",
    "soda": "models.datasets.soda:SODA",
    "scutseg": "models.datasets.scutseg:SCUTSeg",
    "voc": "models.datasets.voc:VOC",
    "coco": "models.datasets.coco:COCO",
    "fmb": "models.datasets.fmb:FMB",
    "m3fd": "models.datasets.pairs:M3FD",
    "llvip": "models.datasets.pairs:LLVIP",
    "roadscene": "models.datasets.pairs:RoadScene",
}
GENERATORS = {
    "syndiff": "models.generators.syndiff:SynDiff",
    "thermal": "models.generators.thermal:ThermalColour",
}
LEARNERS = {
    "anchored": "models.segmenters.anchored:Anchored",
    "msanet": "models.segmenters.msanet:MSANet",
}
FUSERS = {
    "average": "models.fusers.controls:Average",
    "maximum": "models.fusers.controls:Maximum",
    "saliency": "models.fusers.controls:Saliency",
    "two_scale": "models.fusers.controls:TwoScale",
    "segmif": "models.fusers.segmif:SegMiF",
    "sgdfuse": "models.fusers.sgdfuse:SGDFuse",
}
SEGMENTERS = {
    "prototype": "models.segmenters.prototype:Prototype",
    "fusion": "models.segmenters.fusion:FusionEnsemble",
}


def find(table: dict[str, str], name: str) -> Any:
    """The object behind a name of `table`, or behind a dotted `"module:attribute"` path.

    Raises UsageError that lists the valid names.
    """
    if name in table:
        return resolve_name(table[name])
    if ":" in name:
        try:
            return resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise UsageError(f"Cannot import {name!r} ({error}); write it as module:attribute.") from error
    raise unknown("", name, table)
