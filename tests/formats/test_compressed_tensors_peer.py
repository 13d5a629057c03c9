"""compressed-tensors itself as oracle: what it writes is read, what it computes is computed, what it rounds is rounded.

Needs compressed-tensors 0.20 and torch (extra `peers`).
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from format_reading import assert_same

import jq
from jq.formats.compressed_tensors_config import parse_group
from jq.formats.compressed_tensors_methods import layout_of, weight_parts

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra `peers`)")

INT_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8_TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
MX = {"type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
NV = {
    "num_bits": 4,
    "type": "float",
    "strategy": "tensor_group",
    "group_size": 16,
    "scale_dtype": "torch.float8_e4m3fn",
}
WEIGHTS = [
    *(
        {"num_bits": b, "strategy": "channel", "symmetric": s}
        for b, s in itertools.product((2, 3, 5, 8), (True, False))
    ),
    *(
        {"num_bits": b, "strategy": "group", "group_size": 32, "symmetric": s}
        for b, s in ((4, True), (4, False), (6, False))
    ),
    *({"num_bits": b, "strategy": "tensor", "symmetric": s} for b, s in ((4, True), (7, False))),
    *({"num_bits": 8, "type": "float", "strategy": s} for s in ("tensor", "channel")),
    {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32},
    {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]},
    *({**MX, "num_bits": b} for b in (4, 6, 8)),
    NV,
]
INPUTS = [
    None,
    INT_TOKEN,
    {**INT_TOKEN, "symmetric": False},
    {"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True},
    {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": True, "symmetric": False},
    {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False, "symmetric": False},
    FP8_TOKEN,
    {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
    {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "dynamic": True},
]
FLOAT_INPUTS = {4: {**MX, "num_bits": 4, "dynamic": True}, 6: {**MX, "num_bits": 8, "dynamic": True}, 8: FP8_TOKEN}
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def cases():
    """Each weight scheme with one kind of inputs, each kind of inputs with some weights, dtypes in turn."""
    found = []
    for i, w in enumerate(WEIGHTS):
        dtype = list(DTYPES)[i % 3]
        found.append((w, None, dtype))
        if w.get("type") == "float":
            inputs = {**NV, "dynamic": "local"} if w is NV else FLOAT_INPUTS[w["num_bits"]]
        else:
            inputs = INPUTS[1 + i % (len(INPUTS) - 1)]
        found.append((w, inputs, list(DTYPES)[(i + 1) % 3]))
    return found


def array(t):
    t = t.detach().contiguous()
    if t.dtype == torch.bfloat16:
        return t.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if t.dtype == torch.float8_e4m3fn:
        return t.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return t.numpy()


def qparams(w, args):
    """Scales, zero points and global scale by the library's own functions, over the library's own groups."""
    from compressed_tensors.quantization.utils import (
        calculate_qparams,
        generate_gparam,
        maybe_pad_tensor_for_block_quant,
    )

    whole = {}
    if args.strategy == "tensor":
        low, high = w.min(), w.max()
    elif args.strategy == "channel":
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    elif args.strategy == "block":
        rows, cols = args.block_structure
        blocks = maybe_pad_tensor_for_block_quant(w, (rows, cols))
        blocks = blocks.reshape(blocks.shape[0] // rows, rows, -1, cols)
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    else:
        groups = w.unflatten(1, (-1, args.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
        if args.strategy == "tensor_group":
            whole = {"global_scale": generate_gparam(w.min(), w.max())}
    scale, zero = calculate_qparams(low, high, args, **whole)
    return scale.to(w.dtype), zero, whole.get("global_scale")


def forward(weight, x, scheme, stored):
    """The library's quantized Linear over decompressed weights; static scales land in `stored`."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    model = torch.nn.Sequential()
    model.l = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=x.dtype)
    model.l.weight.data = weight.to(x.dtype)
    apply_quantization_config(model, QuantizationConfig(config_groups={"g": scheme}, quantization_status="compressed"))
    model.l.quantization_status = QuantizationStatus.COMPRESSED
    args = scheme.input_activations
    if args.dynamic is False:
        scale, zero = calculate_qparams(x.min(), x.max(), args)
        model.l.input_scale.data = stored["l.input_scale"] = scale.to(x.dtype)
        if not args.symmetric:
            model.l.input_zero_point.data = stored["l.input_zero_point"] = zero
    elif args.dynamic == "local":
        model.l.input_global_scale.data = stored["l.input_global_scale"] = generate_gparam(x.min(), x.max())
    with torch.no_grad():
        return model.l(x)


@pytest.mark.parametrize(("weights", "inputs", "dtype"), cases(), ids=str)
def test_what_the_library_writes_and_computes(weights, inputs, dtype):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from safetensors.torch import save_file

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(
        targets=["Linear"], weights=args, input_activations=None if inputs is None else QuantizationArgs(**inputs)
    )
    generator = torch.Generator().manual_seed(5)
    w = (torch.randn(24, 96, generator=generator) * 0.05).to(getattr(torch, dtype))
    w[3, :32] = 0
    scale, zero, whole = qparams(w, args)
    layout = infer_module_format(torch.nn.Linear, scheme)
    scheme.format = layout
    compressor = BaseCompressor.get_value_from_registry(layout.value)
    local = {"weight": w.clone(), "weight_scale": scale, "weight_zero_point": zero}
    local |= {} if whole is None else {"weight_global_scale": whole}
    written = compressor.compress(local, scheme)
    dense = compressor.decompress(written, scheme)["weight"]
    stored = {f"l.{k}": v.contiguous() for k, v in written.items()}
    y = x = None
    if inputs is not None:
        x = torch.randn(1, 6, 96, generator=generator).to(w.dtype)
        x[0, 2] = 0
        x[0, 4] *= 30
        y = forward(dense, x, scheme, stored)
    whole_config = QuantizationConfig(
        config_groups={"g": scheme}, quantization_status="compressed", format=layout.value
    )
    config = {**json.loads(json.dumps(whole_config.model_dump(), default=str)), "quant_method": "compressed-tensors"}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"dtype": dtype, "quantization_config": config}))
        state = jq.load_state(folder)
    q = state["l.weight"]
    assert_same(q.dequantize(), array(dense))
    for name, value in state.stored():
        assert_same(value, array(stored[name]), name)
    made = weight_parts(
        array(w), parse_group("g", config["config_groups"]["g"], "g").weights, layout_of_config(config), "l"
    )
    for name, value in written.items():
        assert_same(made[name], array(value), name)
    if y is not None:
        got, want = np.asarray(jq.matmul(jnp.asarray(array(x[0])), q), np.float32), array(y[0]).astype(np.float32)
        assert np.linalg.norm(got - want) < 3e-4 * np.linalg.norm(want)


def layout_of_config(config):
    return layout_of(parse_group("g", config["config_groups"]["g"], "g"))
