"""The batches of a run by its configuration."""

from __future__ import annotations

from deit_fast.config import RunConfig
from deit_fast.runtime.distributed import ProcessGroup
from deit_fast.views.deit_order import DeitBatches
from deit_fast.views.order import EpochOrder, TrainBatches


def run_batches(
    config: RunConfig, num_samples: int, group: ProcessGroup
) -> TrainBatches | DeitBatches:
    """This rank's samples and views of every step.

    Raises:
        InputError: as ``TrainBatches`` and ``DeitBatches``.
    """
    sizes = (config.batch_size, config.epochs, group.rank, group.world_size)
    if config.compat == "deit":
        return DeitBatches(config.view, num_samples, *sizes)
    order = EpochOrder(config.view.seed, num_samples, config.view_count, config.view.repeats)
    return TrainBatches(order, *sizes, config.batch_schedule)
