"""HIGGS: pairs of weights from a grid, after a Hadamard rotation of the inputs, in FLUTE's packed order.

    weight   int16 [N*b/16, K], b = 2, 3 or 4 bits a weight, in the tile order of a FLUTE kernel (`flute_order`)
    scales   dt [N, K/G]
    tables   dt [2**b], only used where p = 1
    tables2  dt [2**b, 2**b, 2] (stored viewed as float16): values of two neighbouring inputs by their two codes

Which tile order: `tune_metadata[module].template_id` of the config. Dequantize: dt(table * scale), then the rotation is
taken back; transformers rotates the inputs with blocks of `hadamard_size` instead. Quantize: `jq.algorithms.higgs`.

Source: transformers 5.23.0 integrations/higgs.py; flute-kernel 0.4.2, flute/utils.py (`pack`) and the templates that
it ships. The library needs CUDA, no file of it was at hand; its
packing functions run on a CPU. Only templates of that version are known.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jq.algorithms import blocks
from jq.algorithms import higgs as algorithm
from jq.errors import FormatError, UnsupportedError
from jq.formats.base import Context, Format, Parts, expect_dtype, expect_shape, take, warn_unknown
from jq.qtensor import Source
from jq.qtensor.rotated import Rotated
from jq.qtensor.vector_codebook import VectorCodebook

SUFFIXES = ("weight", "scales", "tables", "tables2")
FLOATS = (np.float16, "bfloat16")
KNOWN = ("quant_method", "bits", "p", "hadamard_size", "group_size", "tune_metadata", "modules_to_not_convert")
# 3 bits: which of the 16 columns of a tile follow each other in the 96 bits of three words.
ORDER3 = (0, 3, 6, 9, 12, 1, 4, 7, 10, 13, 2, 5, 8, 11, 14, 15)


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of the model; `templates` by module."""

    bits: int
    group_size: int
    hadamard_size: int
    templates: Mapping[str, Any]


def parse(config: Mapping[str, Any], context: Context) -> Options:
    """Reads a quantization_config.

    Raises:
      FormatError: values that HiggsConfig refuses too.
    """
    warn_unknown(config, KNOWN, context.label)
    values = {}
    for key, default, allowed in (
        ("bits", 4, (2, 3, 4)),
        ("p", 2, (1, 2)),
        ("group_size", 256, (64, 128, 256)),
        ("hadamard_size", 512, tuple(1 << i for i in range(5, 16))),
    ):
        values[key] = config.get(key, default)
        if type(values[key]) is not int or values[key] not in allowed:
            raise FormatError(
                f"{context.label}: quantization_config.{key} is {values[key]!r}, expected one of {allowed}"
            )
    table = config.get("tune_metadata") or {}
    if not isinstance(table, Mapping):
        raise FormatError(f"{context.label}: quantization_config.tune_metadata must map modules to settings")
    templates = {k: v.get("template_id") for k, v in table.items() if isinstance(v, Mapping)}
    return Options(values["bits"], values["group_size"], values["hadamard_size"], templates)


def tile_of(bits: int, template: Any, prefix: str) -> int:
    """TileP of a FLUTE template (flute-kernel 0.4.2): each family begins with a third of its templates at 64."""
    family, wide, count = (48, 16, 144) if bits == 4 else (12, 4, 36)
    if type(template) is not int or not 0 <= template < count:
        raise FormatError(
            f"{prefix}: quantization_config.tune_metadata gives template_id {template!r}, expected 0..{count - 1}; "
            "without it the packed order is not known"
        )
    tile = 64 if template % family < wide else 32
    if bits == 3 and tile != 32:
        raise UnsupportedError(f"{prefix}: FLUTE packs 3 bits only with tiles of 32, template {template} has 64")
    return tile


def flute_order(codes: np.ndarray, bits: int, tile: int) -> np.ndarray:
    """Codes [K, N] -> one code per field of FLUTE's words, [K, N] in the order in which fields are packed.

    Rows 2i and 2i + 1 swap places field by field, and columns `tile` apart become neighbours.
    """
    k, n = codes.shape
    per = {2: 8, 4: 4, 3: 16}[bits]
    chunks = codes.reshape(k // 2, 2, n // (tile * per), per, tile).swapaxes(-1, -2)  # [K/2, 2, chunks, tile, per]
    columns = np.array(ORDER3) if bits == 3 else np.arange(per)
    pairs = chunks[:, ::-1][..., columns]  # odd row first
    fields = np.moveaxis(pairs, 1, -1).reshape(k // 2, -1, tile, 2 * per)  # column by column, odd row then even
    if bits == 3:
        return fields.reshape(k // 2, -1)
    halves = fields.reshape(*fields.shape[:-1], 2, per)
    return np.moveaxis(halves, -2, 1).reshape(k, n)


def pack(codes: np.ndarray, bits: int, tile: int) -> np.ndarray:
    """Codes [K, N] -> int16 [N*b/16, K] as FLUTE stores them."""
    k, n = codes.shape
    fields = flute_order(codes, bits, tile).astype(np.uint8)
    if bits != 3:
        per = 16 // bits
        shifts = (np.arange(per) * bits).astype(np.uint16)
        words = np.bitwise_or.reduce(fields.reshape(k, n // per, per).astype(np.uint16) << shifts, axis=-1)
        return np.ascontiguousarray(words.T).view(np.int16)
    stream = ((fields[..., None] >> np.arange(3, dtype=np.uint8)) & 1).reshape(k // 2, n // 512, 32, 96)
    words = np.packbits(stream[..., BITS3], axis=-1, bitorder="little").view(np.uint16)  # [K/2, n/512, 32, 6]
    by_row = words.reshape(*words.shape[:-1], 3, 2)  # word w of row j at [..., w, j]
    first = np.moveaxis(by_row[..., 0, :], -1, 1).reshape(k, -1)
    rest = by_row[..., 1:, :].transpose(0, 4, 1, 3, 2).reshape(k, -1)  # [K/2, row, chunk, word, tile]
    return np.ascontiguousarray(np.concatenate([first, rest], axis=1).T).view(np.int16)


def _bits3() -> np.ndarray:
    """Source bit of each of the 96 bits of six words, word by word (w, row): see `_pack_3bit` of flute/utils.py."""
    source = np.zeros((3, 2, 16), np.int64)
    for w in range(3):
        source[w, 0] = np.arange(16) + 30 * w
        source[w, 1, :14] = np.arange(14) + 30 * w + 16
        source[w, 1, 14:] = np.arange(2) + 90 + 2 * w
    return source.reshape(-1)


BITS3 = _bits3()


def unpack(words: np.ndarray, bits: int, tile: int) -> np.ndarray:
    """Inverse of `pack`: int16 [N*b/16, K] -> codes uint8 [K, N]."""
    k = words.shape[1]
    n = words.shape[0] * 16 // bits
    unsigned = np.ascontiguousarray(words.T).view(np.uint16)
    if bits != 3:
        shifts = (np.arange(16 // bits) * bits).astype(np.uint16)
        fields: np.ndarray = ((unsigned[..., None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8).reshape(k, n)
    else:
        first, rest = unsigned[:, : n // 16], unsigned[:, n // 16 :]
        by_row = np.empty((k // 2, n // 512, 32, 3, 2), np.uint16)
        by_row[..., 0, :] = np.moveaxis(first.reshape(k // 2, 2, n // 512, 32), 1, -1)
        by_row[..., 1:, :] = rest.reshape(k // 2, 2, n // 512, 2, 32).transpose(0, 2, 4, 3, 1)
        raw = np.unpackbits(by_row.reshape(*by_row.shape[:3], 6).view(np.uint8), axis=-1, bitorder="little")
        stream = np.empty_like(raw)
        stream[..., BITS3] = raw
        triples = stream.reshape(k // 2, -1, 3)
        fields = triples[..., 0] | triples[..., 1] << 1 | triples[..., 2] << 2
    codes: np.ndarray = np.empty(k * n, np.uint8)
    places = flute_order(np.arange(k * n).reshape(k, n), bits, tile)
    codes[places.reshape(-1)] = fields.reshape(-1)
    return codes.reshape(k, n)


def load(prefix: str, parts: Parts, options: Options, context: Context) -> Rotated:
    """One module's tensors as a rotated `VectorCodebook` of pairs.

    Raises:
      FormatError: missing tensors or template, shapes or dtypes that disagree with the config.
    """
    o = options
    words, scales = take(parts, "weight", prefix), take(parts, "scales", prefix)
    tables2 = take(parts, "tables2", prefix)
    tables = take(parts, "tables", prefix)
    expect_dtype(words, (np.int16,), f"{prefix}.weight")
    expect_dtype(scales, FLOATS, f"{prefix}.scales")
    expect_dtype(tables, (scales.dtype,), f"{prefix}.tables")
    expect_dtype(tables2, (np.float16, scales.dtype), f"{prefix}.tables2")
    size = 1 << o.bits
    expect_shape(tables, (size,), f"{prefix}.tables", f"{o.bits} bits")
    expect_shape(tables2, (size, size, 2), f"{prefix}.tables2", f"pairs of {o.bits}-bit codes")
    tile = tile_of(o.bits, o.templates.get(prefix), prefix)
    per = {2: 8, 4: 4, 3: 16}[o.bits]
    if words.ndim != 2 or words.shape[0] * 16 % o.bits or words.shape[1] % 2:
        raise FormatError(f"{prefix}.weight: found shape {tuple(words.shape)}, expected (N * {o.bits} / 16, K)")
    n, k = words.shape[0] * 16 // o.bits, words.shape[1]
    if n < 1 or k < 1 or n % (tile * per) or k % o.group_size:
        raise FormatError(
            f"{prefix}.weight: a weight of ({n}, {k}) is not tiled by {tile * per} outputs and groups of {o.group_size}"
        )
    expect_shape(scales, (n, k // o.group_size), f"{prefix}.scales", f"groups of {o.group_size} of ({n}, {k})")
    codes = unpack(words, o.bits, tile).T.reshape(n, k // 2, 2).astype(np.int32)
    book = np.ascontiguousarray(tables2).view(scales.dtype).reshape(1, 1, size * size, 1, 2)
    base = VectorCodebook.make(
        ((codes[..., 0] << o.bits) | codes[..., 1])[..., None],
        book,
        code_bits=2 * o.bits,
        name=prefix,
        scales=scales,
        formula="gather",
    )
    pairs = (("bits", o.bits), ("tile", tile), ("tables2_dtype", str(tables2.dtype)))
    made = Rotated(
        base,
        extras={"tables": tables},
        block=min(o.hadamard_size, k & -k),
        dtype=str(scales.dtype),
        source=Source("higgs", pairs),
    )
    if k % o.hadamard_size:
        raise FormatError(f"{prefix}.weight: {k} inputs are no multiple of hadamard_size {o.hadamard_size}")
    made.check(prefix)
    return made


def dump(q: Rotated) -> Parts:
    """Stored tensors of a module."""
    assert q.source is not None
    bits, base = q.source.get("bits"), q.base
    pairs = np.asarray(base.unpack())[..., 0]
    codes = np.stack([pairs >> bits, pairs & ((1 << bits) - 1)], axis=-1).reshape(pairs.shape[0], -1)
    book = np.ascontiguousarray(np.asarray(base.codebooks)).reshape(1 << bits, 1 << bits, 2)
    return {
        "weight": pack(np.ascontiguousarray(codes.T), bits, q.source.get("tile")),
        "scales": np.asarray(base.scales),
        "tables": np.asarray(q.extras["tables"]),
        "tables2": book.view(np.dtype(q.source.get("tables2_dtype"))),
    }


@dataclasses.dataclass(frozen=True)
class HIGGS:
    """HIGGS without data: the nearest point of a grid for each p numbers of the rotated weight.

    FLUTE chooses a packing by timing its kernels; here `template_id` names it (4 bits: template % 48 < 16 packs tiles of
    64 outputs, else of 32; other widths: template % 12 < 4). transformers packs anew where the GPU differs.

    Fields:
      bits: 2, 3 or 4 bits a weight.
      p: numbers of a grid point, 1 or 2.
      group_size: inputs for each stored scale, 64, 128 or 256; at most hadamard_size.
      hadamard_size: inputs that are rotated together; must divide in_features.
      template_id, num_sms: the kernel's choice that tune_metadata records.
    """

    bits: int = 4
    p: int = 2
    group_size: int = 256
    hadamard_size: int = 512
    template_id: int = 16
    num_sms: int = 132
    format = "higgs"

    def quantize(self, w: Any, name: str = "weight") -> Rotated:
        """w: float16 or bfloat16 [N, K] (float32 is stored as float16) -> codes of grid points and scales.

        Raises:
          FormatError: an option or a size that the library does not have.
        """
        options = parse(self._settings(), Context(label=name))
        w = blocks.weight(w, name)
        dtype = np.dtype(np.float16) if w.dtype == np.float32 else w.dtype
        if w.shape[1] % self.hadamard_size or self.hadamard_size % self.group_size:
            raise FormatError(
                f"{name}: found shape {w.shape}; HIGGS needs in_features of whole blocks of hadamard_size "
                f"{self.hadamard_size}, and blocks of whole groups of {self.group_size}"
            )
        tile = tile_of(self.bits, self.template_id, name)
        if w.shape[0] % (tile * {2: 8, 4: 4, 3: 16}[self.bits]):
            raise FormatError(f"{name}: {w.shape[0]} outputs do not fill FLUTE's tiles for template {self.template_id}")
        points, norms = algorithm.quantize(w, self.bits, self.p, self.hadamard_size)
        grid, size = algorithm.grid(self.p, self.bits), 1 << self.bits
        codes = points
        if self.p == 2:
            codes = np.stack([points >> self.bits, points & (size - 1)], axis=-1).reshape(w.shape)
            pairs = grid.reshape(size, size, 2)
            single = np.arange(size)
        else:
            single = grid[:, 0]
            pairs = np.stack(np.meshgrid(single, single, indexing="ij"), axis=-1)
        parts = {
            "weight": pack(np.ascontiguousarray(codes.T.astype(np.uint8)), self.bits, tile),
            "scales": np.repeat(norms.astype(dtype), self.hadamard_size // self.group_size, axis=1),
            "tables": single.astype(dtype),
            "tables2": np.ascontiguousarray(pairs.astype(dtype)).view(np.float16),
        }
        templates = {name: self.template_id}
        return load(name, parts, dataclasses.replace(options, templates=templates), Context(label=name))

    def _settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "p": self.p, "group_size": self.group_size, "hadamard_size": self.hadamard_size}

    def config(self, skip: list[str] | None = None) -> dict[str, Any]:
        """The quantization_config, without the tune_metadata of modules (`refine_config`)."""
        return {
            "quant_method": "higgs",
            **self._settings(),
            "modules_to_not_convert": list(skip) if skip else None,
            "tune_metadata": {},
        }

    def refine_config(
        self, config: dict[str, Any], quantized: list[str], skip: list[str], tensors: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Adds what FLUTE's TuneMetaData records of each module."""
        common = {"M": 1, "num_bits": self.bits, "group_size": self.group_size, "num_sms": self.num_sms}
        table = {}
        for name in quantized:
            q = tensors[f"{name}.weight"]
            sizes = {"N": q.shape[0], "K": q.shape[1], "dtype": f"torch.{q.dtype}"}
            table[name] = {**common, **sizes, "device": "cuda:0", "template_id": self.template_id}
        return {**config, "tune_metadata": table}


FORMAT = Format(
    name="higgs",
    methods=("higgs",),
    title="HIGGS: pairs of weights from a grid, Hadamard rotation, FLUTE's order",
    parse=parse,
    markers=("tables2",),
    suffixes=SUFFIXES,
    load=load,
    dump=dump,
    methods_table={"HIGGS": HIGGS},
    evidence="library",
)
