"""An HTML page, complete in one file, about the errors of a quantized model."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from jq.report.layers import LayerError

TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ model }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .15em .6em; border-bottom: 1px solid #ddd }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } .bar { background: #3b76c4; height: .8em; display: inline-block }
td.w { width: 30% } h1 { font-size: 1.4em }
</style>
<h1>{{ model }}</h1>
<p>Compared with {{ against }} on {{ date }}. {{ errors|length }} quantized weights,
{{ "%.2f"|format(bits) }} bits per weight on average, median relative error {{ "%.4f"|format(median) }}.</p>
{% if perplexity %}<table><tr><th>model<th class="n">perplexity</tr>
{% for name, value in perplexity.items() %}<tr><td>{{ name }}<td class="n">{{ "%.3f"|format(value) }}</tr>
{% endfor %}</table>{% endif %}
<h2>Error of each weight</h2>
<p>Relative error: ||W' - W|| / ||W||, Frobenius norms, W' dequantized, W the original.</p>
<table><tr><th>module<th>stored as<th class="n">bits/weight<th class="n">largest error<th class="n">relative error<th></tr>
{% for e in errors %}<tr><td>{{ e.module }}<td>{{ e.kind }}<td class="n">{{ "%.2f"|format(e.bits_per_weight) }}\
<td class="n">{{ "%.4g"|format(e.largest) }}<td class="n">{{ "%.4f"|format(e.relative) }}\
<td class="w"><span class="bar" style="width: {{ "%.1f"|format(100 * e.relative / worst) }}%"></span></tr>
{% endfor %}</table>
</html>
"""


def write_page(
    path: Path, model: str, against: str, errors: Sequence[LayerError], perplexity: Mapping[str, float]
) -> None:
    """Writes the page.

    Args:
      path: HTML file.
      model, against: names of the two checkpoints.
      errors: one for each quantized weight, at least one.
      perplexity: by checkpoint name; may be empty.
    """
    import jinja2

    relative = sorted(e.relative for e in errors)
    page = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    text = page.render(
        model=model,
        against=against,
        date=datetime.date.today().isoformat(),
        errors=errors,
        perplexity=perplexity,
        bits=sum(e.bits_per_weight for e in errors) / len(errors),
        median=relative[len(relative) // 2],
        worst=max(relative[-1], 1e-30),
    )
    path.write_text(text, "utf-8")
