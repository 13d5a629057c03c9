"""Activation quantization, one module per family of libraries; each registers its schemes in `jq.activations.SCHEMES`."""
