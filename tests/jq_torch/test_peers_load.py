"""What the adapter saves of other libraries' files, those libraries load, with the dequantized weights that they had.

Each needs its library: the extra `peers` has all but GPT-QModel, which asks for torch 2.14.1. EETQ, FBGEMM, SpQR and HIGGS
have no code that runs on a CPU; SINQ, FP-Quant, Quark and modelopt are held elsewhere, to what the libraries computed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_dirs import directories
from tiny import SIZES, llama, same, tensors_of
from transformers import AutoConfig, AutoModelForCausalLM

import jq
import jq_torch
from jq_torch.experts import JqExperts
from jq_torch.weight import PackedWeight

Dense = dict[str, torch.Tensor]


def by_transformers(folder: Path) -> Dense:
    """Methods that transformers holds itself: without a GPU it dequantizes while loading."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    return {n.removesuffix(".weight"): p.detach() for n, p in model.named_parameters()}


def by_identity(folder: Path) -> Dense:
    """Libraries that hook into transformers: a layer applied to the identity matrix gives its weight exactly."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu").eval()
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "qweight"):
            inputs = getattr(layer, "in_features", None) or layer.infeatures
            with torch.no_grad():
                found[name] = layer(torch.eye(inputs, dtype=torch.float16)).T
    return found


def by_bitnet(folder: Path) -> Dense:
    from transformers.integrations.bitnet import unpack_weights

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored, found = tensors_of(folder), {}
    for name in [n.removesuffix("_scale") for n in stored if n.endswith(".weight_scale")]:
        scale = stored[f"{name}_scale"]
        with torch.compiler.set_stance("force_eager"):  # compiling the function takes most of the file's time
            codes = unpack_weights(stored[name], dtype=scale.dtype)
        plain = config["linear_class"] == "bitlinear"  # its scale is the reciprocal of the other's
        found[name.removesuffix(".weight")] = codes / scale if plain else codes * scale
    return found


def by_bitsandbytes(folder: Path) -> Dense:
    import bitsandbytes as bnb

    def dense(module: Any) -> torch.Tensor:
        if isinstance(module, bnb.nn.Linear8bitLt):
            return bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)

    model = AutoModelForCausalLM.from_pretrained(folder)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {n: dense(m) for n, m in model.named_modules() if isinstance(m, kinds)}


def by_gptqmodel(folder: Path) -> Dense:
    from gptqmodel import BACKEND, GPTQModel
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{i}": i for i in range(3, 256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))  # the library wants one beside the model
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    model = GPTQModel.load(str(folder), backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    return {n: m.dequantize_weight().T for n, m in model.named_modules() if hasattr(m, "dequantize_weight")}


def by_autoawq(folder: Path) -> Dense:
    from awq.utils.packing_utils import dequantize_gemm

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = tensors_of(folder)
    names = [n.removesuffix(".qweight") for n in stored if n.endswith(".qweight")]
    parts = {n: [stored[f"{n}.{part}"] for part in ("qweight", "qzeros", "scales")] for n in names}
    return {n: dequantize_gemm(*tensors, config["bits"], config["group_size"]).T for n, tensors in parts.items()}


def by_hqq(folder: Path) -> Dense:
    from hqq.core.quantize import HQQLinear

    stored, found = tensors_of(folder), {}
    for name in [n.removesuffix(".W_q") for n in stored if n.endswith(".W_q")]:
        layer = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu", initialize=False)
        layer.load_state_dict({k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")})
        found[name] = layer.dequantize()
    return found


def by_quanto(folder: Path) -> Dense:
    from optimum.quanto import requantize
    from optimum.quanto.nn import QModuleMixin

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    requantize(model, tensors_of(folder), json.loads((folder / "quanto_qmap.json").read_text()))
    return {n: m.weight.dequantize() for n, m in model.named_modules() if isinstance(m, QModuleMixin)}


def by_torchao(folder: Path) -> Dense:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    kinds = (torch.nn.Linear, torch.nn.Embedding)
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, kinds)}
    return {n: w.dequantize() for n, w in weights.items() if type(w) is not torch.nn.Parameter}


def by_compressed_tensors(folder: Path) -> Dense:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import is_match

    raw = json.loads((folder / "config.json").read_text())["quantization_config"]
    unknown = ("version", "sparsity_config", "transform_config")
    config = QuantizationConfig.model_validate({k: v for k, v in raw.items() if k not in unknown})
    stored, found = tensors_of(folder), {}
    for name in sorted({n.rpartition(".")[0] for n in stored if n.endswith(("weight_scale", "weight_packed"))}):
        parts = {n.rpartition(".")[2]: t for n, t in stored.items() if n.rpartition(".")[0] == name}
        parts.pop("bias", None)
        for group in config.config_groups.values():
            if is_match(name, torch.nn.Linear(1, 1), group.targets, config.ignore or ()):
                compressor = BaseCompressor.get_value_from_registry(group.format or config.format)
                found[name] = compressor.decompress(parts, group)["weight"].detach()
                break
    return found


def by_aqlm(folder: Path) -> Dense:
    from aqlm.utils import _dequantize_weight, unpack_int_data

    bits_per_code = json.loads((folder / "config.json").read_text())["quantization_config"]["nbits_per_codebook"]
    stored = tensors_of(folder)
    names = [n.removesuffix(".codes") for n in stored if n.endswith(".codes")]

    def dense(name: str) -> torch.Tensor:
        codes = unpack_int_data(stored[f"{name}.codes"], bits_per_code)
        return _dequantize_weight(codes, stored[f"{name}.codebooks"], stored[f"{name}.scales"])

    return {n: dense(n) for n in names}


def by_vptq(folder: Path) -> Dense:
    for name in ("sentence_transformers", "sentence_transformers.SentenceTransformer"):  # of its quantizer alone
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["sentence_transformers.SentenceTransformer"].SentenceTransformer = object
    from vptq.layers.vqlinear import VQuantLinear

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored, found = tensors_of(folder), {}
    for prefix in [n.removesuffix("indices") for n in stored if n.endswith(".indices")]:
        name = prefix.rstrip(".")
        options = config["config_for_layers"].get(name) or config["shared_layer_config"][name.rpartition(".")[2]]
        q = VQuantLinear(**options, enable_proxy_error=False, dtype=stored[f"{prefix}centroids.weight"].dtype)
        q.load_state_dict({n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)})
        found[name] = q(torch.eye(q.in_features, dtype=q.centroids.weight.dtype)).T
    return found


# format -> (library, what reads a directory with it)
READERS: dict[str, tuple[str, Callable[[Path], Dense]]] = {
    "gptq": ("gptqmodel", by_gptqmodel),
    "awq": ("awq", by_autoawq),
    "auto-round": ("auto_round", by_identity),
    "bitsandbytes": ("bitsandbytes", by_bitsandbytes),
    "hqq": ("hqq", by_hqq),
    "quanto": ("optimum.quanto", by_quanto),
    "torchao": ("torchao", by_torchao),
    "compressed-tensors": ("compressed_tensors", by_compressed_tensors),
    "aqlm": ("aqlm", by_aqlm),
    "vptq": ("vptq", by_vptq),
    "fp8": ("transformers", by_transformers),
    "mxfp4": ("transformers", by_transformers),
    "bitnet": ("transformers", by_bitnet),
}
OTHER = {"gptq-optimum-modules-in-block": by_identity}
# Directories that today's library cannot read on a CPU, whoever wrote them.
IMPOSSIBLE = {
    "auto-round-gptq-g64-asym": "auto-round 0.16 leaves its layers without weights on a CPU",
    "awq-gemv-g64": "GEMV kernels run on CUDA alone",
    "awq-gemv_fast-g32": "GEMV kernels run on CUDA alone",
    "awq-llm_awq-g64": "llm-awq's kernels run on CUDA alone",
    "bnb-fp4-dq-f32storage-bs128": "bitsandbytes' AVX512 code takes wrong scales where blocks straddle rows",
    "bnb-nf4-bs256-f16storage-lmhead": "bitsandbytes' AVX512 code takes wrong scales where blocks straddle rows",
    "torchao-int4wo-plain": "the library's int4 tensors have no dequantize on a CPU",
    "torchao-int4wo-tile": "the library's int4 tensors have no dequantize on a CPU",
    **dict.fromkeys(
        [f"ct-legacy-{n}" for n in ("bitmask-dense", "marlin24", "sparse24-dense", "sparse24-fp8", "w4a16-gidx")],
        "compressed-tensors 0.20 reads it no more",
    ),
}


def weights_of(model: Any) -> Dense:
    """Our dequantized weights, which test_reference.py holds against the library's own for the same file."""
    layers = {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, PackedWeight) and m.tied is None}
    for name, module in model.named_modules():
        if isinstance(module, JqExperts):
            layers |= {f"{name}.{p}": module.to_float().get_parameter(p) for p in module.packed_parameters}
    return layers


def installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:
        return False


def _cases() -> Any:
    for name, folder in directories().items():
        method = json.loads((folder / "reference.json").read_text())["method"]
        if method in READERS and (folder / "config.json").exists() and list(folder.glob("model*.safetensors")):
            yield pytest.param(method, folder, id=name)


@pytest.mark.parametrize("method, folder", list(_cases()))
def test_the_library_reads_what_was_saved(method: str, folder: Path, tmp_path: Path) -> None:
    library, read = READERS[method]
    if not installed(library):
        pytest.skip(f"needs {library}")
    if folder.name in IMPOSSIBLE:
        pytest.skip(IMPOSSIBLE[folder.name])
    with jq_torch.enable():
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.save_pretrained(tmp_path)
    wanted = weights_of(model)
    found = OTHER.get(folder.name, read)(tmp_path)
    both = wanted.keys() & found.keys()
    assert both
    for name in both:
        got, want = found[name].detach().contiguous(), wanted[name]
        assert same(got.to(want.dtype) + 0.0, want + 0.0), name  # a product with zeros loses the sign of zero


MADE: dict[str, tuple[str, Any]] = {
    "nf4": ("bitsandbytes", jq.NF4()),
    "fp4-double": ("bitsandbytes", jq.FP4(double_quant=True)),
    "int8": ("bitsandbytes", jq.Int8()),
    "rtn-4": ("gptq", jq.RTN(bits=4, group_size=32)),
    "rtn-8": ("gptq", jq.RTN(bits=8, group_size=64)),
    "hqq-4": ("hqq", jq.HQQ(bits=4, group_size=64)),
    "hqq-3": ("hqq", jq.HQQ(bits=3, group_size=64)),
    "quanto-int8": ("quanto", jq.Quanto("int8")),
    "quanto-int4": ("quanto", jq.Quanto("int4")),
    "quanto-float8": ("quanto", jq.Quanto("float8")),
    "torchao-int8": ("torchao", jq.TorchAO("int8_weight_only")),
    "torchao-float8": ("torchao", jq.TorchAO("float8_weight_only")),
    "ct-w4a16": ("compressed-tensors", jq.CompressedTensors("W4A16", group_size=32)),
    "ct-fp8": ("compressed-tensors", jq.CompressedTensors("FP8_DYNAMIC")),
    "fp8": ("fp8", jq.FP8()),
    "bitnet": ("bitnet", jq.BitNet()),
}


@pytest.mark.parametrize("name", MADE)
def test_the_library_reads_what_was_made_while_loading(name: str, tmp_path: Path) -> None:
    method, made = MADE[name]
    library, read = READERS[method]
    if not installed(library):
        pytest.skip(f"needs {library}")
    llama(SIZES).to(torch.float16).save_pretrained(tmp_path / "float")
    with jq_torch.enable():
        config = jq_torch.JqConfig(made)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config, dtype="auto")
        model.save_pretrained(tmp_path / "made")
    wanted, found = weights_of(model), read(tmp_path / "made")
    assert len(wanted) == 14 and wanted.keys() <= found.keys()
    for layer, want in wanted.items():
        assert same(found[layer].detach().contiguous().to(want.dtype) + 0.0, want + 0.0), layer
