"""Draws the pictures of docs/concepts.md: `python docs/pictures/draw.py`."""

from __future__ import annotations

from pathlib import Path

import torch

from cupy_kernels.reference import sigmoid_minus_half

HERE = Path(__file__).parent
STYLE = """<style>
  text { font: 13px system-ui, sans-serif; fill: #57606a }
  .axis { stroke: #8c959f; fill: none } .grid { stroke: #8c959f; stroke-dasharray: 2 4; opacity: .5 }
  .nearest { stroke: #8c959f; fill: none; stroke-width: 2 } .border { stroke: #2f6fdb; fill: none; stroke-width: 2.5 }
  .box { fill: none; stroke: #8c959f; stroke-width: 1.5; rx: 6 } .now { stroke: #2f6fdb; stroke-width: 2.5 }
  .blue { fill: #2f6fdb } .arrow { stroke: #8c959f; fill: none; marker-end: url(#tip) }
</style>
<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
  <path d="M0 0L8 4L0 8z" fill="#8c959f"/></marker></defs>"""


def main() -> None:
    (HERE / "border.svg").write_text(border())
    (HERE / "blocks.svg").write_text(blocks())


def picture(width: int, height: int, *parts: str) -> str:
    body = "\n".join((STYLE, *parts))
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">\n{body}\n</svg>\n'


def border() -> str:
    """Codes of 2 bits over t, with B = 1/2 and with a quadratic, steep border."""
    t = torch.linspace(0, 3, 1201)
    u = t / 3
    shift = sigmoid_minus_half(2.5 * (4.0 * u * u - 5.2 * u + 1.2))

    def staircase(of_border: torch.Tensor) -> str:
        codes = torch.ceil(t - of_border).clamp(0, 3)
        return " ".join(
            f"{60 + 150 * x:.1f},{230 - 60 * q:.1f}" for x, q in zip(t.tolist(), codes.tolist(), strict=True)
        )

    grid = [f'<path class="grid" d="M{60 + 150 * (n + 0.5)} 40V230"/>' for n in range(3)]
    ticks = [f'<text x="{60 + 150 * n}" y="252" text-anchor="middle">{n}</text>' for n in range(4)]
    codes = [f'<text x="48" y="{234 - 60 * n}" text-anchor="end">{n}</text>' for n in range(4)]
    return picture(
        560, 280, *grid, *ticks, *codes,
        '<path class="axis" d="M60 40V230H520"/>',
        '<text x="290" y="274" text-anchor="middle">activation in steps, t</text>',
        '<text x="60" y="28">code q</text>',
        f'<polyline class="nearest" points="{staircase(torch.tensor(0.5))}"/>',
        f'<polyline class="border" points="{staircase(0.5 + shift)}"/>',
    )  # fmt: skip


def blocks() -> str:
    """Four blocks of the float network over those of the quantized one, the third being learned."""
    parts = ['<text x="10" y="52">float</text>', '<text x="10" y="172">quantized</text>']
    for n in range(4):
        x = 135 + 140 * n
        now = " now" if n == 2 else ""
        parts += [
            f'<rect class="box" x="{x}" y="25" width="90" height="44"/><text x="{x + 45}" y="52" text-anchor="middle">'
            f"block {n + 1}</text>",
            f'<path class="arrow" d="M{x - 48} 47H{x - 4}"/>',
        ]
        if n < 3:
            parts += [
                f'<rect class="box{now}" x="{x}" y="145" width="90" height="44"/>'
                f'<text x="{x + 45}" y="172" text-anchor="middle">block {n + 1}</text>',
                f'<path class="arrow" d="M{x - 48} 167H{x - 4}"/>',
            ]
    parts += [
        '<path class="arrow" d="M530 47V102"/><path class="arrow" d="M505 167H530V112"/>',
        '<text x="543" y="111" class="blue">as close as possible</text>',
    ]
    return picture(680, 215, *parts)


if __name__ == "__main__":
    main()
