"""The page: panels in one HTML file that needs nothing else, and the same facts as Markdown."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

STYLE = """
:root{color-scheme:light dark;--ink:#16191d;--soft:#5c6670;--paper:#fdfdfc;--card:#f2f3f1;--line:#d5d8d6;--good:#00704f;
--bad:#a84300;--grey:#6d747b}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ea;--soft:#a3adb6;--paper:#14171a;--card:#1e2327;--line:#363d43;
--good:#4fc79b;--bad:#f08a45;--grey:#98a1a9}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem;color:var(--ink);background:var(--paper);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.2rem;margin:0 0 .5rem}h3{font-size:1rem;margin:.6rem 0 .3rem}
nav{display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.9rem;margin:.5rem 0 1rem}a{color:inherit}
section{border-top:1px solid var(--line);padding:1.1rem 0}
ul{margin:.2rem 0 .8rem;padding-left:1.2rem;max-width:60rem;overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:1rem}
figure{margin:0;min-width:0}figcaption,.note{color:var(--soft);font-size:.85rem}
svg{display:block;width:100%;height:auto;max-width:34rem;overflow:visible}
.verdict{display:flex;flex-wrap:wrap;gap:1rem;align-items:flex-start}.verdict figure{flex:1 1 20rem}
.card{background:var(--card);border-radius:.6rem;padding:.4rem 1.1rem .9rem;
max-width:100%;min-width:min(100%,16rem)}
.card p{margin:.2rem 0;color:var(--soft);font-size:.9rem}.large{font-size:3rem;font-weight:650;line-height:1.15}
.large small{font-size:1.3rem}.large span{font-size:.9rem;font-weight:400;color:var(--soft);margin-left:.5rem}
.delta{display:flex;justify-content:space-between;gap:1rem}.delta span{color:var(--soft);font-size:.9rem}
.up b{color:var(--good)}.down b{color:var(--bad)}.none b{color:var(--grey);font-weight:400}
.warn,.missing{color:var(--grey);border-left:3px solid var(--line);padding-left:.7rem}.card .warn{color:var(--bad)}
.thumbs{display:flex;flex-wrap:wrap;gap:.7rem;margin-bottom:.7rem}.thumb{width:6.5rem;font-size:.78rem;line-height:1.3;overflow-wrap:anywhere}
.thumb img{width:6.5rem;height:6.5rem;object-fit:cover;border-radius:.3rem;display:block;background:var(--card)}
.thumb .nothing{aspect-ratio:1;border-radius:.3rem;background:var(--card)}.thumb img.small{image-rendering:pixelated}
.thumb.wide,.thumb.wide img{width:10.5rem}.thumb.wide img{height:10.5rem}
.strip{margin:0;max-width:100%}.strip div{display:flex;flex-wrap:wrap;gap:2px}
.strip img{display:block;width:4.2rem;height:4.2rem;border-radius:.2rem}
.over{position:relative}.over svg{position:absolute;inset:0;width:100%;height:100%}
pre{font:13px/1.45 ui-monospace,monospace;background:var(--card);padding:.7rem;border-radius:.4rem;
overflow-x:auto;margin:.5rem 0}
code{font:.88em ui-monospace,monospace}details{margin:.5rem 0}summary{cursor:pointer}
@media print{:root{--paper:#fff}nav{display:none}body{max-width:none}pre{font-size:9px;white-space:pre-wrap}
h2,h3,summary{break-after:avoid}figure,.card,section>ul{break-inside:avoid}details::details-content{content-visibility:visible;height:auto}}
"""


@dataclass(frozen=True)
class Panel:
    """One section of the report."""

    title: str
    body: str
    """HTML; empty where there is nothing to show."""
    facts: tuple[str, ...]
    """The same in words: a list in the page, and all that Markdown gets."""


def missing(title: str, reasons: Sequence[str]) -> Panel:
    """A panel that says why it is empty."""
    return Panel(title, "", tuple(f"Not shown: {reason}" for reason in reasons))


def grid(figures: Sequence[str]) -> str:
    """Figures beside each other, as many as the width holds."""
    return f"<div class=grid>{''.join(figures)}</div>"


def bullets(lines: Sequence[str]) -> str:
    """A list."""
    items = [f"<li{' class=missing' if line.startswith('Not shown') else ''}>{_marked(line)}</li>" for line in lines]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _marked(line: str) -> str:
    """A line of Markdown as HTML, as far as facts use it: `code`."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(line))


def html(title: str, panels: Sequence[Panel]) -> str:
    """The whole file."""
    places = [(f"p{number}", panel) for number, panel in enumerate(panels)]
    links = "".join(f"<a href='#{place}'>{escape(panel.title)}</a>" for place, panel in places)
    sections = "".join(
        f"<section id={place}><h2>{escape(panel.title)}</h2>{bullets(panel.facts)}{panel.body}</section>"
        for place, panel in places
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        # nobody asks for an icon then, and whatever a mistake puts into the page, nothing is fetched
        "<link rel=icon href='data:,'><meta http-equiv=Content-Security-Policy"
        " content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f"<nav>{links}</nav>{sections}</body></html>\n"
    )


def in_markdown(line: str) -> str:
    """A fact as Markdown, where a name may hold HTML; `code` stays as it is."""
    return re.sub(r"`[^`]*`|<", lambda found: r"\<" if found[0] == "<" else found[0], line)


def markdown(title: str, panels: Sequence[Panel], table: str) -> str:
    """The facts of all panels, after the table of runs."""
    parts = [f"# {in_markdown(title)}", "", "```", table, "```"]
    for panel in panels:
        parts += ["", f"## {panel.title}", "", *(f"* {in_markdown(line)}" for line in panel.facts)]
    return "\n".join(parts) + "\n"


def short_tags(names: Sequence[str], room: int) -> list[str]:
    """A tag for each name, for a picture with room for so many letters: the names where all are short, else 1, 2, ..."""
    long = any(len(name) > room for name in names)
    return [str(number) if long else name for number, name in enumerate(names, 1)]


def legend(names: Sequence[str], tags: Sequence[str], most: int) -> str:
    """What the tags stand for, as `1 = cat, 2 = dog, ...`; nothing where they are the names."""
    said = [f"{tag} = {name}" for name, tag in zip(names, tags, strict=True) if tag != name]
    return ", ".join(said[:most] + ["..."] * (len(said) > most))


def picture(image: Image.Image, alt: str, side: int = 160) -> str:
    """An <img> that holds its own bytes; its longer side is at most `side` pixels, and a small one stays as it is."""
    small = max(image.size) <= 64
    image = image.copy()
    image.thumbnail((side, side))
    file = io.BytesIO()
    if small:
        image.save(file, "PNG")  # a few pixels are shown large, and there a JPEG's blocks would be seen
    else:
        image.save(file, "JPEG", quality=80)
    data = base64.b64encode(file.getvalue()).decode()
    kind = "png" if small else "jpeg"
    return f"<img{' class=small' if small else ''} alt='{escape(alt, quote=True)}' src='data:image/{kind};base64,{data}'>"


def thumbnail(content: str, caption: str, wide: bool = False) -> str:
    """A picture with its caption."""
    return f"<figure class='thumb{' wide' if wide else ''}'>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def strip(content: Sequence[str], caption: str) -> str:
    """Small pictures side by side with one caption."""
    return f"<figure class=strip><div>{''.join(content)}</div><figcaption>{escape(caption)}</figcaption></figure>"


def thumbnails(found: Sequence[str]) -> str:
    """Pictures in rows."""
    return f"<div class=thumbs>{''.join(found)}</div>"
