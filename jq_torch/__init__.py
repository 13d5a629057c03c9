"""Quantized models behind transformers' `from_pretrained`, computed by jq, with none of the original libraries.

import jq_torch
jq_torch.enable()
model = AutoModelForCausalLM.from_pretrained("a-gptq-awq-or-any-other-checkpoint")
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

# XLA takes 75 % of a GPU when it starts, which would leave torch little; it must be told before jax is imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

if importlib.util.find_spec("torch") is None:
    raise ImportError("jq_torch needs torch, which jq does without: pip install 'jaxq[torch]'", name="torch")

from jq_torch import configs as _configs
from jq_torch.configs import JqConfig as JqConfig
from jq_torch.embedding import JqEmbedding as JqEmbedding
from jq_torch.linear import JqLinear as JqLinear
from jq_torch.quantizer import JqQuantizer as JqQuantizer
from jq_torch.takeover import disable as disable
from jq_torch.takeover import enable as enable
from jq_torch.takeover import methods as methods


def __getattr__(name: str) -> Any:
    """Config classes by transformers' names (`jq_torch.HqqConfig`), whether enabled or not."""
    if name.endswith("Config"):
        return getattr(_configs, name)
    raise AttributeError(f"module 'jq_torch' has no attribute {name!r}")
