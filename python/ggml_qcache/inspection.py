"""What ``qcache inspect`` tells of a file: facts as a dictionary, and the Lazy Blocks drawn layer by layer."""

from __future__ import annotations

import math
import os
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, LlamaFileType
from ggml_qcache_convert.lazy_layers import NO_ATTENTION, dropped_of, lazy_of, leaders_of
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import ModelError
from .gguf_file import read_gguf, value
from .mmproj import mmproj_width, projector, read_anyres


def inspect_file(path: str, type_k: str = "f16", type_v: str = "f16") -> dict[str, Any]:
    """Reads the facts of a GGUF file.

    Args:
        path: A text model or an mmproj file.
        type_k: Type of the K cache to reckon with.
        type_v: Type of the V cache.

    Returns:
        What ``qcache inspect --json`` prints. Sizes in bytes, counted from 0.

    Raises:
        FileError, ModelError: Missing or damaged, neither kind of file, or lazy layers that break the rules.
    """
    reader = read_gguf(path)
    facts = {
        "file": os.fspath(path),
        "architecture": value(reader, "general.architecture"),
        "name": value(reader, "general.name"),
        "n_bytes": os.path.getsize(path),
        "n_params": sum(int(tensor.n_elements) for tensor in reader.tensors),
        "weight_types": _weight_types(reader),
        "file_type": _file_type(reader),
    }
    if facts["architecture"] == "clip":
        return {"kind": "mmproj", **facts, **_mmproj_facts(reader, path)}
    return {"kind": "model", **facts, **_model_facts(reader, path, facts["architecture"], type_k, type_v)}


def draw(facts: dict[str, Any], console: Console) -> None:
    """Prints the facts for people."""
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        if isinstance(fact, dict):
            fact = ", ".join(f"{key} {count}" for key, count in fact.items())
        if name not in ("lazy", "kv_bytes_per_1000_tokens") and fact is not None:
            table.add_row(Text(name, style="dim"), Text(_human(name, fact)))
    console.print(table)
    if facts["kind"] == "model":
        console.print()
        console.print(Text(_layer_counts(facts["lazy"]), style="italic"))
        console.print(_layer_table(facts["lazy"]))
        console.print()
        if facts["lazy"]["pair_divergence"]:
            console.print(_pair_map(facts["lazy"]["pair_divergence"], facts["n_layer"]))
        console.print(_kv_table(facts["kv_bytes_per_1000_tokens"]))


def _model_facts(reader: GGUFReader, path: str, architecture: str, type_k: str, type_v: str) -> dict[str, Any]:
    def number(key: str, default: int | None = None) -> int:
        found = value(reader, f"{architecture}.{key}", default)
        if not isinstance(found, int):
            raise ModelError(f"{path!r}: the key '{architecture}.{key}' is missing or no number ({found!r})")
        return found

    n_layer, n_embd, n_head = number("block_count"), number("embedding_length"), number("attention.head_count")
    n_head_kv = number("attention.head_count_kv", n_head)
    head_dim = number("attention.key_length", n_embd // n_head)
    mode = value(reader, "qcache.lazy.mode", "off")
    leader = value(reader, "qcache.lazy.leader", list(range(n_layer)))
    lazy_layers, dropped_layers = lazy_of(leader), dropped_of(leader)
    try:
        valid = leader == leaders_of(lazy_layers, n_layer, dropped_layers)
    except ValueError:
        valid = False
    if not valid:
        raise ModelError(f"{path!r}: 'qcache.lazy.leader' breaks the rules for {n_layer} layers: {leader}")
    calibration = {
        name: value(reader, f"qcache.{name}")
        for name in (
            "lazy.js_divergence", "calibration.output_error", "calibration.drop_error", "calibration.corrected_error",
            "calibration.pair_divergence",
        )
    }  # fmt: skip
    vocabulary = reader.get_field("tokenizer.ggml.tokens")
    return {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_ff": number("feed_forward_length"),
        "n_head": n_head,
        "n_head_kv": n_head_kv,
        "head_dim": head_dim,
        "n_vocab": None if vocabulary is None else len(vocabulary.data),
        "n_ctx_train": number("context_length"),
        "chat_template": reader.get_field("tokenizer.chat_template") is not None,
        "lazy": {
            "mode": mode,
            "leader": leader,
            "lazy_layers": lazy_layers,
            "dropped_layers": dropped_layers,
            **{name.partition(".")[2]: found for name, found in calibration.items()},
        },
        "kv_bytes_per_1000_tokens": kv_bytes_per_1000_tokens(
            n_layer, len(lazy_layers), len(dropped_layers), mode, n_head_kv, head_dim, type_k, type_v
        ),
    }


def kv_bytes_per_1000_tokens(
    n_layer: int, n_lazy: int, n_dropped: int, mode: str, n_head_kv: int, head_dim: int, type_k: str, type_v: str
) -> dict[str, Any]:
    """Bytes of K and V of 1000 tokens, whole blocks not counted.

    A full layer holds K and V of every token. A lazy layer holds V of every token, and K of text tokens in visual
    mode, of none in global mode. A dropped layer holds nothing.
    """
    k, v = (1000 * n_head_kv * _row_bytes(name, head_dim) for name in (type_k, type_v))
    full = n_layer * (k + v)
    kept = full - n_dropped * (k + v)
    text = kept - (n_lazy * k if mode == "global" else 0)
    visual = kept - (n_lazy * k if mode in ("global", "visual") else 0)
    return {"type_k": type_k, "type_v": type_v, "full": full, "text": text, "visual": visual}


def _row_bytes(type_name: str, head_dim: int) -> int:
    """Bytes of one head's K or V of a token: whole blocks of the type."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name.upper()]]
    return -(-head_dim // block) * size


def _mmproj_facts(reader: GGUFReader, path: str) -> dict[str, Any]:
    width = mmproj_width(path)
    facts = {
        "projector": projector(reader),
        "n_embd_text": width,
        "image_size": value(reader, "clip.vision.image_size"),
        "patch_size": value(reader, "clip.vision.patch_size"),
        "n_layer": value(reader, "clip.vision.block_count"),
        "n_embd": value(reader, "clip.vision.embedding_length"),
        "n_head": value(reader, "clip.vision.attention.head_count"),
    }
    if facts["projector"] == "mlp" and facts["image_size"] and facts["patch_size"]:
        n_tokens = (facts["image_size"] // facts["patch_size"]) ** 2
        anyres = read_anyres(path, width)
        if anyres is None:
            facts["visual_tokens_per_image"] = n_tokens
        else:
            most = max(height * width for height, width in anyres.pinpoints)
            facts |= {"visual_tokens_per_tile": n_tokens, "tiles_per_image_max": 1 + most // anyres.tile_size**2}
    return facts


def _weight_types(reader: GGUFReader) -> dict[str, int]:
    """Tensors by type."""
    counts: dict[str, int] = {}
    for tensor in reader.tensors:
        name = GGMLQuantizationType(tensor.tensor_type).name.lower()
        counts[name] = counts.get(name, 0) + 1
    return counts


def _file_type(reader: GGUFReader) -> str | None:
    number = value(reader, "general.file_type")
    try:
        return LlamaFileType(number).name.removeprefix("ALL_").removeprefix("MOSTLY_").lower()
    except ValueError:
        return None if number is None else str(number)


def _human(name: str, fact: Any) -> str:
    if name == "n_bytes":
        return f"{fact:,} ({_mib(fact)})"
    return f"{fact:,}" if isinstance(fact, int) and not isinstance(fact, bool) else str(fact)


def _mib(n_bytes: float) -> str:
    return f"{n_bytes / 2**20:,.2f} MiB"


def _layer_counts(lazy: dict[str, Any]) -> str:
    """How many layers are lazy, and how many dropped."""
    mode = f", {lazy['mode']} mode" if lazy["lazy_layers"] else ""
    dropped = f", {len(lazy['dropped_layers'])} without attention" if lazy["dropped_layers"] else ""
    return f"{len(lazy['lazy_layers'])} of {len(lazy['leader'])} layers lazy{mode}{dropped}"


def _layer_table(lazy: dict[str, Any]) -> Table:
    """One row a layer; a bracket joins a leader with its lazy layers, and the columns show what each keeps."""
    leader, mode = lazy["leader"], lazy["mode"]
    measured = {
        "JS divergence": (lazy["js_divergence"], ".4f"),
        "error": (lazy["output_error"], ".1e"),
        "corrected": (lazy["corrected_error"], ".1e"),
        "if dropped": (lazy["drop_error"], ".1e"),
    }
    measured = {name: found for name, found in measured.items() if found[0]}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("layer", "", "", "text", "visual", *measured):
        table.add_column(column, justify="right" if column == "layer" or column in measured else "left")
    for layer, of in enumerate(leader):
        dropped = of == NO_ATTENTION
        is_lazy = not dropped and of != layer
        # whose block goes on after this layer; a dropped one may stand inside it
        last = next((before for before in range(layer, -1, -1) if leader[before] != NO_ATTENTION), None)
        following = next((other for other in leader[layer + 1 :] if other != NO_ATTENTION), None)
        followed = last is not None and following == leader[last]
        bracket = ("│" if followed else " ") if dropped else ("├" if followed else "└") if is_lazy else ("┌" if followed else " ")
        role = "no attention" if dropped else f"lazy, Q K of {of}" if is_lazy else "leader" if followed else "full"
        style = "dim" if dropped else "cyan" if is_lazy else "bold" if followed else ""
        row = [
            str(layer),
            bracket,
            role,
            "· ·" if dropped else "· V" if is_lazy and mode == "global" else "K V",
            "· ·" if dropped else "· V" if is_lazy else "K V",
        ]
        # a full layer makes no error, and only a lazy one is corrected
        shown = {"JS divergence": True, "error": is_lazy or dropped, "corrected": is_lazy, "if dropped": True}
        row += [format(values[layer], form) if shown[name] else "" for name, (values, form) in measured.items()]
        table.add_row(*row, style=style)
    return table


def _pair_map(pair_divergence: list[float], n_layer: int) -> Text:
    """Divergence of the attention of each layer (row) from each other (column), in tenths of the most there can be."""
    text = Text("JS divergence by pair of layers, in tenths of ln 2\n")
    for row in range(n_layer):
        text.append(f"{row:4d} ", style="dim")
        for column in range(n_layer):
            share = min(1.0, pair_divergence[row * n_layer + column] / math.log(2))
            text.append(f" {min(9, int(10 * share))}", style=f"white on rgb({round(60 + 190 * share)},{round(30 + 200 * share)},{round(110 - 70 * share)})")
        text.append("\n")
    return text


def _kv_table(kv: dict[str, Any]) -> Table:
    table = Table(title=f"KV cache of 1000 tokens (K {kv['type_k']}, V {kv['type_v']})", title_justify="left", box=None)
    for column in ("", "bytes", "", "of full"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("full", "text", "visual"):
        label = "every layer full" if name == "full" else f"{name} tokens, as the file says"
        table.add_row(label, f"{kv[name]:,}", _mib(kv[name]), f"{kv[name] / kv['full']:.1%}")
    return table
