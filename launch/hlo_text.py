"""Scheduled HLO text as instructions, and the walk over it that knows how often each one runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import ceil, prod
from typing import NamedTuple

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_END = re.compile(r'\}(, execution_thread="\w+")?\s*')  # a thread's name where SparseCores run it
_HEAD = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


class Array(NamedTuple):
    """One array of a shape: `layout` is what stands in its braces, such as 1,0:T(8,128)(2,1)S(1)."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def item_bits(self) -> int:
        width = re.search(r"\d+", self.dtype)
        return int(width[0]) if width else 8 * (self.dtype == "pred")

    @property
    def bytes(self) -> int:
        """Without padding."""
        return prod(self.dims) * self.item_bits // 8

    @property
    def padded_bytes(self) -> int:
        """As laid out: the minor dimensions rounded up to the first tile."""
        order, _, rest = self.layout.partition(":")
        dims = [self.dims[int(d)] for d in reversed(order.split(","))] if order else list(self.dims)
        tile = re.match(r"T\(([\d,]+)\)", rest)
        sizes = [int(t) for t in tile[1].split(",")] if tile else []
        for i, size in enumerate(reversed(sizes[-len(dims) :] if dims else []), 1):
            dims[-i] = ceil(dims[-i] / size) * size
        return prod(dims) * self.item_bits // 8

    @property
    def in_hbm(self) -> bool:
        """False for scalars and where the layout names another memory space (VMEM, SMEM, semaphores, host)."""
        return bool(self.dims) and not re.search(r"S\([1-9]", self.layout)


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape's text, a tuple's in order."""
    return tuple(Array(t, tuple(map(int, d.split(","))) if d else (), la) for t, d, la in _ARRAY.findall(shape))


def unescaped(name: str) -> str:
    """A name of JAX's as it was before the compiler put it in quotes."""
    return name.replace("\\'", "'")


class Instruction(NamedTuple):
    """`literal` stands in the parentheses, `attributes` follow them; `cycles` is the compiler's estimate."""

    name: str
    opcode: str
    out: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool
    cycles: int

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the attributes, or nothing."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def op_name(self) -> str:
        """The jax name stack, or the instruction's own name."""
        return unescaped(self.attribute(r'op_name="([^"]*)"')) or self.name


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """Computations by name, each in schedule order; the number of devices of the program."""

    computations: dict[str, Computation]
    entry: str
    devices: int

    def called(self, instruction: Instruction, attribute: str = "") -> Computation:
        """The computation that an attribute names (empty if there is none), by default what it runs."""
        attribute = attribute or ("to_apply" if instruction.opcode in ("call", "call-start") else "calls")
        return self.computations.get(instruction.attribute(rf"\b{attribute}=%?([\w.\-]+)"), {})


def _closing(text: str, start: int) -> int:
    """Index past the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.end()
    return len(text)


def _instruction(lines: list[str]) -> Instruction | None:
    text = "".join(lines)
    head = _HEAD.match(text)
    if not head:
        return None
    shape_end = _closing(text, head.end()) if text[head.end()] == "(" else text.index(" ", head.end())
    paren = text.index("(", shape_end)
    end = _closing(text, paren)
    literal = text[paren + 1 : end - 1]
    cycles = re.search(r'estimated_cycles":"(\d+)"', lines[0])
    return Instruction(
        head[2], text[shape_end:paren].strip(), arrays(text[head.end() : shape_end]),
        tuple(re.findall(r"%([\w.\-]+)", literal)), literal, text[end:], bool(head[1]),
        int(cycles[1]) if cycles else 0,
    )  # fmt: skip


def parse(text: str) -> Module:
    """Read a module's text; ValueError if it has no ENTRY."""
    computations: dict[str, Computation] = {}
    current, entry, pending = None, "", []

    def flush() -> None:
        instruction = _instruction(pending) if pending else None
        if instruction and current is not None:
            current[instruction.name] = instruction
        pending.clear()

    for line in text.splitlines():
        header = None if line.startswith(" ") else _HEADER.match(line)
        if current is None and header:
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif current is not None and _END.fullmatch(line):
            flush()
            current = None
        elif current is not None:
            if line.startswith("  "):
                flush()
            # An instruction with a kernel's metadata goes on over lines that are not indented.
            pending.append(line)
    if not entry:
        raise ValueError("this is not an HLO module's text: it has no ENTRY computation")
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def root(computation: Computation) -> Instruction:
    """The instruction whose value the computation returns."""
    return next(i for i in computation.values() if i.root)


# ---- how often ----------------------------------------------------------------------------------


def _constant(name: str, inside: Computation, carried: Callable[[int], int | None]) -> int | None:
    """The integer that a name stands for, through copies; `carried(i)` is what a loop carries at index i."""
    found = inside.get(name)
    if found is None:
        return None
    if found.opcode == "constant" and re.fullmatch(r"-?\d+", found.literal):
        return int(found.literal)
    if found.opcode == "get-tuple-element":
        source = inside.get(found.operands[0])
        index = int(found.attribute(r"index=(\d+)"))
        if source and source.opcode == "tuple":
            return _constant(source.operands[index], inside, carried)
        return carried(index) if source and source.opcode == "parameter" else None
    if found.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
        return _constant(found.operands[0], inside, carried)
    return None


def _carried_index(name: str, inside: Computation) -> int | None:
    """The loop variable that a name in a body or condition is, through copies."""
    found = inside.get(name)
    while found and found.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        found = inside.get(found.operands[0])
    return int(found.attribute(r"index=(\d+)")) if found and found.opcode == "get-tuple-element" else None


class Trips(NamedTuple):
    """How often a loop's body runs, and the constant that its condition compares the counter with."""

    runs: int
    bound: int


def trip_count(loop: Instruction, inside: Computation, module: Module) -> Trips | None:
    """What the compiler notes as `known_trip_count`, else (bound - start) / step of the counter that the condition
    compares with a constant; None where the text does not say. An unrolled windowed einsum steps by two.
    """
    known = loop.attribute(r'known_trip_count"?:\{"n":"(\d+)"')
    if known:
        return Trips(int(known), int(known))

    def start(index: int) -> int | None:
        initial = inside.get(loop.operands[0])
        return _constant(initial.operands[index], inside, lambda _: None) if initial and initial.operands else None

    condition, body = module.called(loop, "condition"), module.called(loop, "body")
    test = root(condition)
    operands = test.operands
    if test.opcode == "fusion":
        # The operands of a fused comparison are parameters of the fusion, by number.
        fused = module.called(test)
        test = root(fused)
        operands = tuple(operands[int(fused[o].literal)] for o in test.operands if fused[o].opcode == "parameter")
    if test.opcode != "compare" or len(operands) != 2 or test.attribute(r"direction=(\w+)") != "LT":
        return None
    index, bound = _carried_index(operands[0], condition), _constant(operands[1], condition, start)
    if index is None or bound is None:
        return None
    step = 1
    update = body.get(root(body).operands[index])
    if update and update.opcode == "add":
        # The counter itself would resolve to its start.
        others = [name for name in update.operands if _carried_index(name, body) != index]
        step = next((c for name in others if (c := _constant(name, body, start))), 1)
    return Trips(max(0, ceil((bound - (start(index) or 0)) / step)), bound)


class Scheduled(NamedTuple):
    """An instruction, the computation around it, its runs in a step, the product of its loops' bounds."""

    instruction: Instruction
    inside: Computation
    times: int
    bounds: int


def schedule(module: Module, unknown: list[str] | None = None) -> Iterator[Scheduled]:
    """Every instruction that a step schedules: loops and calls followed, of a conditional the costliest branch.

    Args:
        module: the program.
        unknown: takes the names of loops whose trip count the text does not give; they count once.
    """

    def walk(inside: Computation, times: int, bounds: int) -> Iterator[Scheduled]:
        for instruction in inside.values():
            yield Scheduled(instruction, inside, times, bounds)
            if instruction.opcode == "while":
                trips = trip_count(instruction, inside, module)
                if trips is None and unknown is not None:
                    unknown.append(instruction.name)
                runs, bound = trips or (1, 1)
                yield from walk(module.called(instruction, "body"), times * runs, bounds * bound)
            elif instruction.opcode == "call":
                yield from walk(module.called(instruction), times, bounds)
            elif instruction.opcode == "conditional":
                named = instruction.attribute(r"((?:branch|true)_computations?=.*?)(?:, metadata|, backend|$)")
                branches = [
                    list(walk(module.computations[name], times, bounds))
                    for name in re.findall(r"%([\w.\-]+)", named)
                    if name in module.computations
                ]
                yield from max(branches, key=lambda branch: sum(s.times * s.instruction.cycles for s in branch))

    return walk(module.computations[module.entry], 1, 1)


def nested(instruction: Instruction, module: Module) -> Iterator[tuple[Instruction, Computation]]:
    """What a fusion, an asynchronous wrapper or a call to a SparseCore runs inside, at any depth."""
    if instruction.opcode not in ("fusion", "async-start", "call-start"):
        return
    inside = module.called(instruction)
    for inner in inside.values():
        yield inner, inside
        yield from nested(inner, module)
