import pytest
import torch
from torch import Tensor

from calm_core.model.noise import CUDA_BLOCK, SampleNoise, blocks, stream_seed

CPU = torch.device("cpu")


def draws(samples: list[int], name: str = "head", seed: int = 0, **options: str) -> Tensor:
    return SampleNoise(seed, samples, CPU, **options).uniform(name, 3, 5)


def test_a_sample_has_the_same_noise_in_any_micro_batch() -> None:
    whole = draws([7, 8, 9, 10])
    assert whole.shape == (3, 4, 5)
    assert torch.equal(whole, torch.cat([draws([7, 8]), draws([9]), draws([10])], dim=1))
    assert torch.equal(whole.flip(1), draws([10, 9, 8, 7]))


def test_streams_differ_by_seed_name_purpose_and_sample() -> None:
    one = draws([0])
    others = [draws([1]), draws([0], seed=1), draws([0], name="target"), draws([0], purpose="evaluation")]
    assert not any(torch.equal(one, other) for other in others)
    assert torch.equal(one, draws([0]))


def test_neighbouring_samples_are_unrelated() -> None:
    x = SampleNoise(0, range(400), CPU).normal("head", 1, 50)[0]
    correlation = torch.corrcoef(x)
    assert correlation.fill_diagonal_(0).abs().max() < 0.75  # five standard errors of 1 / sqrt(50)
    assert correlation.mean().abs() < 0.01


def test_distributions() -> None:
    noise = SampleNoise(3, range(50), CPU)
    uniform, normal, integers = noise.uniform("a", 40, 25), noise.normal("b", 40, 25), noise.integers("c", 7, 40, 25)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert normal.mean().item() == pytest.approx(0, abs=0.02)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
    assert (uniform.dtype, normal.dtype, integers.dtype) == (torch.float32, torch.float32, torch.int64)
    assert integers.flatten().bincount().div(50_000) == pytest.approx(torch.full((7,), 1 / 7), abs=0.01)


def test_seeds_are_63_bits_and_kept_apart() -> None:
    seeds = {stream_seed(seed, name, sample) for seed in range(5) for name in "ab" for sample in range(200)}
    assert len(seeds) == 2000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**61


def test_a_cpu_generator_uses_32_bits_of_a_seed() -> None:
    def drawn(seed: int) -> Tensor:
        return torch.empty(100).uniform_(generator=torch.Generator().manual_seed(seed))

    seed = stream_seed(0, "head", 0)
    assert torch.equal(drawn(seed), drawn(seed % 2**32))
    assert not torch.equal(drawn(seed), drawn(seed ^ 1))


def test_the_streams_are_those_of_torch_for_a_whole_tensor() -> None:
    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(stream_seed(3, f"training/{name}", 5))

    noise, size = SampleNoise(3, [5], CPU), (7, 11)
    assert torch.equal(noise.uniform("a", *size)[:, 0], torch.rand(size, generator=generator("a")))
    assert torch.equal(noise.normal("b", *size)[:, 0], torch.randn(size, generator=generator("b")))
    assert torch.equal(noise.integers("c", 9, *size)[:, 0], torch.randint(9, size, generator=generator("c")))


def test_a_gpu_draws_blocks_of_a_size_that_does_not_depend_on_it() -> None:
    numbers = torch.arange(2 * CUDA_BLOCK + 5).view(-1, 1)
    on_gpu = blocks(numbers, "cuda")
    assert [len(block) for block in on_gpu] == [CUDA_BLOCK, CUDA_BLOCK, 5]
    assert torch.equal(torch.cat(on_gpu), numbers.flatten())
    assert [len(block) for block in blocks(numbers, "cpu")] == [len(numbers)]
