"""The graph around an attention as an inline SVG: keys on the left, the query in the middle, values on the right."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kvq_compile.lowering.sites import Flow, Step

BOX, GAP, MARGIN = 116, 18, 12  # widths: of a box, between lanes, at the sides
HEIGHT, PITCH = 38, 58  # of a box; from one row to the next
LANES = ("keys", "query", "values")
WIDTH = 2 * MARGIN + 3 * BOX + 2 * GAP
SHORT = {
    "scaled_dot_product_attention": "scaled dot product attention",
    "kvq.attend": "kvq.attend: reads packed codes",
}
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}


@dataclass(frozen=True)
class Box:
    """A step and its place."""

    step: Step
    row: int

    @property
    def is_wide(self) -> bool:
        """Whether it spans all lanes, as the attention does."""
        return self.step.kind == "attention"

    @property
    def left(self) -> int:
        """Its left edge."""
        return MARGIN if self.is_wide else MARGIN + LANES.index(self.step.lane) * (BOX + GAP)

    @property
    def width(self) -> int:
        """Its width."""
        return WIDTH - 2 * MARGIN if self.is_wide else BOX

    @property
    def top(self) -> int:
        """Its upper edge."""
        return 6 + self.row * PITCH


def picture(flow: Flow, label: str) -> str:
    """Return an SVG of a flow; ``label`` is what it shows."""
    boxes = place(flow)
    named = {box.step.name: box for box in boxes}
    edges = [
        _edge(named[name], box, boxes)
        for box in boxes
        for name in box.step.inputs
        if name in named and named[name].row < box.row
    ]
    height = max((box.top for box in boxes), default=0) + HEIGHT + 6
    return (
        f'<svg class="flow" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_text(label)}">'
        f"{''.join(edges)}{''.join(map(_box, boxes))}</svg>"
    )


def place(flow: Flow) -> list[Box]:
    """Return the steps in rows: each below its inputs, none beside another one of its lane."""
    rows: dict[str, int] = {}
    ends = dict.fromkeys(LANES, -1)
    boxes: list[Box] = []
    attention = -1
    ordered = [step for step in flow if step.kind != "write"]
    for step in [*ordered, *(step for step in flow if step.kind == "write")]:
        lanes = LANES if step.kind == "attention" else (step.lane,)
        above = [rows[name] for name in step.inputs if name in rows]
        above += [ends[lane] for lane in lanes] + ([attention] if step.kind == "write" else [])
        row = 1 + max(above)
        rows[step.name] = row
        ends.update(dict.fromkeys(lanes, row))
        attention = row if step.kind == "attention" else attention
        boxes.append(Box(step, row))
    return boxes


def _edge(source: Box, target: Box, boxes: Sequence[Box]) -> str:
    """Return the line from a box down to another one: straight, or beside the boxes that stand between."""
    x, start, end = source.left + source.width // 2, source.top + HEIGHT, target.top
    covers = [box for box in boxes if source.row < box.row < target.row and _is_over(box, x)]
    inside = target.left < x < target.left + target.width
    if not covers and inside:
        return f'<path class="edge" d="M{x} {start}V{end - 5}"/>{_head(x, end)}'
    if not covers:
        to = target.left + target.width // 2
        middle = end - 12
        return f'<path class="edge" d="M{x} {start}V{middle}H{to}V{end - 5}"/>{_head(to, end)}'
    right = source.step.lane == "values"
    beside = source.left + source.width + MARGIN // 2 if right else source.left - MARGIN // 2
    middle = source.top + HEIGHT // 2
    begin = source.left + source.width if right else source.left
    if target.is_wide:
        into = target.left + target.width - 8 if right else max(beside, target.left + 8)
        return (
            f'<path class="edge" d="M{begin} {middle}H{beside}V{end - 12}H{into}V{end - 5}"/>'
            f"{_head(into, end)}"
        )
    edge = target.left + target.width if right else target.left
    level = target.top + HEIGHT // 2
    return f'<path class="edge" d="M{begin} {middle}H{beside}V{level}H{edge}"/>'


def _is_over(box: Box, x: int) -> bool:
    return box.left <= x <= box.left + box.width


def _head(x: int, y: int) -> str:
    return f'<path class="head" d="M{x - 4} {y - 6}L{x} {y}L{x + 4} {y - 6}Z"/>'


def _box(box: Box) -> str:
    step, room = box.step, 52 if box.is_wide else 19
    middle = box.left + box.width / 2
    title = html.escape(
        f"{step.label or step.name}: {step.does}, {step.about}".removesuffix(", "), quote=True
    )
    does = _cut(SHORT.get(step.does, step.does), 46 if box.is_wide else 15)
    about = shortened(step.about)
    if len(about) > room:  # the sizes tell more than the dtype
        about = about[about.find("[") :] if "[" in about else about
    about = _cut(about, room)
    first = box.top + (16 if about else 23)
    lines = f'<text class="does" x="{middle:g}" y="{first}">{_text(does)}</text>'
    if about:
        lines += f'<text class="about" x="{middle:g}" y="{box.top + 30}">{_text(about)}</text>'
    return (
        f'<g class="box {step.kind}"><title>{title}</title><rect x="{box.left}" y="{box.top}" '
        f'width="{box.width}" height="{HEIGHT}" rx="7"/>{lines}</g>'
    )


def shortened(about: str) -> str:
    """Return dtype and shape, or what a packed cache holds, in fewer letters."""
    for name, short in DTYPES.items():
        about = re.sub(rf"^{name} \[", f"{short} [", about)
    packed = not re.match(r"\w+ \[", about)
    about = re.split(r", exact| without| \[", about)[0] if packed else about
    return about.replace(" + ", "+")


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _text(text: str) -> str:
    return html.escape(text, quote=True)
