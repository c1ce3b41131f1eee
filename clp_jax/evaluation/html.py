"""report.html: fronts, tables and samples on one page that needs nothing else.

The page has no scripts and loads nothing: its pictures are inline SVG (svg.py)
and what moves is CSS, which its content security policy enforces. Every text is
escaped.

  text = html.render(
    "My comparison",
    fronts=[json.loads(f.read_text()) for f in files],
    tables=[html.Table("Methods", rows)],
    samples=rows_of_samples_jsonl,
    configs={"full-CLP": config},
    commands=["clp compare runs/a runs/b --output runs/ab"],
    unsupported=tasks.fact_checker("newsroom"),
  )
  print(html.save("runs/ab/report.html", text))
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import traverse_util

from clp_jax.evaluation import examples, svg
from clp_jax.evaluation import front as front_lib
from clp_jax.evaluation.svg import escape
from clp_jax.evaluation.tables import units_note
from clp_jax.interop import storage

SHOWN_DOCUMENTS = 5
SHOWN_WEIGHTINGS = 5  # of a document's samples

# (document, summary) -> [(start, end)] of the summary's unsupported facts, or
# None where they can't be known.
Checker = Callable[[str, str], list[tuple[int, int]] | None]


class Table(NamedTuple):
  """A table of the page."""

  title: str
  # Column to value, in the order of the first row; a column that a row lacks is
  # empty there. A str is shown as it is, a float with four digits, None as "-".
  rows: Sequence[Mapping[str, Any]]
  note: str = ""  # below the table


def render(
  title: str,
  *,
  fronts: Sequence[Mapping[str, Any]],
  tables: Sequence[Table] = (),
  samples: Sequence[Mapping[str, Any]] = (),
  configs: Mapping[str, Mapping[str, Any]] | None = None,
  commands: Sequence[str] = (),
  about: Mapping[str, str] | None = None,
  unsupported: Checker | None = None,
) -> str:
  """The page's HTML.

  Args:
    title: its heading.
    fronts: contents of front.json, over the same objectives; the first is the
      one whose weightings are labelled. None: the page has no plots.
    tables: shown below the plots, in this order. The points of every front get
      tables of their own by themselves.
    samples: rows of samples.jsonl ("document", "reference", "weights", "alpha",
      "summary", "rewards"), with "method" added where there are several. Of
      many weightings, SHOWN_WEIGHTINGS that are far from each other are shown.
    configs: name of a run -> its config.json. Fields that differ between runs
      are shown first.
    commands: shell commands that make this page again, in order.
    about: name -> text, such as {"time": "497 s"}, at the head of the page.
    unsupported: marks facts; `data.tasks.fact_checker` has it for data that
      know them.

  Returns:
    A whole document, for `save`.

  Raises:
    FrontError: a front is malformed, or they differ in their objectives.
  """
  loaded = [
    front_lib.front_from_json(front, f"fronts[{i}]")
    for i, front in enumerate(fronts)
  ]
  sections: list[tuple[str, str]] = []
  if loaded:
    front_lib.shared_objectives(loaded)
    sections.append(("Fronts", _fronts(loaded)))
  if tables:
    sections.append(("Tables", "".join(_table(table) for table in tables)))
  if samples:
    sections.append(("Samples", _samples(samples, unsupported)))
  if loaded:
    sections.append(("Points", "".join(_points(f) for f in loaded)))
  if configs:
    sections.append(("Configuration", _configs(configs)))
  if commands:
    lines = escape("\n".join(commands))
    sections.append(
      ("Reproduce", f'<pre tabindex="0"><code>{lines}</code></pre>')
    )
  links = " ".join(
    f'<a href="#{name.lower()}">{name}</a>' for name, _ in sections
  )
  facts = "".join(
    f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>"
    for name, text in (about or {}).items()
  )
  body = "".join(
    f'<section id="{name.lower()}"><h2>{name}</h2>{content}</section>\n'
    for name, content in sections
  )
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta http-equiv="Content-Security-Policy" content="default-src '
    "'none'; style-src 'unsafe-inline'\">\n"
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{escape(title)}</title>\n"
    f"<style>{_STYLE}{_toggles(len(loaded))}</style>\n</head>\n<body>\n"
    f"<header><h1>{escape(title)}</h1>"
    + (f"<dl>{facts}</dl>" if facts else "")
    + f'<nav aria-label="Sections">{links}</nav></header>\n'
    f"<main>\n{body}</main>\n</body>\n</html>\n"
  )


def save(path: str | os.PathLike[str], text: str) -> str:
  """Writes a page, whole or not at all.

  Args:
    path: of the file; may be gs://.
    text: from `render`.

  Returns:
    Its address, which a browser opens: file://... for a local path.
  """
  storage.write_whole(epath.Path(path), text.encode())
  name = os.fspath(path)
  return name if "://" in name else epath.Path(name).absolute().as_uri()


def _fronts(fronts: Sequence[front_lib.Front]) -> str:
  legend = "".join(
    f'<label><input type="checkbox" id="show-{i}" checked>{svg.marker(i)}'
    f"{escape(front.method)}</label>"
    for i, front in enumerate(fronts)
  )
  plots = svg.panels(fronts)
  figures = "".join(
    f"<figure>{plot}<figcaption>{escape(caption)}</figcaption></figure>"
    for caption, plot in plots
  )
  many = " many" if len(plots) > 1 else ""
  return (
    f'<div class="legend" role="group" aria-label="Methods shown">{legend}'
    f'</div><div class="figures{many}">{figures}</div>'
    "<p class=note>Hover over a point, tap it or move to it with the Tab key "
    "for its weighting and figures. Bars: one standard error. Hollow: another "
    f"point of its front is better. Labels: {escape(fronts[0].method)}. "
    f"{escape(_measured(fronts))}</p>"
  )


def _measured(fronts: Sequence[front_lib.Front]) -> str:
  """How the points were measured, where all fronts agree on it."""
  first = fronts[0]
  if any(
    (f.prompts, f.decoding) != (first.prompts, first.decoding) for f in fronts
  ):
    return "The fronts differ in prompts or decoding; see the points."
  return _decoding(first)


def _decoding(front: front_lib.Front) -> str:
  settings = ", ".join(f"{k} {v}" for k, v in front.decoding.items())
  return f"{front.prompts} prompts; decoding: {settings}."


def _points(front: front_lib.Front) -> str:
  rows = []
  for point in front.points:
    row: dict[str, Any] = {
      f"w({o})": f"{point.weights[o]:.2f}" for o in front.objectives
    }
    row["\u03b1"] = f"{point.alpha:.3g}"
    row |= {o: svg.shown(point.rewards[o]) for o in front.objectives}
    row |= {f"{o}, raw": svg.shown(raw) for o, raw in point.raw.items()}
    row |= {"KL (nats)": svg.shown(point.kl), "value": svg.shown(point.value)}
    rows.append(row)
  note = f"Step {front.step}. {_decoding(front)}{units_note(front)}"
  return (
    f"<details><summary>{escape(front.method)}, {len(rows)} points</summary>"
    f"{_grid(rows)}<p class=note>{escape(note)}</p></details>"
  )


def _table(table: Table) -> str:
  note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
  return f"<h3>{escape(table.title)}</h3>{_grid(table.rows)}{note}"


def _grid(rows: Sequence[Mapping[str, Any]]) -> str:
  """An HTML table that scrolls by itself where it is too wide."""
  columns = list(dict.fromkeys(column for row in rows for column in row))
  cells = [[_shown(row.get(column, "")) for column in columns] for row in rows]
  # A column of numbers is aligned at its right, its name too.
  aligned = [
    " class=number"
    if all(_is_number(row[i]) for row in cells if row[i])
    else ""
    for i in range(len(columns))
  ]
  head = "".join(
    f'<th scope="col"{number}>{escape(column)}</th>'
    for column, number in zip(columns, aligned, strict=True)
  )
  lines = []
  for first, *rest in cells:
    line = f'<th scope="row">{escape(first)}</th>'
    for value, number in zip(rest, aligned[1:], strict=True):
      line += f"<td{number}>{_cell(value) if number else escape(value)}</td>"
    lines.append(f"<tr>{line}</tr>")
  return (
    '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>'
    f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    "</div>"
  )


def _samples(
  samples: Sequence[Mapping[str, Any]], unsupported: Checker | None
) -> str:
  """Telling documents, each with its summaries by method and weighting."""
  by_document: dict[str, list[Mapping[str, Any]]] = {}
  for row in samples:
    by_document.setdefault(row["document"], []).append(row)
  first = samples[0].get("method")
  chosen = examples.telling(
    [row for row in samples if row.get("method") == first], SHOWN_DOCUMENTS
  )
  intro = ""
  if len(chosen) < len(by_document):
    text = examples.CHOSEN.format(documents=len(by_document))
    intro = f"<p class=note>Documents: {escape(text)}</p>"
  if unsupported is not None:
    intro += (
      "<p class=note><mark>Marked</mark>: stated, but not in the document.</p>"
    )
  return intro + "".join(
    _document(document, by_document[document], unsupported)
    for document in chosen
  )


def _document(
  document: str,
  rows: Sequence[Mapping[str, Any]],
  unsupported: Checker | None,
) -> str:
  keys = list(dict.fromkeys(map(_weighting, rows)))
  one_alpha = len({key[-1] for key in keys}) == 1
  columns = {key: _weighting_name(key, one_alpha) for key in _far_apart(keys)}
  cells: dict[str, dict[tuple, Mapping[str, Any]]] = {}
  for row in rows:
    cells.setdefault(row.get("method", ""), {}).setdefault(_weighting(row), row)
  named = list(cells) != [""]
  head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns.values())
  lines = []
  for method, by_weighting in cells.items():
    line = f'<th scope="row">{escape(method)}</th>' if named else ""
    for key, name in columns.items():
      line += f'<td data-at="{escape(name)}">'
      if key in by_weighting:
        line += _summary(document, by_weighting[key], unsupported)
      line += "</td>"
    lines.append(f"<tr>{line}</tr>")
  reference = _marked(document, rows[0]["reference"], unsupported)
  return (
    '<article class="sample"><p class="document" dir="auto" tabindex="0">'
    f"{escape(document)}</p>"
    f'<p class="reference"><b>Reference</b> {reference}</p>'
    '<div class="scroll" tabindex="0" role="region" aria-label="Summaries">'
    f'<table class="summaries"><thead><tr>{"<td></td>" if named else ""}{head}'
    f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div></article>"
  )


def _summary(
  document: str, row: Mapping[str, Any], unsupported: Checker | None
) -> str:
  rewards = " \u00b7 ".join(
    f"{name} {value:.2f}" for name, value in row.get("rewards", {}).items()
  )
  return (
    f"{_marked(document, row['summary'], unsupported)}"
    f'<span class="rewards">{escape(rewards)}</span>'
  )


def _marked(document: str, text: str, unsupported: Checker | None) -> str:
  """A text with its unsupported facts marked, if they can be known."""
  spans = [] if unsupported is None else unsupported(document, text)
  if spans is None:
    shown = f'<span dir="auto">{escape(text)}</span>'
    return f"{shown} <small>(not grammatical)</small>"
  parts, end = [], 0
  for start, stop in spans:
    parts.append(escape(text[end:start]))
    parts.append(
      f'<mark title="not in the document">{escape(text[start:stop])}</mark>'
    )
    end = stop
  parts.append(escape(text[end:]))
  return f'<span dir="auto">{"".join(parts)}</span>'


def _weighting(row: Mapping[str, Any]) -> tuple:
  return (*row["weights"].items(), ("\u03b1", row.get("alpha")))


def _weighting_name(key: tuple, one_alpha: bool) -> str:
  *weights, (_, alpha) = key
  shown = ", ".join(f"{name} {weight:.2f}" for name, weight in weights)
  return shown if one_alpha else f"{shown}, \u03b1 {alpha:.3g}"


def _far_apart(keys: list[tuple]) -> list[tuple]:
  """SHOWN_WEIGHTINGS keys that are far from each other, in their order.

  Starts with the first and adds the one that is farthest from all chosen so
  far: the ends of a line, then its middle; the corners of a simplex, then its
  centre.
  """
  if len(keys) <= SHOWN_WEIGHTINGS:
    return keys
  places = np.array(
    [[value or 0.0 for _, value in key] for key in keys], np.float64
  )
  # A KL weight counts by its order of magnitude.
  alphas = np.log(np.maximum(places[:, -1], 1e-6))
  places[:, -1] = (alphas - alphas.min()) / max(np.ptp(alphas), 1e-9)
  chosen = [0]
  while len(chosen) < SHOWN_WEIGHTINGS:
    gaps = places[:, None] - places[None, chosen]
    distances = np.linalg.norm(gaps, axis=-1)
    chosen.append(int(np.argmax(np.min(distances, axis=1))))
  return [keys[i] for i in sorted(chosen)]


def _configs(configs: Mapping[str, Mapping[str, Any]]) -> str:
  flat = {
    name: traverse_util.flatten_dict(dict(config), sep=".")
    for name, config in configs.items()
  }
  fields = list(dict.fromkeys(f for values in flat.values() for f in values))
  differing, shared = [], []
  for field in fields:
    shown = {
      name: json.dumps(values[field], ensure_ascii=False)
      if field in values
      else None
      for name, values in flat.items()
    }
    if len(set(shown.values())) == 1:
      shared.append({"field": field, "value": next(iter(shown.values()))})
    else:
      differing.append({"field": field} | shown)
  result = ""
  if differing:
    result += f"<h3>What differs</h3>{_grid(differing)}"
  title = "Shared by all runs" if differing else ", ".join(configs)
  return result + (
    f"<details><summary>{escape(title)}, {len(shared)} fields</summary>"
    f"{_grid(shared)}</details>"
  )


def _shown(value: Any) -> str:
  match value:
    case None:
      return "-"
    case bool():
      return str(value)
    case float() | np.floating():
      return f"{value:.4g}"
  return str(value)


def _cell(number: str) -> str:
  """A figure, its interval on a line of its own: tables are wide enough."""
  figure, bracket, interval = number.partition(" [")
  if not bracket:
    return escape(number)
  return f"{escape(figure)} <small>[{escape(interval)}</small>"


def _is_number(text: str) -> bool:
  return text[:1].isdigit() or text[:2].strip("+-.").isdigit() or text == "-"


def _toggles(fronts: int) -> str:
  """Hides a front when its box in the legend is not checked."""
  return "".join(
    f"#fronts:has(#show-{i}:not(:checked)) .figures .s{i}{{display:none}}"
    for i in range(fronts)
  )


# Okabe and Ito's colours as in plot.py, and lighter ones for dark screens.
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--soft:#59636e;
--line:#d5dae0;--box:#f5f7f9;--link:#0b5cad;--mark:#ffdf9e;--mark-fg:#5a2600;
--c0:#0072b2;--c1:#d55e00;--c2:#008a66;--c3:#b8558f;--c4:#111;--c5:#b97800;
--c6:#2b8fcb}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--fg:#e8eaed;
--soft:#a3acb7;--line:#363d46;--box:#1e2329;--link:#7cb8f5;--mark:#5f3d00;
--mark-fg:#ffdf9e;--c0:#58aeea;--c1:#ff9152;--c2:#35cfa3;--c3:#eaa0cc;
--c4:#f2f2f2;--c5:#f0b83d;--c6:#b9b0ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1rem 1.25rem 4rem;
background:var(--bg);color:var(--fg);font:1rem/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.5rem 0 .75rem;padding-top:.5rem;
border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.25rem 0 .4rem}
a{color:var(--link)}
nav a{margin-right:1rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;
margin:.5rem 0}
dt{color:var(--soft)}dd{margin:0}
.note,small,figcaption{color:var(--soft);font-size:.875rem}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin-bottom:.5rem}
.legend label{display:flex;align-items:center;gap:.35rem;cursor:pointer;
min-height:1.75rem}
.key{width:1.1rem;height:1.1rem;flex:none}
.figures{max-width:40rem}.figures:not(.many) figcaption{display:none}
.figures.many{max-width:none;display:grid;gap:1rem;
grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr))}
figure{margin:0}figcaption{text-align:center}
.plot{position:relative}
.plot svg{display:block;width:100%;height:auto}
.plot text{font:10px system-ui,sans-serif;fill:var(--soft)}
.plot .name{fill:var(--fg);font-size:11px}
.many .plot text{font-size:13px}.many .plot .name{font-size:14px}
.plot .label{fill:var(--c);stroke:var(--bg);stroke-width:3px;
paint-order:stroke}
.grid{stroke:var(--line);stroke-width:.6;fill:none}
.axis{stroke:var(--soft);fill:none}
.sweep,.bars{stroke:var(--c);stroke-width:1.2;opacity:.45;fill:none}
.mark{fill:var(--c);stroke:var(--c);stroke-width:1.5}
.hollow{fill:var(--bg)}
.c0,.label{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}
.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}
.point{position:absolute;width:16px;height:16px;margin:-8px 0 0 -8px;
border-radius:50%;cursor:default}
.point:hover,.point:focus{z-index:2;outline:2px solid var(--fg);
outline-offset:-1px}
.tip{display:none;position:absolute;width:max-content;max-width:min(15rem,43vw);
padding:.35rem .6rem;border:1px solid var(--line);border-radius:.4rem;
background:var(--box);color:var(--fg);font-size:.8rem;line-height:1.4;
pointer-events:none;box-shadow:0 2px 8px #0003}
.point:hover .tip,.point:focus .tip{display:block}
.above .tip{bottom:20px}.below .tip{top:20px}
.on-right .tip{left:2px}.on-left .tip{right:2px}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;
font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem .3rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);overflow-wrap:normal}
thead th{color:var(--soft);font-weight:600;white-space:nowrap}
tbody th{font-weight:500}
thead .number,td.number{text-align:right;white-space:nowrap}
.number small{display:block;font-size:.8rem}
details{margin:.5rem 0}
summary{cursor:pointer;padding:.25rem 0}
pre{background:var(--box);border:1px solid var(--line);border-radius:.4rem;
padding:.75rem 1rem;overflow-x:auto;font-size:.85rem}
mark{background:var(--mark);color:var(--mark-fg);padding:0 .15em;
border-radius:.2em;text-decoration:underline wavy;
text-decoration-thickness:1px;text-underline-offset:.2em}
.sample{border:1px solid var(--line);border-radius:.5rem;margin:1rem 0;
padding:.25rem 1rem .5rem}
.document{white-space:pre-wrap;max-height:14rem;overflow-y:auto}
.reference{color:var(--soft)}
.reference b{font-weight:600;margin-right:.4em}
.summaries{table-layout:fixed;width:100%;min-width:52rem}
.summaries thead th{white-space:normal}
.rewards{display:block;color:var(--soft);font-size:.8rem}
@media(max-width:40rem){
body{padding:.5rem .9rem 3rem}
.figures .plot text{font-size:14px}.figures .plot .name{font-size:15px}
.summaries{min-width:0}
.summaries,.summaries tbody,.summaries tr,.summaries td,.summaries tbody th{
display:block}
.summaries thead{display:none}
.summaries td{padding:.4rem 0}
.summaries tbody th{padding:.8rem 0 .2rem;font-weight:700}
.summaries td::before{content:attr(data-at);display:block;color:var(--soft);
font-size:.8rem;font-weight:600}
}
@media print{.tip{display:none!important}body{max-width:none}}
"""
