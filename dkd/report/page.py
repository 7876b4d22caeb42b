"""Build one self-contained HTML page, which loads no script, font, picture or other file."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_STYLE = """
:root { color-scheme: light; }
body {
  font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 1180px; margin: 2rem auto; padding: 0 1.2rem;
}
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { border-bottom: 1px solid #ccc; padding-bottom: .2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block; overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #666; vertical-align: bottom; }
figure { margin: 1.2rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { color: #444; font-size: 14px; max-width: 60rem; }
p.note { background: #fff6dd; border-left: 4px solid #E69F00; padding: .4rem .8rem; }
nav a { margin-right: 1rem; }
"""


@dataclass
class Page:
    """A page that is built from top to bottom. All text is escaped."""

    title: str
    body: list[str] = field(default_factory=list)
    sections: list[tuple[str, str]] = field(default_factory=list)

    def section(self, title: str) -> None:
        """Begin a section with a heading, which the top of the page links to."""
        anchor = f"s{len(self.sections) + 1}"
        self.sections.append((anchor, title))
        self.body.append(f'<h2 id="{anchor}">{escape(title)}</h2>')

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.body.append(f"<p>{escape(text)}</p>")

    def note(self, text: str) -> None:
        """Add a highlighted paragraph, for what is missing or damaged."""
        self.body.append(f'<p class="note">{escape(text)}</p>')

    def picture(self, png: bytes, title: str, caption: str) -> None:
        """Add a picture.

        Args:
            png: the bytes of a PNG file.
            title: text that stands for the picture where it cannot be seen.
            caption: text below the picture.
        """
        data = base64.b64encode(png).decode()
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(title, quote=True)}">'
        self.body.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table: its header, and its rows of as many cells."""
        header = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        self.body.append(f"<table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table>")

    def html(self) -> str:
        """Return the page as an HTML document."""
        links = "".join(f'<a href="#{anchor}">{escape(title)}</a>' for anchor, title in self.sections)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
            f"<style>{_STYLE}</style></head>\n<body><h1>{escape(self.title)}</h1><nav>{links}</nav>\n"
            + "\n".join(self.body)
            + "\n</body></html>\n"
        )
