"""What a run needs, told from shapes alone: against real tensors, and against the published sizes."""

import copy

import pytest
import torch

from gendr.networks.unet import SD21_16, TINY_UNET, UNet
from train import memory
from train.checkpointing import recompute_blocks
from train.memory import GIB


@pytest.fixture(scope="module")
def full():
    with torch.device("meta"):
        return UNet(SD21_16)


def test_parameters_and_fixed_memory_of_the_full_size(full):
    assert memory.parameters(full, None) == 865_979_856
    assert memory.training_bytes(865_979_856) / GIB == pytest.approx(16.1, abs=0.05)
    saved = memory.training_bytes(865_979_856) - memory.training_bytes(865_979_856, ema=False)
    assert saved / GIB == pytest.approx(3.23, abs=0.01)
    assert memory.frozen_bytes(865_979_856, torch.bfloat16) / GIB == pytest.approx(1.61, abs=0.01)


def test_shapes_tell_what_a_real_graph_keeps():
    unet = UNet(TINY_UNET)
    z, context = torch.randn(2, 16, 16, 16), torch.randn(2, 4, 64)
    known = {p.untyped_storage().data_ptr() for p in (*unet.parameters(), z, context)}
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = unet(z, 500, context)
    real = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in known)
    assert out.requires_grad
    with torch.device("meta"):
        twin = UNet(TINY_UNET)
    inputs = memory.sample(TINY_UNET, 128, batch=2)
    assert inputs[0].shape == z.shape
    told = memory.activation_bytes(twin, inputs[0], 500, inputs[1], autocast=False)
    assert told == pytest.approx(real, rel=0.01)


def test_activations_at_512_and_1024_pixels(full):
    """Of one picture, with attention in one kernel: 1.2 GiB, and a twentieth with checkpointing."""
    z, context = memory.sample(SD21_16, 512)
    found = memory.activation_bytes(full, z, 500, context)
    block = memory.block_bytes(full, z, 500, context)
    assert 0.9 < found / GIB < 1.4
    assert memory.activation_bytes(full, z, 500, context, autocast=False) > 1.3 * found
    slim = copy.deepcopy(full)
    recompute_blocks(slim)
    kept = memory.activation_bytes(slim, z, 500, context)
    assert 0.02 < kept / GIB < 0.14
    assert kept < block < found / 4
    two = memory.sample(SD21_16, 512, batch=2)
    assert memory.activation_bytes(full, two[0], 500, two[1]) == pytest.approx(2 * found, rel=0.01)
    large = memory.sample(SD21_16, 1024)
    assert memory.activation_bytes(slim, large[0], 500, large[1]) == pytest.approx(
        4 * kept, rel=0.02
    )
    # The network is left as it was.
    assert "block" not in vars(full.down_blocks[0])


def test_attention_counted_weight_by_weight_is_what_2_79_gib_were(full):
    """The published estimate was made on the meta device, which has no fused attention."""
    unet = copy.deepcopy(full).bfloat16()
    z, context = (x.bfloat16() for x in memory.sample(SD21_16, 512))
    known = {p.untyped_storage()._cdata for p in (*unet.parameters(), z, context)}
    kept = {}

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        unet(z, torch.zeros((), device="meta"), context)
    total = sum(s.nbytes() for key, s in kept.items() if key not in known)
    assert total / GIB == pytest.approx(2.79, abs=0.01)


def test_a_table_has_straight_columns():
    text = memory.table([("UNet", 865_979_856, "fp32"), ("VAE", 57, "")])
    assert text.splitlines() == ["UNet  865979856  fp32", "VAE          57"]
    assert memory.gib(GIB / 4) == "0.25 GiB"
    assert memory.gib(GIB / 64) == "16.0 MiB"
