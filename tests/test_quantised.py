"""Checkpoints in 4 and 8 bits: the weights that they stand for, number by number, and the same model as plain ones."""

import json
import math
import shutil

import families
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmlib import CheckpointError, UnsupportedArchitectureError, load
from llmlib.hf import quantised
from llmlib.hf.quantised import mxfp4, scaled_blocks

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own deprecations are not ours to answer for
GPT_OSS = families.MOE | {
    "num_local_experts": 3, "head_dim": 8, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
}  # fmt: skip
BLOCK = (24, 16)  # rows and columns, which divide few of the matrices below


def e2m1(code: int) -> float:
    """A sign, two bits of exponent with a bias of 1, one bit of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = (code >> 3) & 1, (code >> 1) & 3, code & 1
    size = mantissa / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def e4m3(byte: int) -> float:
    """A sign, four bits of exponent with a bias of 7, three of mantissa; all ones is NaN."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8)
    return -size if sign else size


def random_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_every_code_of_four_bits_at_every_scale():
    pairs = torch.arange(256, dtype=torch.uint8).view(16, 16)  # every pair of codes
    for scale in (0, 1, 100, 127, 128, 250):
        found = mxfp4(pairs[:, None], torch.full((16, 1), scale, dtype=torch.uint8))
        expected = [e2m1(byte >> half) * 2.0 ** (scale - 127) for byte in range(256) for half in (0, 4)]
        assert found.double().flatten().tolist() == expected
    assert mxfp4(pairs[:, None], torch.full((16, 1), 255, dtype=torch.uint8)).isnan().all()


def test_four_bits_are_unpacked_as_by_the_reference():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random_bytes(3, 10, 4, 16), random_bytes(3, 10, 4, low=90, high=150)
    assert torch.equal(mxfp4(blocks, scales).transpose(1, 2), convert_moe_packed_tensors(blocks, scales))


def test_every_number_of_eight_bits_in_its_block():
    codes, scales = torch.arange(256, dtype=torch.uint8).view(16, 16), torch.rand(3, 4)
    found = scaled_blocks(codes.view(torch.float8_e4m3fn), scales, (7, 5))
    for i, j in np.ndindex(16, 16):
        expected = e4m3(int(codes[i, j])) * scales[i // 7, j // 5].item()
        torch.testing.assert_close(found[i, j].item(), expected, rtol=1e-6, atol=0, equal_nan=True)


def save_as(folder, tensors: dict, quantization: dict) -> None:
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    families.edit_config(folder, quantization_config=quantization)


@pytest.fixture(scope="module")
def in_four_bits(tmp_path_factory):
    """(the reference with plain weights, its folder, the folder with the codes of the same weights)."""
    plain, coded = tmp_path_factory.mktemp("mxfp4") / "plain", tmp_path_factory.mktemp("mxfp4") / "coded"
    model = families.published("gpt_oss", GPT_OSS, plain)
    shutil.copytree(plain, coded)
    tensors = load_file(plain / "model.safetensors")
    for seed, name in enumerate(sorted(n for n in tensors if n.endswith(("gate_up_proj", "down_proj")))):
        experts, inputs, outputs = tensors.pop(name).shape
        blocks = random_bytes(experts, outputs, inputs // 32, 16, seed=seed)
        scales = random_bytes(experts, outputs, inputs // 32, low=121, high=125, seed=seed)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        model.get_parameter(name).data = mxfp4(blocks, scales).float().transpose(1, 2).contiguous()
    model.save_pretrained(plain)
    save_as(coded, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return model, plain, coded


def is_matrix(name: str, x: torch.Tensor) -> bool:
    return x.ndim == 2 and name.endswith("proj.weight")


@pytest.fixture(scope="module")
def in_eight_bits(tmp_path_factory):
    """The same of DeepSeek-V3 in FP8, whose scales are those of the blocks' largest numbers."""
    plain, coded = tmp_path_factory.mktemp("fp8") / "plain", tmp_path_factory.mktemp("fp8") / "coded"
    families.published("deepseek_v3", families.DEEPSEEK, plain)
    shutil.copytree(plain, coded)
    tensors = load_file(plain / "model.safetensors")
    decoded = dict(tensors)
    for name in [name for name, x in tensors.items() if is_matrix(name, x)]:
        x = tensors[name]
        starts = [range(0, n, b) for n, b in zip(x.shape, BLOCK, strict=True)]
        blocks = [[x[i : i + BLOCK[0], j : j + BLOCK[1]] for j in starts[1]] for i in starts[0]]
        scales = torch.tensor([[block.abs().max() / 448 for block in row] for row in blocks])
        codes = [
            torch.cat([(b / s).to(torch.float8_e4m3fn).float() for b, s in zip(*row, strict=True)], 1)
            for row in zip(blocks, scales, strict=True)
        ]
        decoded[name] = torch.cat([
            torch.cat([c * s for c, s in zip(row.split(BLOCK[1], 1), scale, strict=True)], 1)
            for row, scale in zip(codes, scales, strict=True)
        ])  # fmt: skip
        tensors |= {name: torch.cat(codes).to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}
    save_file(decoded, plain / "model.safetensors")
    save_as(coded, tensors, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)})
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval(), plain, coded


@pytest.mark.parametrize("pieces", [1 << 21, 100])
@pytest.mark.parametrize("bits", ["in_four_bits", "in_eight_bits"])
@torch.no_grad()
def test_a_quantised_checkpoint_is_the_plain_one(bits, pieces, request, monkeypatch):
    theirs, plain, coded = request.getfixturevalue(bits)
    monkeypatch.setattr(quantised, "_BLOCK_NUMBERS", pieces)
    mine, expected = load(coded), load(plain)
    for (name, found), wanted in zip(mine.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name
    tokens = torch.randint(0, 97, (2, 20), generator=torch.Generator().manual_seed(0))
    reference = theirs(tokens).logits
    assert (mine(tokens) - reference).abs().max() < 1e-4 * reference.std()


@pytest.mark.parametrize("bits", ["in_four_bits", "in_eight_bits"])
def test_shards_and_narrow_dtypes(bits, request, tmp_path):
    """Codes and scales in different files; bfloat16 holds four bits exactly."""
    *_, coded = request.getfixturevalue(bits)
    folder = tmp_path / "shards"
    shutil.copytree(coded, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    scales = {n for n in tensors if n.endswith(("_scales", "_scale_inv"))}
    files = {"model-1.safetensors": scales, "model-2.safetensors": set(tensors) - scales}
    for file, names in files.items():
        save_file({n: tensors[n] for n in names}, folder / file)
    index = {"weight_map": {n: file for file, names in files.items() for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, split = load(coded).bfloat16(), load(folder, dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), split.parameters(), strict=True))


GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
Q = "model.layers.0.self_attn.q_b_proj.weight"
BROKEN = {
    "no scales": ("in_four_bits", lambda t: t.pop(f"{GATE_UP}_scales"), "_blocks' without '.*gate_up_proj_scales'"),
    "no codes": ("in_four_bits", lambda t: t.pop(f"{GATE_UP}_blocks"), "_scales' without '.*gate_up_proj_blocks'"),
    "short scales": (
        "in_four_bits", lambda t: t.update({f"{GATE_UP}_scales": t[f"{GATE_UP}_scales"][:, :5]}),
        r"gate_up_proj_scales' has shape \(3, 5, 2\), and for .*_blocks', which has \(3, 64, 2, 16\), must have \(3, 6",
    ),
    "another group": (
        "in_four_bits", lambda t: t.update({f"{GATE_UP}_blocks": t[f"{GATE_UP}_blocks"].view(3, 64, 4, 8)}),
        r"for .*_blocks', which has \(3, 64, 4, 8\), must have None",
    ),
    "floats for codes": (
        "in_four_bits", lambda t: t.update({f"{GATE_UP}_blocks": t[f"{GATE_UP}_blocks"].float()}),
        "_blocks' is stored as F32, and beside '.*_scales' must be U8",
    ),
    "floats for exponents": (
        "in_four_bits", lambda t: t.update({f"{GATE_UP}_scales": t[f"{GATE_UP}_scales"].float()}),
        "_scales' is stored as F32, and beside '.*_blocks' must be U8",
    ),
    "exponents for scales": (
        "in_eight_bits", lambda t: t.update({f"{Q}_scale_inv": t[f"{Q}_scale_inv"].byte()}),
        "_scale_inv' is stored as U8, and beside '.*q_b_proj.weight' must be F32 or BF16",
    ),
    "no scale": ("in_eight_bits", lambda t: t.pop(f"{Q}_scale_inv"), "q_b_proj.weight' is stored as F8_E4M3"),
    "plain with a scale": (
        "in_eight_bits", lambda t: t.update({Q: t[Q].float()}), "is stored as F32, and beside .* must be F8_E4M3"
    ),
    "scales of other blocks": (
        "in_eight_bits", lambda t: t.update({f"{Q}_scale_inv": torch.ones(1, 1)}), r"scale_inv' has shape \(1, 1\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_parts_are_named(kind, request, tmp_path):
    bits, edit, message = BROKEN[kind]
    folder = tmp_path / "broken"
    shutil.copytree(request.getfixturevalue(bits)[2], folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
        {"bits": 4},
        "awq",
    ],
    ids=str,
)
def test_other_formats_are_refused(quantization, in_eight_bits, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(in_eight_bits[2], folder)
    families.edit_config(folder, quantization_config=quantization)
    with pytest.raises(UnsupportedArchitectureError, match="llmlib reads only mxfp4, fp8 .*unquantised copy"):
        load(folder)


def test_codes_without_a_quantization_config_are_refused(in_eight_bits, tmp_path):
    folder = tmp_path / "silent"
    shutil.copytree(in_eight_bits[2], folder)
    families.edit_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match="is stored as F8_E4M3, and llmlib reads only"):
        load(folder)
