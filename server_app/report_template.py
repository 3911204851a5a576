"""How the run report looks: the page's template, its style and its words.

A Python string and not an ``.html`` file, because Flower's app bundle leaves such files out.
The page asks for nothing from anywhere, and its Content-Security-Policy says so too. Every
value passes through Jinja's autoescape, except the charts, which :mod:`charts` escapes.
"""

from __future__ import annotations

import jinja2
from markupsafe import Markup

from server_app import charts

SECAGG = {
    True: "Secure aggregation on: the server saw sums only.",
    False: "Secure aggregation off: the server saw each hospital's update.",
    None: "Whether aggregation was secure is not recorded.",
}


def render(view: dict[str, object]) -> str:
    """Return the page. An undefined name is a mistake in this package, so it raises."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=charts.percent,
        fixed=charts.fixed,
        whole=charts.whole,
        epsilon=charts.epsilon,
        delta=charts.delta,
        duration=charts.duration,
    )
    environment.globals.update(style=Markup(STYLE), missing=charts.MISSING, secagg_words=SECAGG)
    return environment.from_string(TEMPLATE).render(view)


STYLE = """
:root { color-scheme: light dark; --ink:#1f2733; --muted:#566070; --rule:#dfe3ea; --page:#f6f7fa;
  --card:#fff; --accent:#332288; --tint:#ecebf7; --good:#0f5c2e; --good-bg:#e4f2e9;
  --warn:#7a3300; --warn-bg:#fff1df; --bad:#8c1616; --bad-bg:#fde9e9; }
@media (prefers-color-scheme: dark) { :root { --ink:#e6e9ef; --muted:#a3adbb; --rule:#343c48;
  --page:#14181e; --card:#1c222a; --accent:#b5adf0; --tint:#2b2a45; --good:#9bdcb4;
  --good-bg:#173424; --warn:#ffc98f; --warn-bg:#40290f; --bad:#ffb0b0; --bad-bg:#461d1d; } }
* { box-sizing: border-box; }
body { margin:0; background:var(--page); color:var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 56px; }
h1 { font-size: 27px; line-height:1.2; margin: 0; letter-spacing:-.01em; overflow-wrap:anywhere; }
h2 { font-size: 19px; margin: 48px 0 4px; letter-spacing:-.005em; }
h3 { font-size: 15px; margin: 0 0 6px; }
p { margin: 6px 0 0; max-width: 76ch; }
.lead, .note { color: var(--muted); }
.note { font-size: 13.5px; }
.head { display:flex; flex-wrap:wrap; gap: 6px 14px; align-items:center; }
.badge { font-size: 13px; font-weight:600; padding: 2px 11px; border-radius: 99px; }
.good { color:var(--good); background:var(--good-bg); }
.warn { color:var(--warn); background:var(--warn-bg); }
.bad { color:var(--bad); background:var(--bad-bg); }
.banner { border-radius: 8px; padding: 11px 16px; margin-top: 14px; max-width:none; }
.banner strong { display:block; }
.cards { display:grid; gap: 14px; margin-top: 14px; grid-template-columns: repeat(6, 1fr); }
.card { background:var(--card); border:1px solid var(--rule); border-radius:10px;
  padding: 14px 18px 15px; grid-column: span 2; min-width:0; }
.card h3 { font-size: 13px; font-weight:600; color:var(--muted); margin:0; }
.card .figure { font-size: 31px; line-height:1.25; font-weight:650; letter-spacing:-.015em;
  margin: 2px 0; font-variant-numeric: tabular-nums; overflow-wrap:anywhere; }
.card .figure small { font-size: 17px; font-weight:500; color:var(--muted); letter-spacing:0; }
.card.word .figure { font-size: 20px; line-height:1.4; padding: 5px 0; }
.card p { margin:0; font-size: 13.5px; line-height:1.45; color:var(--muted);
  overflow-wrap:anywhere; }
.card.half { grid-column: span 3; }
.card.loud { background:var(--warn-bg); border-color:transparent; }
.card.loud h3, .card.loud p, .card.loud .figure { color:var(--warn); }
.charts { display:grid; gap: 14px; margin-top: 14px; grid-template-columns: 1fr 1fr; }
figure { margin:0; background:#fff; color:#2b3340; border:1px solid var(--rule);
  border-radius:10px; padding: 14px 16px 10px; overflow-x:auto; min-width:0; }
.wide { grid-column: 1 / -1; }
figure svg { display:block; width:100%; height:auto; }
figure.wide svg { min-width: 640px; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif !important; }
figcaption { font-size: 14px; font-weight:600; margin-bottom: 8px; }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap: 3px 16px; padding:0; margin:0 0 8px;
  font-size: 13px; }
.legend i { display:inline-block; width:11px; height:11px; border-radius:2px; margin-right:6px; }
.pair { display:grid; gap:14px; grid-template-columns: minmax(0,13fr) minmax(0,9fr);
  margin-top:14px; align-items:start; }
.table { background:var(--card); border:1px solid var(--rule); border-radius:10px;
  padding: 12px 18px 8px; margin-top: 14px; overflow-x:auto; }
.pair .table, .charts .table { margin-top:0; min-width:0; }
.pair .wide { grid-column:auto; }
table { border-collapse:collapse; width:100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
caption { text-align:left; font-weight:600; font-size:14px; padding-bottom: 6px; }
th, td { text-align:right; padding: 5px 0 5px 18px; vertical-align:top; white-space:nowrap;
  border-top:1px solid var(--rule); }
thead th { font-weight:600; color:var(--muted); border-top:0; vertical-align:bottom;
  white-space:normal; line-height:1.3; }
tbody th { font-weight:500; }
tbody th, thead th:first-child, .left { text-align:left; }
th:first-child, td:first-child { padding-left:0; }
tbody th, td.text { white-space:normal; overflow-wrap:anywhere; min-width: 7em; }
.broad tbody th { min-width: 15em; } .pairs th:first-child { width: 32%; }
td ul { margin:0; padding:0; list-style:none; }
tfoot th, tfoot td { font-weight:600; border-top:2px solid var(--rule); }
tfoot th { text-align:left; }
.bar { display:block; height:4px; border-radius:2px; background:var(--rule); margin-top:3px;
  width: 88px; margin-left:auto; }
.bar i { display:block; height:100%; border-radius:2px; background:var(--accent); }
.matrix { width:auto; }
.matrix th, .matrix td { text-align:center; padding: 4px 0; min-width: 2.4em; }
.matrix tbody th { text-align:left; padding-right:18px; min-width:11em; }
.matrix thead th:first-child { text-align:left; }
.matrix .yes { color:var(--accent); } .matrix .no { color:var(--muted); }
.matrix .dropped, .matrix .unknown { color:var(--bad); background:var(--bad-bg); font-weight:700; }
.vh { position:absolute; width:1px; height:1px; overflow:hidden; clip-path:inset(50%); }
code { font: 12.5px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap:anywhere; }
td code { white-space:normal; }
details { margin-top: 14px; } summary { cursor:pointer; color:var(--muted); font-size:13.5px; }
.limits { margin: 8px 0 0; padding-left: 20px; max-width: 84ch; } .limits li { margin: 5px 0; }
footer { margin-top: 44px; border-top:1px solid var(--rule); padding-top: 12px; }
@media (max-width: 820px) { main { padding: 24px 14px 40px; }
  .cards { grid-template-columns: repeat(2, 1fr); } .card, .card.half { grid-column: span 1; }
  .charts, .pair { grid-template-columns: minmax(0,1fr); } }
@media (max-width: 480px) { .card, .card.half { grid-column: 1 / -1; } }
@media print { body { background:#fff; font-size: 12px; } main { max-width:none; padding:0; }
  h2 { break-after:avoid; margin-top: 28px; } figure, .card, .banner, tr { break-inside:avoid; }
  * { print-color-adjust:exact; -webkit-print-color-adjust:exact; } }
@media print and (prefers-color-scheme: dark) { :root { --ink:#1f2733; --muted:#566070;
  --rule:#dfe3ea; --card:#fff; --accent:#332288; --good:#0f5c2e; --good-bg:#e4f2e9;
  --warn:#7a3300; --warn-bg:#fff1df; --bad:#8c1616; --bad-bg:#fde9e9; } }
"""

TEMPLATE = """\
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
<p class="lead">Federated training of an image classifier: what was trained and by whom,
 how well it works, and what it may have revealed.</p>
{% if status.kind != "good" %}
{{ banner("bad" if status.kind == "bad" else "warn", "This run is " ~ status.text ~ "." if
 status.kind == "warn" else "This run failed.",
 reason or "No reason was recorded. The page shows what the run left behind.") }}
{% endif %}
{% if synthetic %}
{{ banner("warn", "Synthetic data.", "The images are generated, not taken from patients: these "
 "figures show that the software works and say nothing about medicine.") }}
{% endif %}
{% if not private %}
{{ banner("warn", "No differential privacy in this run.", "Nothing bounds what the trained model "
 "may reveal about a single image.") }}
{% endif %}
{% for notice in notices %}{{ banner("warn", "The run's files are not in order.", notice) }}
{% endfor %}
</header>

<section class="cards" aria-label="Headline figures">
{% call card("Test accuracy", accuracy|percent(2)) %}
{% if shown_round is none %}No test figures were recorded.{% else %}
Round {{ shown_round }}, {{ shown_how }}{% if images %}; {{ images|whole }} test images{% endif %}.
{% if interval %}95% interval {{ interval[0]|percent }} to {{ interval[1]|percent }}.{% endif %}
{% endif %}{% endcall %}
{% call card("Macro-F1", macro_f1|fixed) %}Mean over the classes, each counted alike.{% endcall %}
{% call card("Macro-AUC", macro_auc|fixed) %}Each class against the rest, mean.{% endcall %}
{% if not private or spent is none %}
{% call card("Differential privacy", "No differential privacy in this run" if not private else
 "ε was not recorded", "", "half loud word") %}
{{ secagg_words[secagg] }}{% endcall %}
{% else %}
{% call card("Differential privacy", "ε = " ~ spent|epsilon, "δ = " ~ delta|delta,
 "half loud" if secagg == false else "half") %}
For the whole training, per {{ privacy_unit }}, at each hospital.
{{ secagg_words[secagg] }}{% endcall %}
{% endif %}
{% call card("Data source", source, "", "half word" ~ (" loud" if synthetic else "")) %}
{{ "Synthetic: generated images, no patients." if synthetic else
 "As recorded by the run; its hash is at the end of the page." }}{% endcall %}
{% call card("Hospitals", hospital_count|whole) %}
{{ drops|whole }} drop-out{{ "" if drops == 1 else "s" }} over all rounds.{% endcall %}
{% call card("Rounds", rounds|whole) %}{{ done }} completed, {{ failed }} failed
{%- if best is not none %}; best: round {{ best }}{% endif %}.{% endcall %}
{% call card("Wall time", took|duration) %}
{{ "From start to end." if wall_known else "Sum of the rounds' times." }}{% endcall %}
</section>

<section><h2>Training over the rounds</h2>
{% if curves %}
<div class="charts">
{% for item in curves %}{{ chart(item, "wide" if item.wide else "") }}{% endfor %}
</div>
{% else %}
<p class="note">No round left a figure that could be drawn.</p>
{% endif %}
{% if history %}
<details><summary>The same figures as a table</summary>
<div class="table"><table><caption>Figures of every round</caption>
<thead><tr><th scope="col">Round</th><th scope="col">Test accuracy</th>
<th scope="col">Macro-F1</th><th scope="col">Macro-AUC</th><th scope="col">Test loss</th>
<th scope="col">Train loss</th><th scope="col">Validation accuracy</th>
<th scope="col">Validation loss</th><th scope="col">ε so far</th></tr></thead><tbody>
{% for row in history %}
<tr><th scope="row">{{ row.round }}</th><td>{{ row.accuracy|percent(2) }}</td>
<td>{{ row.f1|fixed }}</td><td>{{ row.auc|fixed }}</td><td>{{ row.test_loss|fixed }}</td>
<td>{{ row.train_loss|fixed }}</td><td>{{ row.validation|percent(2) }}</td>
<td>{{ row.validation_loss|fixed }}</td><td>{{ row.epsilon|epsilon }}</td></tr>
{% endfor %}
</tbody></table></div></details>
{% endif %}
</section>

<section><h2>Classes</h2>
<p class="note">{% if shown_round is none %}No test figures were recorded.{% else %}
Test figures of round {{ shown_round }}, {{ shown_how }}.
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

<section><h2>Hospitals</h2>
<p class="note">{{ "How the images were divided: " ~ scheme ~ "." if scheme else
 "How the images were divided was not recorded: a federation of real hospitals doesn't tell." }}
{% if bars_left_out %}The chart shows the first hospitals; the table has
 {{ bars_left_out }} more.{% endif %}</p>
{% if class_bars %}<div class="charts">{{ chart(class_bars, "wide") }}</div>{% endif %}
{% if hospitals %}
<div class="table"><table class="broad"><caption>Size of each hospital{{
 " and privacy spent" if show_spent else "" }}</caption>
<thead><tr><th scope="col">Hospital</th><th scope="col">Training images</th>
<th scope="col">Validation images</th><th scope="col">Share of training</th>
<th scope="col">Classes present</th>
{% if show_spent %}<th scope="col">ε spent</th><th scope="col">by PRV</th>
<th scope="col">by PLD</th>{% endif %}</tr></thead><tbody>
{% for row in hospitals %}
<tr><th scope="row">{{ row.name }}</th><td>{{ row.train|whole }}</td><td>{{ row.val|whole }}</td>
<td>{{ row.share|percent }}</td><td>{{ row.classes or missing }}</td>
{% if show_spent %}<td>{{ row.epsilon|epsilon }}</td><td>{{ row.prv|epsilon }}</td>
<td>{{ row.pld|epsilon }}</td>{% endif %}</tr>
{% endfor %}
</tbody><tfoot><tr><th scope="row">All</th><td>{{ hospital_totals.train|whole }}</td>
<td>{{ hospital_totals.val|whole }}</td><td></td><td></td>
{% if show_spent %}<td></td><td></td><td></td>{% endif %}</tr></tfoot></table></div>
{% endif %}
</section>

<section><h2>Participation</h2>
<p class="note">{% if participation %}● contributed, &times; dropped, ? expected but unaccounted
 for, &ndash; not expected.{% else %}No round recorded who took part.{% endif %}</p>
{% for block in matrix %}
<div class="table"><table class="matrix"><caption>Who took part, rounds
 {{ block.labels[0] }} to {{ block.labels[-1] }}</caption>
<thead><tr><th scope="col">Hospital</th>
{% for label in block.labels %}<th scope="col">{{ label }}</th>{% endfor %}</tr></thead><tbody>
{% for name, cells in block.rows %}
<tr><th scope="row">{{ name }}</th>
{% for kind, mark, meaning in cells %}<td class="{{ kind }}"><span aria-hidden="true">
{{- mark }}</span><span class="vh">{{ meaning }}</span></td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% if participation %}
<div class="table"><table><caption>Rounds: expected, contributed, dropped</caption>
<thead><tr><th scope="col">Round</th><th scope="col" class="left">Status</th>
<th scope="col">Expected</th><th scope="col">Contributed</th>
<th scope="col" class="left">Dropped: hospital, stage, reason</th>
<th scope="col">Time</th></tr></thead><tbody>
{% for row in participation %}
<tr><th scope="row">{{ row.label }}</th>
<td class="left"><span class="badge {{ row.kind }}">{{ row.status }}</span></td>
<td>{{ row.expected|whole }}</td><td>{{ row.contributed|whole }}</td><td class="text left"><ul>
{% for drop in row.dropped %}
<li>{{ drop.hospital }}, at <em>{{ drop.stage }}</em>: {{ drop.reason }}</li>
{% endfor %}
{% for name in row.silent %}
<li><strong>{{ name }}: expected, but neither contributed nor recorded as dropped</strong></li>
{% endfor %}
{% if not row.dropped and not row.silent %}<li>{{ missing }}</li>{% endif %}
</ul></td><td>{{ row.seconds|duration }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>

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
<li>One run is one draw of training's chance: repeat it before you compare methods.
{% if interval %}The interval of the accuracy covers the choice of test images only.{% endif %}</li>
<li>{{ "The best round is the one of the best validation accuracy; the test images had no say."
 if by_validation else "How the round shown was chosen isn't clear from the files: if it was by "
 "its test figures, they flatter the model." }}</li>
{% if small_classes %}<li>Fewer than {{ small_class }} test images stand behind each of these
 classes, so their figures are rough: {{ small_classes|join(", ") }}.</li>{% endif %}
{% if private %}
<li>ε and δ bound what the weights and the hospitals' figures tell about one {{ privacy_unit }}.
{% if privacy_unit == "image" %}A patient with several images at a hospital is protected less.
{% endif %}Trials of other settings on the same images add to the loss.</li>
<li>Validation figures and the number of images come from the hospitals with noise; so does the
 choice of the best round.</li>
{% else %}
<li>Without differential privacy, the model may have memorised single images; treat it with the
 care due to the images themselves.</li>
{% endif %}
<li>{{ "Secure aggregation hides a hospital's update from a server that keeps to the protocol, as "
 "long as fewer hospitals than its threshold collude." if secagg else
 "Nothing recorded says that single hospitals' updates were hidden from the server." }}</li>
{% if synthetic %}<li>The images are synthetic: nothing here carries over to patients.</li>
{% else %}<li>A test set from one source doesn't show how the model does at another hospital, on
 another scanner, or for another population.</li>{% endif %}
<li>This is a research result, not a medical device: no one should be treated by it.</li>
</ul>
</section>
<footer class="note">Made by consilium from the files of the run directory alone;
 the same files give the same report. It asks for nothing from the network.</footer>
</main></body>
</html>
"""
