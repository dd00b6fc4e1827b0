import pytest
import torch

from calm_core.evaluation.scores import mean_distance, tokens_of


@pytest.mark.parametrize("count", [2, 25, 26, 100])
def test_the_spread_of_nearly_equal_draws_is_exact(count: int) -> None:
    """A head that has collapsed: draws 1e-5 apart, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    centre, noise = (torch.randn(n, 2, c, 64, generator=generator) for n, c in ((3, 1), (3, count)))
    points = centre + 1e-5 * noise
    wanted = (points.double().unsqueeze(2) - points.double().unsqueeze(3)).norm(dim=-1).sum((-1, -2))
    found = mean_distance(points)
    assert wanted.max() < 1e-3 * count**2
    torch.testing.assert_close(found.double(), wanted / (count * (count - 1)), rtol=1e-5, atol=0)
    assert torch.equal(mean_distance(points[:, :, :1].expand(-1, -1, count, -1)), torch.zeros(3, 2))


def test_a_numbered_score_counts_where_so_many_tokens_are_text() -> None:
    assert [tokens_of(name) for name in ("brier_4", "unigram_brier_2", "collision_1", "loss", "loss_shuffled")] == [
        4,
        2,
        1,
        1,
        1,
    ]
