"""Decoding with weights that FSDP2 has sharded over two processes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from palme_xt import PalmE
from tests.forks import FORKS
from tests.models import batch, small


def parts(model: PalmE, shard: Callable[[nn.Module], object]) -> None:
    shard(model.encoder)
    shard(model.decoder)


def layers(model: PalmE, shard: Callable[[nn.Module], object]) -> None:
    for layer in model.decoder.net.attn_layers.layers:
        shard(layer[1])
    parts(model, shard)


def whole(model: PalmE, shard: Callable[[nn.Module], object]) -> None:
    parts(model, shard)
    shard(model)
    for method in "generate", "stream", "beam_search":
        register_fsdp_forward_method(model, method)


def check(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    model = small()
    img, text = batch(model)
    prompts, loss = text[:, :3], model(img, text)
    greedy = model.generate(img, prompts, 4, temperature=0.0)
    beams, _ = model.beam_search(img, prompts, 4, beams=2)
    assert not torch.equal(greedy, beams[1])
    for how in parts, layers, whole:
        sharded = copy.deepcopy(model)
        how(sharded, lambda module: fully_shard(module, mesh=mesh))
        assert {type(parameter.data) for parameter in sharded.parameters()} == {DTensor}
        for _ in range(2):  # before and after the first step of training
            assert torch.equal(sharded.generate(img, prompts, 4, temperature=0.0), greedy)
            assert torch.equal(torch.stack(list(sharded.stream(img, prompts, 4, temperature=0.0)), dim=1), greedy)
            assert torch.equal(sharded.beam_search(img, prompts, 4, beams=2)[0], beams)
            again = sharded(img, text)
            again.backward()
            torch.testing.assert_close(again, loss)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_decode_what_one_decodes(tmp_path: Path) -> None:
    start_processes(check, args=(str(tmp_path / "store"),), nprocs=2, start_method=FORKS.get_start_method())
