"""The page of a report: its frame, and what both modes' pages are made of.

Python strings and not ``.html`` files, because Flower's app bundle leaves such files out.
The page asks for nothing from anywhere, and its Content-Security-Policy says so too. Every
value passes through Jinja's autoescape, except the charts, which
:mod:`server_app.reporting.drawing` escapes.

A mode's template extends ``frame`` and imports the macros that it uses from ``macros``; it includes
``classes`` where it shows figures of each class. Blocks of the frame: ``lead``, ``unprotected``
(what was not), ``content``, ``limits``.
"""

from __future__ import annotations

from functools import lru_cache

import jinja2
from markupsafe import Markup

from server_app.reporting import formats
from server_app.reporting.style import STYLE


def render(template: str, view: dict[str, object]) -> str:
    """Return the page. An undefined name is a mistake in this package, so it raises."""
    return _compiled(template).render(view)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.DictLoader({"frame": FRAME, "macros": MACROS, "classes": CLASSES}),
    )
    written = ("percent", "points", "fixed", "whole", "epsilon", "delta", "duration")
    environment.filters.update({name: getattr(formats, name) for name in written})
    environment.globals.update(style=Markup(STYLE), missing=formats.MISSING)
    return environment.from_string(template)


MACROS = """\
{% macro cell(value) %}
<td>{{ value|fixed }}{% if value is not none %}
<span class="bar" aria-hidden="true"><i style="width:{{ [[value, 0]|max, 1]|min * 100 }}%"></i>
</span>{% endif %}</td>
{% endmacro %}
{% macro banner(kind, title, words) %}
<p class="banner {{ kind }}"><strong>{{ title }}</strong> {{ words }}</p>
{% endmacro %}
{% macro card(title, figure, unit="", kind="") %}
<div class="card {{ kind }}"><h3>{{ title }}</h3>
<div class="figure">{{ figure }}{% if unit %} <small>{{ unit }}</small>{% endif %}</div>
<p>{{ caller() }}</p></div>
{% endmacro %}
{% macro pairs(caption, rows) %}
<div class="table"><table class="pairs"><caption>{{ caption }}</caption>
<thead><tr><th scope="col">Name</th><th scope="col" class="left">Value</th></tr></thead><tbody>
{% for name, value in rows %}
<tr><th scope="row">{{ name }}</th><td class="text left"><code>{{ value }}</code></td></tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
{% macro chart(item, kind="") %}
<figure class="{{ kind }}"><figcaption>{{ item.title }}</figcaption>
{% if item.legend %}
<ul class="legend">
{% for name, colour in item.legend %}<li><i style="background:{{ colour }}"></i>{{ name }}</li>
{% endfor %}</ul>
{% endif %}
{{ item.svg }}
</figure>
{% endmacro %}
"""

FRAME = """\
{% from "macros" import banner, pairs %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{{ title }}: {{ status.text }}</title>
<style>{{ style }}</style>
</head>
<body><main>
<header>
<div class="head"><h1>{{ title }}</h1>
<span class="badge {{ status.kind }}">{{ status.text }}</span></div>
{% block lead %}{% endblock %}
{% if status.kind != "good" %}
{{ banner("bad" if status.kind == "bad" else "warn", "This run is " ~ status.text ~ "." if
 status.kind == "warn" else "This run failed.",
 reason or "No reason was recorded. The page shows what the run left behind.") }}
{% endif %}
{% if synthetic %}
{{ banner("warn", "Synthetic data.", "The images are generated, not taken from patients: these "
 "figures show that the software works and say nothing about medicine.") }}
{% endif %}
{% block unprotected %}{% endblock %}
{% for notice in notices %}{{ banner("warn", "The run's files are not in order.", notice) }}
{% endfor %}
</header>

{% block content %}{% endblock %}

<section><h2>Configuration</h2>
{% if config %}{{ pairs("Run configuration, as recorded in config.json", config) }}
{% else %}<p class="note">config.json holds no configuration.</p>{% endif %}
</section>

<section><h2>Versions and hashes</h2>
{% if versions %}{{ pairs("Software", versions) }}
{% else %}<p class="note">No software versions were recorded.</p>{% endif %}
{{ pairs("SHA-256 of the data source, and of the files that this report was made from", hashes) }}
</section>

<section><h2>Limits of these figures</h2>
<ul class="limits">
{% block limits %}{% endblock %}
<li>This is a research result, not a medical device: no one should be treated by it.</li>
</ul>
</section>
<footer class="note">Made by consilium from the files of the run directory alone;
 the same files give the same report. It asks for nothing from the network.</footer>
</main></body>
</html>
"""

CLASSES = """\
{% from "macros" import cell, chart %}
<section><h2>Classes</h2>
<p class="note">{% if shown_round is none %}No test figures were recorded.{% else %}
Test figures of {{ shown_kind }} {{ shown_round }}, {{ shown_how }}.
{% if heat_map %}In the matrix, colour is the share of the true class and the number is the count
 of images.{% endif %}{% endif %}</p>
{% if heat_map %}
<div class="{{ "charts" if heat_map.wide else "pair" }}">
{{ chart(heat_map, "wide" if heat_map.wide else "") }}
<div class="table wide"><table><caption>Most frequent confusions</caption>
<thead><tr><th scope="col">True class</th><th scope="col" class="left">Taken for</th>
<th scope="col">Images</th><th scope="col">Share</th></tr></thead><tbody>
{% for row in confusions %}
<tr><th scope="row">{{ row.true }}</th><td class="text left">{{ row.predicted }}</td>
<td>{{ row.count|whole }}</td><td>{{ row.share|percent }}</td></tr>
{% else %}
<tr><td colspan="4" class="left">No test image was misclassified.</td></tr>
{% endfor %}
</tbody></table></div></div>
{% endif %}
{% if per_class %}
<div class="table"><table><caption>Test figures of each class</caption>
<thead><tr><th scope="col">Class</th><th scope="col">Precision</th><th scope="col">Recall</th>
<th scope="col">F1</th><th scope="col">AUC</th><th scope="col">Test images</th></tr></thead><tbody>
{% for row in per_class %}
<tr><th scope="row">{{ row.name }}</th>{{ cell(row.precision) }}{{ cell(row.recall) }}
{{ cell(row.f1) }}{{ cell(row.auc) }}<td>{{ row.support|whole }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>
"""
