import torch

from calm_core.brier import BrierAccumulator, clustered_mean
from calm_core.padding import text_tokens


def test_only_the_pad_that_ends_a_chunk_is_no_text():
    tokens = torch.tensor([[5, 6, 7, 8], [5, 0, 7, 0], [0, 5, 0, 0], [0, 0, 0, 0]])
    assert text_tokens(tokens, 0).int().tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert text_tokens(tokens, None).all()


def test_a_score_that_does_not_count_leaves_no_trace():
    torch.manual_seed(0)
    values, documents = torch.randn(40, 2, dtype=torch.float64), torch.arange(40) % 5
    counted = torch.stack([torch.ones(40, dtype=torch.bool), torch.rand(40) < 0.6], 1)
    accumulator = BrierAccumulator(2)
    accumulator.add(values.where(counted, torch.nan), documents, counted)
    found = accumulator.result()
    for column in range(2):
        chosen = counted[:, column]
        alone = clustered_mean(values[chosen][:, column : column + 1], documents[chosen])
        assert torch.allclose(found.mean[column], alone.mean[0])
        assert torch.allclose(found.standard_error[column], alone.standard_error[0])
    assert found.positions == 40
