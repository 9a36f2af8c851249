"""Draws what the snapshot benchmark has measured, as SVG without any library.

Colours follow the viewer's preference for light or dark, on a background of their own, so that a
picture can be read wherever it is shown.
"""

import math
from html import escape

from stall_timeline import MS, SECOND

WIDTH = 960
LEFT, RIGHT = 76, 24
PANEL, GAP = 190, 74
TOP, BOTTOM = 84, 52
LOW_MS, HIGH_MS = 0.05, 100_000.0
TICKS = [(0.1, "0.1 ms"), (1, "1 ms"), (10, "10 ms"), (100, "100 ms")]
TICKS += [(1000, "1 s"), (10_000, "10 s"), (100_000, "100 s")]

STYLE = """
  svg { font: 12px system-ui, sans-serif }
  .back { fill: #fff } .text { fill: #1f2328 } .quiet { fill: #59636e }
  .grid { stroke: #d9dee3 } .axis { stroke: #59636e } .mark { stroke: #59636e }
  .ours { stroke: #0a5fd0 } .theirs { stroke: #b4400a }
  .ours-area { fill: #0a5fd0 } .theirs-area { fill: #b4400a }
  @media (prefers-color-scheme: dark) {
    .back { fill: #0d1117 } .text { fill: #e6edf3 } .quiet { fill: #9198a1 }
    .grid { stroke: #2a313a } .axis { stroke: #9198a1 } .mark { stroke: #9198a1 }
    .ours { stroke: #5aa2ff } .theirs { stroke: #ff9a5c }
    .ours-area { fill: #5aa2ff } .theirs-area { fill: #ff9a5c }
  }
"""


class Drawing:
    """An SVG that grows."""

    def __init__(self, height, title, description):
        self.height = height
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
            f' width="{WIDTH}" height="{height}" role="img" aria-labelledby="title desc">',
            f'<title id="title">{escape(title)}</title>',
            f'<desc id="desc">{escape(description)}</desc>',
            f"<style>{STYLE}</style>",
            f'<rect class="back" width="{WIDTH}" height="{height}"/>',
        ]

    def line(self, kind, x1, y1, x2, y2, more=""):
        self.parts.append(
            f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{more}/>'
        )

    def text(self, x, y, text, kind="text", anchor="start", more=""):
        self.parts.append(
            f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>'
            f"{escape(text)}</text>"
        )

    def path(self, kind, points, more=""):
        steps = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path class="{kind}" d="M{steps}"{more}/>')

    def done(self):
        return "\n".join([*self.parts, "</svg>", ""])


def scale_log(value, low, high, start, end):
    """Where a value lies between `start` and `end`, on a logarithmic axis."""
    value = min(max(value, low), high)
    part = math.log(value / low) / math.log(high / low)
    return start + part * (end - start)


def nice_step(span, count):
    """A round distance of ticks, so that about `count` fit."""
    rough = span / count
    power = 10 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)


def timeline_picture(title, subtitle, panels):
    """`panels`: (name, class, timeline, marks), one below the other on one axis of time, which has
    its zero where the snapshot was asked for. `marks`: (label, moment)."""
    height = TOP + len(panels) * (PANEL + GAP) - GAP + BOTTOM
    drawing = Drawing(height, title, subtitle)
    drawing.text(LEFT, 24, title, more=' font-size="16" font-weight="600"')
    drawing.text(LEFT, 42, subtitle, "quiet")
    zeros = [marks[0][1] for _, _, _, marks in panels]
    begin = min((max(panel[2].start, zero - 12 * SECOND) - zero) / SECOND
                for panel, zero in zip(panels, zeros))  # fmt: skip
    end = max((panel[2].end - zero) / SECOND for panel, zero in zip(panels, zeros))
    right = WIDTH - RIGHT

    def place(seconds):
        return LEFT + (seconds - begin) / (end - begin) * (right - LEFT)

    for number, (name, kind, timeline, marks) in enumerate(panels):
        top = TOP + number * (PANEL + GAP)
        bottom = top + PANEL
        for value, label in TICKS:
            y = scale_log(value, LOW_MS, HIGH_MS, bottom, top)
            drawing.line("grid", LEFT, y, right, y)
            drawing.text(LEFT - 8, y + 4, label, "quiet", "end")
        step = nice_step(end - begin, 10)
        tick = math.ceil(begin / step) * step
        while tick <= end:
            drawing.line("axis", place(tick), bottom, place(tick), bottom + 4)
            drawing.text(place(tick), bottom + 18, f"{tick:g}", "quiet", "middle")
            tick += step
        zero = marks[0][1]
        points = worst_per_pixel(timeline, zero, place, begin)
        levels = [(x, scale_log(age, LOW_MS, HIGH_MS, bottom, top)) for x, age in points]
        if levels:
            area = [(levels[0][0], bottom), *levels, (levels[-1][0], bottom)]
            drawing.path(f"{kind}-area", area, ' fill-opacity="0.22"')
            drawing.path(kind, levels, ' fill="none" stroke-width="1.2"')
        drawing.line("axis", LEFT, bottom, right, bottom)
        drawing.line("axis", LEFT, top, LEFT, bottom)
        drawing.text(LEFT, top - 4, name, more=' font-weight="600"')
        draw_marks(drawing, marks, zero, place, (top, bottom), LEFT + 7.5 * len(name))
    drawing.text((LEFT + right) / 2, height - 12,
                 "seconds after the snapshot was asked for", "quiet", "middle")  # fmt: skip
    return drawing.done()


def worst_per_pixel(timeline, zero, place, begin):
    """(x, age of the oldest request in ms) for each column of pixels."""
    worst = {}
    for index, age in enumerate(timeline.ages_ms()):
        seconds = (timeline.start + index * timeline.interval - zero) / SECOND
        if seconds >= begin:
            x = round(place(seconds))
            worst[x] = max(worst.get(x, 0.0), age)
    return sorted(worst.items())


def draw_marks(drawing, marks, zero, place, panel, name_end):
    """Vertical lines with labels above the panel, in as many rows as keep them apart."""
    top, bottom = panel
    rows = [name_end]  # where the last label of each row ends
    for label, moment in marks:
        x = place((moment - zero) / SECOND)
        width = 6.4 * len(label)
        row = next((row for row, taken in enumerate(rows) if taken + 6 <= x), len(rows))
        if row == len(rows):
            rows.append(0.0)
        rows[row] = x + width
        y = top - 4 - 12 * row
        drawing.line("mark", x, y + 2, x, bottom, ' stroke-dasharray="3 3"')
        anchor = "end" if x + width > WIDTH else "start"
        drawing.text(x + (2 if anchor == "start" else -2), y, label, "quiet", anchor,
                     ' font-size="11"')  # fmt: skip


def gap_picture(title, subtitle, sizes, series):
    """`sizes`: labels. `series`: (name, class, dashed, values in ms or None), as lines."""
    height = TOP + 300 + BOTTOM
    drawing = Drawing(height, title, subtitle)
    drawing.text(LEFT, 24, title, more=' font-size="16" font-weight="600"')
    drawing.text(LEFT, 42, subtitle, "quiet")
    top, bottom, right = TOP - 20, TOP + 300, WIDTH - 250
    for value, label in TICKS:
        y = scale_log(value, LOW_MS, HIGH_MS, bottom, top)
        drawing.line("grid", LEFT, y, right, y)
        drawing.text(LEFT - 8, y + 4, label, "quiet", "end")

    def place(number):
        return LEFT + (number + 0.5) * (right - LEFT) / len(sizes)

    for number, size in enumerate(sizes):
        drawing.line("axis", place(number), bottom, place(number), bottom + 4)
        drawing.text(place(number), bottom + 18, size, "quiet", "middle")
    names = []
    for name, kind, dashed, values in series:
        points = [
            (place(number), scale_log(value, LOW_MS, HIGH_MS, bottom, top))
            for number, value in enumerate(values)
            if value is not None
        ]
        if not points:
            continue
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        drawing.path(kind, points, f' fill="none" stroke-width="2"{dash}')
        for x, y in points:
            drawing.parts.append(f'<circle class="{kind}-area" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>')
        names.append((points[-1][1] + 4, name))
    last = 0.0
    for y, name in sorted(names):
        last = max(y, last + 15)
        drawing.text(right + 8, last, name)
    drawing.line("axis", LEFT, bottom, right, bottom)
    drawing.line("axis", LEFT, top, LEFT, bottom)
    drawing.text((LEFT + right) / 2, height - 12, "virtual size", "quiet", "middle")
    return drawing.done()


def stall_marks(marks):
    """The marks of one run, as the picture names them."""
    chosen = [("create", marks["create"]), ("answer", marks["created"])]
    if marks["settled"] - marks["created"] > 50 * MS:
        chosen.append(("settled", marks["settled"]))
    chosen += [("delete", marks["delete"]), ("answer", marks["deleted"])]
    if marks["cleaned"] - marks["deleted"] > 50 * MS:
        chosen.append(("done", marks["cleaned"]))
    return chosen
