"""The autoregressive model that a CALM is compared with: same backbone, same data, same training FLOPs."""

from dataclasses import replace
from pathlib import Path

from calm_core.config.experiment import Experiment
from calm_core.config.model_config import TokenLossConfig
from calm_core.plan.dry_run import model_shape
from calm_core.plan.flops import executed_training


def baseline(experiment: Experiment) -> Experiment:
    """The experiment in RUN/ar, on the tokens of `experiment`; with K=1, a softmax head and windows of as many tokens.

    Its steps are of as many tokens, and so many that its training executes the FLOPs of the whole CALM training, side
    loss included; the autoencoder's are not counted. Evaluations and checkpoints are as far apart, as a share of the
    run.
    """
    data, paths, training = experiment.data, experiment.paths, experiment.training
    head, positions = replace(experiment.head, kind="softmax"), training.positions * data.k
    calm = model_shape(experiment)
    ar = replace(calm, head=head, k=1, latent=0, token_loss=None)
    longer = executed_training(calm, training.positions) / executed_training(ar, positions)

    def share(steps: int) -> int:
        return max(1, round(steps * longer)) if steps else 0

    return replace(
        experiment,
        run=str(Path(experiment.run) / "ar"),
        data=replace(data, tokenizer=str(paths.tokenizer), tokens=str(paths.tokens)),
        head=head,
        training=replace(
            training,
            steps=share(training.steps),
            positions=positions,
            token_loss=TokenLossConfig(),
            eval_every=share(training.eval_every),
            save_every=share(training.save_every),
            milestones=[share(step) for step in training.milestones],
        ),
        pipeline=replace(experiment.pipeline, baseline=False),
    )
