#!/usr/bin/env python3
"""Makes a picture of what a program printed: text on standard input, SVG on standard output."""

import sys
import unicodedata
from xml.sax.saxutils import escape

CELL, LINE, MARGIN, BAR = 8.4, 19, 20, 34
STYLE = """
  .window { fill: #16181d }
  text { font-family: monospace; font-size: 14px; fill: #d7dae0; white-space: pre }
  .step { fill: #8ec7ff; font-weight: bold }
  .equal { fill: #9fdc8c }
  .title { fill: #7d828c }
"""


def cells(text):
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)


def kind(line):
    if line[:2].rstrip(".").isdigit() and line[1:3] == ". ":
        return "step"
    return "equal" if line.endswith("results equal") else "text"


def main():
    title = sys.argv[1] if len(sys.argv) > 1 else ""
    lines = [line.rstrip() for line in sys.stdin.read().splitlines()]
    width = round(2 * MARGIN + CELL * max(map(cells, lines), default=0))
    height = BAR + MARGIN + LINE * len(lines)

    print(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
          f'viewBox="0 0 {width} {height}" role="img">')
    print(f"<title>{escape(title)}</title>\n<style>{STYLE}</style>")
    print(f'<rect class="window" width="{width}" height="{height}" rx="8"/>')
    for at, colour in enumerate(["#ff5f57", "#febc2e", "#28c840"]):
        print(f'<circle cx="{MARGIN + 18 * at}" cy="17" r="5.5" fill="{colour}"/>')
    print(f'<text class="title" x="{MARGIN + 64}" y="22">{escape(title)}</text>')

    for number, line in enumerate(lines):
        if line:
            # The length keeps columns in line, whatever font the viewer has.
            print(f'<text class="{kind(line)}" x="{MARGIN}" y="{BAR + LINE * (number + 1) - 5}" '
                  f'xml:space="preserve" textLength="{cells(line) * CELL:.1f}">{escape(line)}</text>')
    print("</svg>")


main()
