"""Counts the kernels that are started, the bytes that they read and write, and the bytes that ranks send.

As a script on several ranks: `OUT NAME...` counts a micro-batch under each name, LAYOUT or LAYOUT/MODEL, and writes
OUT/LAYOUT-MODEL-RANK.json, with the plan's figures beside those counted. MODEL is "softmax" or "tokens", a side loss.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from calm_core.config.model_config import HEADS, BackboneConfig, HeadConfig, ModelShape, TokenLossConfig
from calm_core.config.training_config import ParallelConfig
from calm_core.distributed.topology import distributed
from calm_core.model.costs import Load
from calm_core.model.noise import SampleNoise
from calm_core.plan.step_time import unit_work

S, B = 32, 2
PRODUCTS = ("aten.mm.", "aten.addmm.", "aten.bmm.", "aten.baddbmm")
NO_KERNEL = ("aten._unsafe_view", "aten.promote_types", "aten.empty", "aten.new_empty", "aten.detach", "c10d.")
BY_INDEX = ("aten.gather.", "aten.scatter")  # of a tensor they read or write what the index names
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-sp": ParallelConfig(tensor=2, sequence=True),
    "tp2-sp-whole-head": ParallelConfig(tensor=2, sequence=True, head="replicated"),
}
SIDE = TokenLossConfig(weight=1.0, rank=8)


class CountedKernels(TorchDispatchMode):
    """What starts.

    Attributes:
        kernels: started.
        moved: bytes that those other than matrix products read and write.
        products: bytes that matrix products read and write.
        messages: sent.
        sent: bytes of them.
        beside: those of `messages` that are not waited for where they start.
        sent_beside: bytes of these.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.moved = self.products = self.messages = self.sent = self.beside = self.sent_beside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith("c10d."):
            self._count_message(func, args)
        elif not func.is_view and not name.startswith(NO_KERNEL):
            self.kernels += 1
            if name.startswith(BY_INDEX):
                self.moved += 2 * args[2].numel() * args[0].itemsize + args[2].nbytes
            elif name.startswith(PRODUCTS):
                self.products += _bytes(args, out)
            else:
                self.moved += _bytes((args, kwargs), out)
        return out

    def _count_message(self, func: Any, args: Any) -> None:
        whole = max((x.nbytes for x in tree_iter(args) if isinstance(x, torch.Tensor)), default=0)
        ranks = dist.get_world_size()
        times = 2 if "allreduce" in str(func) else 1
        sent = times * whole * (ranks - 1) // ranks
        self.messages += 1
        self.sent += sent
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        if named.get("async_op", True):
            self.beside += 1
            self.sent_beside += sent


def _bytes(read: Any, written: Any) -> int:
    """Bytes of tensors that are read, each once, and of those that are written."""
    once = {x.data_ptr(): x.nbytes for x in tree_iter(read) if isinstance(x, torch.Tensor)}
    return sum(once.values()) + sum(x.nbytes for x in tree_iter(written) if isinstance(x, torch.Tensor))


def shape_of(kind: str = "energy", layers: int = 2, blocks: int = 2, side: TokenLossConfig | None = None) -> ModelShape:
    """A small model."""
    tokens = HEADS[kind].reads_tokens
    head = HeadConfig(kind=kind, blocks=blocks, samples=4, target_samples=32)
    backbone = BackboneConfig(layers=layers, hidden=64, ffn=160, heads=4)
    return ModelShape(backbone, head, vocabulary=256, k=1 if tokens else 4, latent=0 if tokens else 16, token_loss=side)


def counted(shape: ModelShape, layout: ParallelConfig, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """What a micro-batch does, forward and backward."""
    from calm_core.model.backbone import transformer_config
    from calm_core.model.calm import CalmModel
    from calm_core.model.heads import Target
    from calm_core.model.parameters import initialize

    model = CalmModel(transformer_config(shape.backbone, layout, dtype), shape)
    initialize([model], 0.02, seed=0)
    tokens = torch.randint(shape.vocabulary, (B, S + 1, shape.k), generator=torch.Generator().manual_seed(0))
    latents = [torch.randn(B, S + 1, shape.latent)] * 2 if shape.latent else []
    target = Target(*(x[:, 1:].transpose(0, 1).contiguous() for x in (tokens, *latents)))
    forward, backward = CountedKernels(), CountedKernels()
    with forward:
        output = model(tokens[:, :-1], target, SampleNoise(0, range(B), torch.device("cpu")))
        loss = output.loss.mean() if output.side is None else (output.loss + output.side).mean()
    with backward:
        loss.backward()
    names = ("kernels", "moved", "products", "messages", "sent", "beside", "sent_beside")
    passes = {"forward": forward, "backward": backward}
    return {which: {name: getattr(each, name) for name in names} for which, each in passes.items()}


def planned(shape: ModelShape, layout: ParallelConfig, dtype: torch.dtype) -> dict[str, dict[str, int]]:
    """The same by the plan."""
    work = unit_work(shape, Load(S, B, layout, dtype.itemsize, "cpu"))
    return {
        which: {
            "kernels": sum(getattr(unit.kernels, which) for unit in work),
            "moved": sum(getattr(unit.kernels, f"moved_{which}") for unit in work),
            "products": sum(each.moved for unit in work for each in getattr(unit.kernels, f"products_{which}")),
            "messages": sum(getattr(unit.kernels, f"messages_{which}") for unit in work),
            "sent": sum(getattr(unit.sent, which) for unit in work),
            "beside": sum(len(unit.kernels.beside) for unit in work) if which == "backward" else 0,
            "sent_beside": sum(unit.sent.beside for unit in work) if which == "backward" else 0,
        }
        for which in ("forward", "backward")
    }


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        layout, _, model = name.partition("/")
        shape = shape_of("softmax") if model == "softmax" else shape_of(side=SIDE if model == "tokens" else None)
        with distributed(LAYOUTS[layout]) as topology:
            found = {
                "counted": counted(shape, LAYOUTS[layout], torch.bfloat16),
                "planned": planned(shape, LAYOUTS[layout], torch.bfloat16),
            }
            out = Path(sys.argv[1]) / f"{name.replace('/', '-')}-{topology.rank}.json"
            out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
