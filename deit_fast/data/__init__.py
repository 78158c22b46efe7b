"""Data sets, loaders and the ingest step: from files to the batch that teacher and student see."""

from deit_fast.data.batch import ViewBatch
from deit_fast.data.eval import EvalLoader
from deit_fast.data.fingerprint import pixel_contract
from deit_fast.data.image_folder import ImageFolder
from deit_fast.data.ingest import ingest_batch
from deit_fast.data.loader import ViewLoader
from deit_fast.data.open import open_loader, open_source
from deit_fast.data.sources import Synthetic, UnreadableImage

__all__ = [
    "EvalLoader",
    "ImageFolder",
    "Synthetic",
    "UnreadableImage",
    "ViewBatch",
    "ViewLoader",
    "ingest_batch",
    "open_loader",
    "open_source",
    "pixel_contract",
]
