"""Parameters and FLOPs of the paper's models by closed form, and its table: `python benchmarks/paper_table.py`.

Needs no data: the shapes are those of configs/*.yaml.
"""

import argparse
from pathlib import Path

from calm_core import config
from calm_core.config.experiment import Experiment
from calm_core.plan.autoencoder_account import autoencoder_shape
from calm_core.plan.dry_run import model_shape
from calm_core.plan.paper import ROWS, comparison

CONFIGS = Path(__file__).parents[1] / "configs"


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    models = {}
    for name in ROWS:
        experiment = config.load(Experiment, CONFIGS / f"{name}.yaml", [])
        shape = model_shape(experiment)
        models[name] = shape, autoencoder_shape(experiment.autoencoder, shape.vocabulary, shape.k)
    print(comparison(models))


if __name__ == "__main__":
    main()
