"""`import` and `export-hf`: the commands for Hugging Face folders. Imports JAX only when one of them runs."""

from __future__ import annotations

from typing import Any

from conversion.command_options import add_checkpoint, options
from moe_jax.command_line import add_command, add_json

LAYOUTS = ("bf16", "int4-g32")
_ALLOW = "round INT4 experts again where groups run along the other axis; the report says what it costs"


def add_commands(commands: Any) -> None:
    """Add both to the parser's commands."""
    sub = add_command(
        commands,
        "import",
        _import,
        "make a run folder of a MobileMoE folder with config.json and safetensors, to train, quantise or export it",
        "downloads/MobileMoE-S-SFT runs/s/sft",
        "downloads/MobileMoE-S-QAT runs/s/qat --allow-requantization --json loss.json",
    )
    sub.add_argument("folder", help="what was downloaded, or written by export-hf")
    sub.add_argument("run_dir", metavar="run", help="run folder to write")
    sub.add_argument("--stage", default="", help="its name in the config (default: qat for INT4, else import)")
    sub.add_argument("--allow-requantization", action="store_true", help=_ALLOW)
    add_json(sub)

    sub = add_command(
        commands,
        "export-hf",
        _export,
        "write a run's checkpoint as a folder that transformers loads, in one of the published layouts",
        "runs/s/sft out/s-sft",
        "runs/s/qat out/s-qat --format int4-g32 --allow-requantization",
    )
    sub.add_argument("run_dir", metavar="run", help="run folder")
    sub.add_argument("folder", help="folder to write")
    sub.add_argument("--format", dest="kind", choices=LAYOUTS, default="bf16", help="default bf16")
    add_checkpoint(sub)
    sub.add_argument("--allow-requantization", action="store_true", help=_ALLOW)
    add_json(sub)


def _import(arguments: Any) -> dict[str, Any]:
    from conversion.hf_import import import_folder

    result = import_folder(**options(arguments))
    print(f"run {result['run']}: {result['parameters']:,} parameters from {result['format']}")
    if result["unread_fields"]:
        print(f"fields of config.json that nothing here reads: {', '.join(result['unread_fields'])}")
    return _shown(result, "requantization")


def _export(arguments: Any) -> dict[str, Any]:
    from conversion.hf_export import export_folder

    result = export_folder(**options(arguments))
    print(f"folder {result['folder']}: {result['bytes'] / 1e9:.3f} GB as {result['format']}")
    return _shown(result, "rounding", "requantization")


def _shown(result: dict[str, Any], *losses: str) -> dict[str, Any]:
    """The same, having told what moved, tensor by tensor and in sum."""
    for kind in losses:
        tensors = result[kind]["tensors"]
        if not tensors:
            print(f"{kind}: nothing moved")
            continue
        for name, moved in tensors.items():
            print(f"{kind}: {name} by {moved['relative_rms']:.3%} (at most {moved['max_abs']:.3g})")
        print(
            f"{kind}: {len(tensors)} tensors, all weights by {result[kind]['relative_rms']:.3%} (root mean square)"
        )
    return result
