"""The page of `python -m launch design`: loss over memory for each number of experts, and the best designs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from launch import pictures
from launch.design import COARSE_EXPERTS, Budget, Design, best_of, command_of, designs, experts_of
from launch.scaling_law import Law, expansion

_BEYOND = 4  # times the budget that the curves go on


def page(law: Law, budget: Budget, vocab_size: int, found: Sequence[Design]) -> str:
    """HTML that holds everything itself; `found` are the best designs of each number of experts."""
    best = best_of(law, found)
    beyond = budget._replace(memory=_BEYOND * budget.memory, active=_BEYOND * budget.active)
    lines = {}
    for coarse in COARSE_EXPERTS:
        curve = [(d.bytes, d.loss) for d in designs(law, beyond, coarse, vocab_size, vary_depth=False)]
        if len(curve) > 1:
            lines[f"E {coarse}"] = curve
    figure = pictures.loss_over_memory(lines, budget.memory, (best.bytes, best.loss)) if lines else ""
    rows = "".join(_row(law, d, d is best) for d in found)
    heads = "".join(f"<th>{name}</th>" for name in ("E", "layers", "d_model", "experts", "active B", "GB", "loss"))
    given = f"{budget.memory / 1e9:g} GB at {budget.context} tokens, {budget.active / 1e9:g} B active parameters"
    return f"""<!doctype html><html lang=en><meta charset=utf-8>
<meta name=viewport content="width=device-width,initial-scale=1"><title>A model for {given}</title>
<style>{pictures.STYLE}</style>
<body><main><header><h1>A model for {given}</h1>
<p>{best.tokens / 1e9:.4g} B tokens of training. The red line is the memory, the ring the model of least loss.
Along a curve the family grows in width and depth; at one size a darker curve has more experts and fewer active
parameters.</p>
</header><section><figure>{figure}</figure></section>
<section class=wide><table><tr>{heads}</tr>{rows}</table>
<p>* outside of the models that the law comes from: an extrapolation.</p></section>
<section><p><code>{escape(command_of(best))}</code></p></section>
</main></body></html>
"""


def _row(law: Law, d: Design, best: bool) -> str:
    far = "" if law.covers(d.active, d.tokens, expansion(d.model)) else "*"
    values = (
        f"{expansion(d.model):.0f}", d.model.num_layers, d.model.d_model, experts_of(d.model),
        f"{d.active / 1e9:.3f}", f"{d.bytes / 1e9:.2f}", f"{d.loss:.4f}{far}",
    )  # fmt: skip
    return f"<tr{' class=good' if best else ''}>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>"
