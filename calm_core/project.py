"""Where the scripts and the configurations are."""

import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]

# A wheel puts them below the environment that it is installed in.
ROOT = CHECKOUT if (CHECKOUT / "pretrain").is_dir() else Path(sysconfig.get_path("data")) / "share" / "calm"
