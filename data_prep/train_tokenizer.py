"""Train the tokenizer on the training text of the corpus: RUN/tokenizer/tokenizer.model."""

from dataclasses import asdict

from calm_core.config import command
from calm_core.config.experiment import Experiment
from calm_core.data.corpus import fingerprint, sources
from calm_core.data.split import choose_split, held_out_tokens
from calm_core.data.tokens import training_texts
from calm_core.tokenizer.sentencepiece import is_trained, train_tokenizer

SECTIONS = ("data", "tokenizer")


def prepare(experiment: Experiment, dry_run: bool) -> None:
    """Train the tokenizer, unless it exists; or print what would be done."""
    config, data, path = experiment.tokenizer, experiment.data, experiment.paths.tokenizer
    corpus = sources(data.corpus)
    made_from = {
        "corpus": fingerprint(corpus),
        "data.text_field": data.text_field,
        "data.held_out": data.held_out,
        **{f"tokenizer.{name}": value for name, value in asdict(config).items()},
    }
    if is_trained(path, made_from):
        print(f"finished: {path}")
    elif dry_run:
        print(f"would train a tokenizer of {config.vocab_size:,} tokens on {len(corpus)} files: {path}")
    else:
        print(f"training a tokenizer of {config.vocab_size:,} tokens on {len(corpus)} files", flush=True)
        texts = training_texts(data, config.training_megabytes, choose_split(data, held_out_tokens(experiment)))
        train_tokenizer(texts, config, path, made_from)
        print(f"finished: {path}")


if __name__ == "__main__":
    raise SystemExit(command.run(__doc__, Experiment, SECTIONS, prepare))
