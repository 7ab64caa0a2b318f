"""HBM: what a scheduled instruction reads, writes and holds there, and what libtpu says when it is too little."""

from __future__ import annotations

import re
from typing import NamedTuple

from launch.hlo_text import Array, Computation, Instruction, Module, root, unescaped

# No bytes move: names for parts of other values, and control flow, whose body is counted.
_VIEWS = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "opt-barrier", "async-update",
)  # fmt: skip


class Buffer(NamedTuple):
    """An array in HBM: bytes with padding, shape, the jax name of what makes it (an argument's is its path)."""

    bytes: int
    shape: str
    op_name: str


class OutOfMemory(NamedTuple):
    """What libtpu says of a program that does not fit: bytes, and its largest allocations where it lists them."""

    needed: int
    available: int
    largest: tuple[Buffer, ...]


def traffic(instruction: Instruction, inside: Computation, module: Module) -> int:
    """Bytes that one run of a scheduled instruction reads from and writes to HBM."""
    opcode = instruction.opcode
    operands = [a for name in instruction.operands for a in inside[name].out]
    if opcode in _VIEWS or opcode.endswith("-done"):
        return 0
    if opcode in ("copy-start", "slice-start"):
        part = instruction.out[-2] if opcode == "slice-start" else instruction.out[0]
        return part.padded_bytes * (operands[0].in_hbm + part.in_hbm)
    if opcode == "dynamic-slice":
        return instruction.out[0].padded_bytes * (operands[0].in_hbm + instruction.out[0].in_hbm)
    if opcode == "dynamic-update-slice":
        return operands[1].padded_bytes * (operands[1].in_hbm + operands[0].in_hbm)
    if opcode == "gather":
        return 2 * _held(instruction.out) + _held(operands[1:])
    if opcode == "custom-call" and '"tpu_custom_call"' not in instruction.attributes:
        return 0  # AllocateBuffer, ConcatBitcast and the like
    if opcode == "custom-call" and "output_to_operand_aliasing" in instruction.attributes:
        return _in_place(instruction, inside)
    if opcode == "fusion":
        fused = module.called(instruction)
        given = [inside[name].out for name in instruction.operands]
        read = sum(_held(shapes) and min(_held(shapes), _read(i, fused, module)) for i, shapes in enumerate(given))
        written = _written(root(fused), fused, module)
        return read + sum(n for n, a in zip(written, instruction.out, strict=False) if a.in_hbm)
    if opcode == "call-start":
        called = module.called(instruction)
        return sum(traffic(inner, called, module) for inner in called.values())
    if opcode.endswith("-start"):
        return _held(instruction.out)  # a tuple of the operand and the result
    return _held(operands) + _held(instruction.out)


def _in_place(kernel: Instruction, inside: Computation) -> int:
    """Bytes of a kernel that writes into operands: of these what a CostEstimate leaves for them, if it has one."""
    pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}", kernel.attribute(r"output_to_operand_aliasing=\{(.*?\))\}"))
    outputs, operands = ({int(pair[i] or 0) for pair in pairs} for i in (0, 1))
    given = [inside[name].out for name in kernel.operands]
    others = [a for i, arrays in enumerate(given) if i not in operands for a in arrays]
    others += [a for i, a in enumerate(kernel.out) if i not in outputs]
    touched = 2 * _held([kernel.out[i] for i in outputs])
    if estimate := kernel.attribute(r'"bytes_accessed":"(\d+)"'):
        touched = min(touched, max(0, int(estimate) - sum(a.bytes for a in others)))
    return _held(others) + touched


def _held(shapes: tuple[Array, ...] | list[Array]) -> int:
    return sum(a.padded_bytes for a in shapes if a.in_hbm)


def _read(number: int, fused: Computation, module: Module) -> int:
    """Bytes that a fusion reads of its operand `number`: only the slices where it takes slices."""
    name = next(i.name for i in fused.values() if i.opcode == "parameter" and i.literal == str(number))
    return _read_by_users(name, fused, module)


def _read_by_users(name: str, fused: Computation, module: Module) -> int:
    total = 0
    for user in fused.values():
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += user.out[0].padded_bytes
        elif _is_view(user):
            total += _read_by_users(user.name, fused, module)
        elif user.opcode == "fusion":
            total += _read(user.operands.index(name), module.called(user), module)
        elif (user.opcode == "dynamic-update-slice" and user.operands[0] == name) or user.opcode == "tuple":
            continue  # written in place, or handed on
        elif "chain_id=" in user.attributes or "AsyncCollective" in user.attributes:
            continue  # counted where the collective starts
        else:
            return sum(a.padded_bytes for a in fused[name].out)
    return total


def _is_view(inner: Instruction) -> bool:
    """Whether an instruction in a fusion stands for its operand; on tpu7x copies to other tiles do, if aliased."""
    aliased = "output_to_operand_aliasing={{}: (0, {})}" in inner.attributes and len(inner.operands) == 1
    return inner.opcode == "bitcast" or (inner.opcode == "fusion" and aliased)


def _written(result: Instruction, fused: Computation, module: Module) -> list[int]:
    """Bytes that a fusion writes of each of its results: only the slice where it updates one in place."""
    if result.opcode == "tuple":
        return [n for name in result.operands for n in _written(fused[name], fused, module)]
    if result.opcode == "dynamic-update-slice":
        return [fused[result.operands[1]].out[0].padded_bytes]
    if _is_view(result):
        return _written(fused[result.operands[0]], fused, module)
    if result.opcode == "fusion":
        inner = module.called(result)
        return _written(root(inner), inner, module)
    if '"AsyncCollectiveStart"' in result.attributes:
        # Its results are operand and gathered array; the operand is read here, and neither again further down.
        return [a.padded_bytes if i < 2 else 0 for i, a in enumerate(result.out)]
    if result.opcode == "parameter" or "chain_id=" in result.attributes or "AsyncCollective" in result.attributes:
        return [0] * len(result.out)
    return [a.padded_bytes for a in result.out]


def buffers(instruction: Instruction, module: Module) -> list[Buffer]:
    """The arrays in HBM that an instruction makes: an argument, or a result that is not made in place."""
    computation = module.computations[module.entry]
    argument = instruction.opcode == "parameter" and computation.get(instruction.name) is instruction
    if (not argument and instruction.opcode in _VIEWS) or instruction.opcode.endswith("-start"):
        return []
    if instruction.opcode == "dynamic-update-slice":
        return []
    sizes = [a.padded_bytes for a in instruction.out]
    if instruction.opcode == "fusion":
        fused = module.called(instruction)
        written = _written(root(fused), fused, module)
        sizes = [size if wrote == size else 0 for size, wrote in zip(sizes, written, strict=False)]
    shapes = [f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in instruction.out]
    made = zip(instruction.out, sizes, shapes, strict=False)
    return [Buffer(size, shape, instruction.op_name) for a, size, shape in made if a.in_hbm and size]


_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def read_out_of_memory(message: str) -> OutOfMemory | None:
    """Read the message of a RESOURCE_EXHAUSTED error of the compiler; None if it is about something else than HBM.

    libtpu has two: a short one with totals only ("... required for HLO temporaries (20.00G) exceeds available HBM
    (15.75G)"), and a long one ("Used 21.95G of 15.48G hbm") that goes on with the largest allocations.
    """
    size = r"([\d.]+)([BKMGT])"
    totals = re.search(rf"\({size}\) exceeds available HBM \({size}\)", message)
    totals = totals or re.search(rf"Used {size} of {size} hbm", message)
    if not totals:
        return None
    needed, available = (round(float(n) * _UNITS[u]) for n, u in (totals.groups()[:2], totals.groups()[2:]))
    largest = []
    for entry in re.split(r"\n\s*\d+\. (?=Size: )", message)[1:]:
        held = re.match(rf"Size: {size}", entry)
        shape = re.search(r"Shape: (\w+\[[\d,]*\])", entry)
        name = re.search(r'op_name="([^"]*)"', entry) or re.search(r"XLA label: %?(\S+)", entry)
        if held:
            bytes_held = round(float(held[1]) * _UNITS[held[2]])
            largest.append(Buffer(bytes_held, shape[1] if shape else "", unescaped(name[1]) if name else ""))
    return OutOfMemory(needed, available, tuple(largest))
