"""What all students of a pass share: images, views, batches and held-out images."""

from __future__ import annotations

import functools
from typing import Any

import torch

from deit_fast.config import RunConfig
from deit_fast.data.fingerprint import identify
from deit_fast.data.open import open_source, require_trained_classes
from deit_fast.evaluation import build_eval_loader
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.training.batches import run_batches
from deit_fast.views.plan import ViewPlan


class RunData:
    """The data of a configuration, opened for this rank.

    Attributes:
        source, held_out: training and held-out images.
        eval_loader: of the held-out images.
        plan: makes the views.
        batches: of this rank, one for each step; ``steps`` are their epochs.
        total: number of steps to make.

    Raises:
        InputError: there are no images, or their classes do not fit.
    """

    def __init__(self, config: RunConfig, device: torch.device, group: ProcessGroup) -> None:
        self._group = group
        self.source = open_source(config.data, "train", config.view.image_size)
        self.held_out = open_source(config.data, "val", config.view.image_size)
        require_trained_classes(self.source, self.held_out)
        self.eval_loader = build_eval_loader(config, self.held_out, device, group)
        self.order(config)

    def order(self, config: RunConfig) -> None:
        """Set views and batches to those of a configuration, of which a checkpoint may decide the
        epochs and the seed of the views."""
        self.plan = ViewPlan(config.view, self.source.num_samples)
        self.batches = run_batches(config, self.source.num_samples, self._group)
        self.steps = self.batches.steps
        self.total = min(len(self.batches), config.max_steps or len(self.batches))

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """Facts for a run's identity."""
        return identify(self.source, self.held_out)
