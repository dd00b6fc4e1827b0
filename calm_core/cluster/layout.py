"""How a training is dealt out to the ranks of some nodes, and the nearest number of nodes where it can be."""

from calm_core.errors import UserError
from calm_core.experiment import Experiment


def describe_layout(experiment: Experiment, stage: str, nodes: int, tasks: int) -> str:
    """Ranks, layout and accumulation of a training on `nodes` nodes of `tasks` ranks, in a line.

    Raises:
        UserError: if it cannot be dealt out so; the sentence ends with the number of nodes nearest to it that works.
    """
    try:
        return _describe(experiment, stage, nodes * tasks)
    except UserError as refusal:
        near = nearest_nodes(experiment, stage, nodes, tasks)
        advice = f"sbatch --nodes={near} is the nearest that works" if near else "no number of nodes works"
        raise UserError(f"{refusal} On nodes of {tasks} ranks, {advice}.") from refusal


def nearest_nodes(experiment: Experiment, stage: str, nodes: int, tasks: int) -> int | None:
    """The number of nodes nearest to `nodes` that a training can run on; None if there is none up to four times it."""
    for count in sorted(range(1, 4 * nodes + 1), key=lambda count: abs(count - nodes)):
        try:
            _describe(experiment, stage, count * tasks)
        except UserError:
            continue
        return count
    return None


def _describe(experiment: Experiment, stage: str, world: int) -> str:
    if stage == "train_autoencoder":
        training, shared, multiple = experiment.autoencoder_training, "", 1
        data = world
    else:
        training, layout = experiment.training, experiment.parallel
        shared, multiple = f"tensor {layout.tensor} x pipeline {layout.pipeline} x ", layout.micro_batch_multiple
        data = layout.data_parallel(world)
    accumulated = training.micro_batches(data, multiple)
    ranks = "1 rank" if world == 1 else f"{world} ranks"
    return (
        f"{ranks} = {shared}data {data}; global batch {training.global_batch} = {data} x micro-batch "
        f"{training.micro_batch} x {accumulated} accumulated"
    )
