"""The dry run's imports."""

import sys

from launching import finish

DRY_RUN = """
import runpy, sys
sys.argv = ["pretrain/train_calm.py", "configs/calm_m.yaml", "--dry-run"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    assert end.code == 0
print("imported", sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "megatron", "deepspeed"}))
"""


def test_a_dry_run_does_not_wait_for_megatron_core_and_deepspeed() -> None:
    code, output = finish([sys.executable, "-c", DRY_RUN], seconds=60)
    assert code == 0, output
    assert output.splitlines()[-1] == "imported ['torch']"
