"""Layouts that a model does not fit, each refused by a sentence that names the key and the mend."""

from dataclasses import replace

import pytest

from calm_core.errors import UserError
from calm_core.model.config import BackboneConfig, HeadConfig, ModelShape
from calm_core.model.layout import check_layout
from calm_core.parallel.config import ParallelConfig

GROUPED = BackboneConfig(layers=4, hidden=48, ffn=64, heads=12, kv_groups=6)
WHOLE = BackboneConfig(layers=4, hidden=48, ffn=64, heads=12)


@pytest.mark.parametrize(
    ("backbone", "layout", "words"),
    [
        (GROUPED, {"tensor": 4}, r"parallel\.tensor=4 does not divide the 6 key/value heads .*model\.kv_groups"),
        (WHOLE, {"tensor": 8}, r"parallel\.tensor=8 does not divide the 12 key/value heads .*: choose a divisor"),
        (replace(WHOLE, ffn=66), {"tensor": 4}, r"parallel\.tensor=4 does not divide model\.ffn=66: change one"),
        (replace(WHOLE, ffn=66), {"tensor": 6}, r"does not divide 128, .* vocabulary .*: choose a power of two"),
        (
            WHOLE,
            {"tensor": 4, "sequence": True},
            r"training\.positions=96 is not a multiple of 64, .*head\.target_group",
        ),
    ],
)
def test_layouts_that_do_not_fit(backbone: BackboneConfig, layout: dict, words: str) -> None:
    shape = ModelShape(backbone, HeadConfig(), 300, k=4, latent=8)
    with pytest.raises(UserError, match=words):
        check_layout(shape, 96, ParallelConfig(**layout))


@pytest.mark.parametrize("head", [HeadConfig(target_group=8), HeadConfig(kind="flow"), HeadConfig(kind="softmax")])
def test_layouts_that_fit(head: HeadConfig) -> None:
    shape = ModelShape(WHOLE, head, 300, k=4, latent=8)
    for layout in (ParallelConfig(tensor=4, sequence=True), ParallelConfig(tensor=2, pipeline=2, virtual=2)):
        check_layout(shape, 96, layout)
