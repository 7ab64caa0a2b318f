"""How each runtime here comes by the kernel; files without its ops run as before.

Python's Interpreter takes it as a delegate, CompiledModel finds it as an accelerator in its environment's folder,
and LiteRT-LM's engine takes it from the variable that its library exports for an accelerator that is linked in. No
function imports another runtime than its own, so that an engine's process holds that engine alone.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ai_edge_litert import schema_py_generated as schema

from conversion.kernel import NAMES
from conversion.kernel.build import library
from moe_jax.errors import UserError

if TYPE_CHECKING:
    from ai_edge_litert.environment import Environment


def needed(tflite: Any) -> bool:
    """Whether a .tflite file, given as its bytes or a memory map, has ops of the kernel."""
    model: Any = schema.Model.GetRootAs(tflite, 0)
    codes = (model.OperatorCodes(i).CustomCode() or b"" for i in range(model.OperatorCodesLength()))
    return any(code.decode() in NAMES for code in codes)


def delegate() -> Any:
    """For Interpreter(..., experimental_delegates=[delegate()]): one for each interpreter."""
    from ai_edge_litert.interpreter import load_delegate

    return load_delegate(str(library()))


def delegates(tflite: Any) -> list[Any]:
    """`delegate` for what runs this file, or none where it does not need the kernel."""
    return [delegate()] if needed(tflite) else []


def environment() -> Environment:
    """For CompiledModel.from_file(..., environment=environment()); takes the place of a GPU accelerator."""
    from ai_edge_litert.environment import Environment, EnvironmentOptions

    return Environment.create(options=EnvironmentOptions(runtime_path=str(library().parent)))


@functools.cache
def in_engine() -> None:
    """For LiteRT-LM engines that this process makes from now on; takes the place of their GPU accelerator."""
    import litert_lm

    kernel = ctypes.CDLL(str(library()))
    engine = ctypes.CDLL(str(Path(litert_lm.__file__).with_name("liblitert-lm.so")))
    try:
        door = ctypes.c_void_p.in_dll(engine, "LiteRtStaticLinkedAcceleratorGpuDef")
    except ValueError:
        raise UserError(
            "this litert-lm-api has no place for an accelerator; install the version in requirements/convert.txt"
        ) from None
    door.value = ctypes.addressof(ctypes.c_char.in_dll(kernel, "LiteRtAcceleratorImpl"))
