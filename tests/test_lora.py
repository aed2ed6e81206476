"""LoRA adapters merged as peft merges them, and everything else refused by name."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from gendr import CheckpointError
from gendr.files import lora


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(4, 5))


def adapted(names=("one", "two"), rank=2, alpha=6):
    """(plain state, adapters' tensors, state merged by peft) of a network with several adapters."""
    model = network()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    for name in names:
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0", "1", "3"])
        model = inject_adapter_in_model(config, model, adapter_name=name)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    tensors = {k: v.clone() for k, v in model.state_dict().items() if "lora_" in k}
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge(adapter_names=list(names))
    state = {k.replace(".base_layer.", "."): v for k, v in model.state_dict().items()}
    return plain, tensors, {k: state[k] for k in plain}


@pytest.mark.parametrize("names", [("one",), ("one", "two"), ("one", "two", "three")])
def test_every_adapter_of_a_module_is_added(names):
    plain, tensors, expected = adapted(names)
    merged = lora.merge(plain, lora.read(tensors, lambda rank: 6 / rank))
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(merged[name], tensor, atol=1e-5), name


def test_a_base_layer_replaces_before_adapters_are_added():
    plain, tensors, expected = adapted()
    weight, bias = torch.randn(4, 3, 3, 3), torch.randn(4)
    tensors |= {"0.base_layer.weight": weight, "0.base_layer.bias": bias}
    merged = lora.merge(plain, lora.read(tensors, lambda rank: 6 / rank))
    delta = expected["0.weight"] - plain["0.weight"]
    assert torch.allclose(merged["0.weight"], weight + delta, atol=1e-5)
    assert torch.equal(merged["0.bias"], bias)


def test_the_base_keeps_its_own_tensors_and_dtypes():
    plain, tensors, _ = adapted()
    half = {k: v.half() for k, v in plain.items()}
    before = {k: v.clone() for k, v in half.items()}
    merged = lora.merge(half, lora.read(tensors, lambda rank: 3.0))
    assert all(v.dtype == torch.float16 for v in merged.values())
    assert all(torch.equal(half[k], v) for k, v in before.items())


def test_common_prefixes_belong_to_no_module():
    plain, tensors, expected = adapted(("one",))
    tensors = {f"base_model.model.unet.{k}": v for k, v in tensors.items()}
    merged = lora.merge(plain, lora.read(tensors, lambda rank: 6 / rank))
    assert torch.allclose(merged["3.weight"], expected["3.weight"], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"0.alpha": torch.ones(1)}, "0.alpha is neither a peft LoRA tensor nor a base_layer"),
        ({"0.lora_A.one.bias": torch.ones(1)}, "0.lora_A.one.bias is neither"),
        ({"9.lora_A.one.weight": torch.ones(2, 3)}, "9 has a lora_A alone"),
        (
            {"9.lora_A.one.weight": torch.ones(2, 3), "9.lora_B.one.weight": torch.ones(2, 2)},
            "changes 9, which the base does not have",
        ),
        ({"3.lora_B.one.weight": torch.ones(5, 3)}, "of 3 does not fit together"),
        (
            {"3.lora_A.one.weight": torch.ones(2, 7), "3.lora_B.one.weight": torch.ones(5, 2)},
            "made for another base: 3 is",
        ),
        ({"unet.3.lora_A.one.weight": torch.ones(2, 4)}, "is there twice"),
        ({"3.base_layer.weight": torch.ones(1, 2)}, "made for another base: 3 is"),
        ({"7.base_layer.bias": torch.ones(1)}, "changes 7, which the base does not have"),
    ],
)
def test_what_has_no_place_is_named(change, words):
    plain, tensors, _ = adapted()
    with pytest.raises(ValueError, match=words):
        lora.merge(plain, lora.read({**tensors, **change}, lambda rank: 1.0))


def test_a_setting_of_peft_that_changes_the_product_is_refused(tmp_path):
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    settings.write_text('{"lora_alpha": 4, "r": 2, "use_dora": true}')
    with pytest.raises(CheckpointError, match="sets use_dora"):
        lora.scaling_of(weights)
    settings.write_text('{"lora_alpha": 4, "r": 2}')
    assert lora.scaling_of(weights)(2) == 2
    with pytest.raises(ValueError, match=r"rank 3, adapter_config\.json says 2"):
        lora.scaling_of(weights)(3)
