import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside the tests
from cluster import Cluster, missing
from launching import ROOT
from trained import STEPS, Training

from calm_core.cluster.slurm import FIRST_PORT, PORTS

SITE = """
export CALM_HOST_PYTHON={python} CALM_PYTHON={python}
export CALM_SCRATCH='{scratch}/$SLURMD_NODENAME' CALM_CHECK_SECONDS=300
export OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo WANDB_MODE=disabled
"""


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A cluster of four nodes, for all tests."""
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Cluster(nodes=4) as cluster:
        yield cluster


@pytest.fixture
def cluster(slurm: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster with nothing on it, and a site file of this test's; afterwards no process may be left."""
    _use_site(slurm, tmp_path)
    yield slurm
    slurm.clear()
    assert not slurm.end_processes()


@pytest.fixture
def training(cluster: Cluster, tiny: Path, tmp_path: Path) -> Training:
    """A training of the tiny experiment on two nodes, not yet submitted."""
    return Training(cluster, tiny, tmp_path)


@pytest.fixture(scope="session")
def uninterrupted(slurm: Cluster, tiny_experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """The training that the others must equal, submitted as awkwardly as a user can.

    From within a task of an array, by a link in a folder whose name ends in `.slurm`, with fewer tasks than the
    launcher's tasks per node, while another process listens at the port where its search for a free one begins.
    """
    folder = tmp_path_factory.mktemp("uninterrupted")
    _use_site(slurm, folder)
    training = Training.of_copy(slurm, tiny_experiment, folder)
    training.set_steps(STEPS)
    link = folder / "my jobs.slurm" / "calm.slurm"
    link.parent.mkdir()
    link.symlink_to(ROOT / "launchers" / "calm_m.slurm")
    job = training.submit_from_an_array(link, "--nodes=2", "--ntasks=2")
    with socket.socket() as taken:
        taken.bind(("", FIRST_PORT + int(job) % PORTS))
        taken.listen()
        slurm.run("scontrol", "release", job)
        training.wait_for_end()
    return training


def _use_site(cluster: Cluster, folder: Path) -> None:
    site = folder / "site.env"
    site.write_text(SITE.format(python=sys.executable, scratch=folder / "scratch"))
    cluster.environment["CALM_SITE"] = str(site)
