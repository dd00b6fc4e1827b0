"""Samples of a trained model at several temperatures: RUN/samples.json, as `samples.*` says.

With `samples.word_texts`, RUN/words.json too: the share of generated words that the training documents have.
"""

from pathlib import Path

from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.errors import ExitCode
from calm_core.io import write_json

SECTIONS = ("data", "samples")


def sample(experiment: Experiment, dry_run: bool) -> ExitCode:
    """Continue the prompts, or print what would be done."""
    settings, run = experiment.samples, experiment.paths.calm_run
    if dry_run:
        print(f"would continue {len(settings.prompts)} prompts at temperatures {settings.temperatures} with {run}")
        return ExitCode.OK

    from calm_core.data.store import TokenStore
    from calm_core.evaluation.words import count_words
    from calm_core.inference.generate import continue_prompts
    from calm_core.inference.load_model import default_device, load_for_inference
    from calm_core.report.run_page import write_run_page

    loaded, path = load_for_inference(run, default_device()), Path(experiment.run) / "samples.json"
    if settings.word_texts:
        train = TokenStore(experiment.paths.tokens, "train")
        write_json(path.with_name("words.json"), count_words(loaded, train, settings, experiment.seed))
    write_json(path, continue_prompts(loaded, settings, experiment.seed))
    write_run_page(Path(experiment.run))
    print(f"finished: {path}")
    return ExitCode.OK


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, Experiment, SECTIONS, sample))
