"""The words of a fedavg run's page; the frame is in :mod:`server_app.reporting.page`."""

from __future__ import annotations

from server_app.reporting import page

SECAGG = {
    True: "Secure aggregation on: the server saw sums only.",
    False: "Secure aggregation off: the server saw each hospital's update.",
    None: "Whether aggregation was secure is not recorded.",
}


def render(view: dict[str, object]) -> str:
    """Return the page of what :func:`server_app.reporting.fedavg.view` found."""
    return page.render(TEMPLATE, {**view, "secagg_words": SECAGG})


TEMPLATE = """\
{% extends "frame" %}
{% from "macros" import banner, card, chart %}
{% block lead %}
<p class="lead">Federated training of an image classifier: what was trained and by whom,
 how well it works, and what it may have revealed.</p>
{% endblock %}
{% block unprotected %}
{% for name, why in defence.named %}
{{ banner("bad", name ~ " harmed the model.", "The run left it out: " ~ why ~ ".") }}
{% endfor %}
{% if defence.suspected %}
{{ banner("warn", "Suspected by the hospitals' own figures: " ~ defence.suspected|join(", ") ~ ".",
 "Nobody was left out for it: a hospital that lies can turn such figures against another.") }}
{% endif %}
{% if not private %}
{{ banner("warn", "No differential privacy in this run.", "Nothing bounds what the trained model "
 "may reveal about a single image.") }}
{% endif %}
{% endblock %}
{% block content %}
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
{% if against %}Noise is shared among the hospitals; ε against {{ against }}.{% endif %}
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

{% include "classes" %}

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

{% if defence.watched %}
<section><h2>Hospitals that lie</h2>
<p class="note">Watched on the opened sums alone. {% if defence.in_halves %}Sums were taken over two
 disjoint halves in {{ defence.in_halves }} round{{ "" if defence.in_halves == 1 else "s" }}.
{% endif %}{% if not defence.events %}Nothing was set aside, nothing rolled back.{% endif %}</p>
{% if defence.events %}
<div class="table"><table><caption>What was set aside or rolled back, and who was named</caption>
<thead><tr><th scope="col">Round</th><th scope="col" class="left">What</th>
<th scope="col" class="left">Whom it is about</th><th scope="col" class="left">Why</th>
</tr></thead><tbody>
{% for event in defence.events %}
<tr><th scope="row">{{ event.round|whole }}</th><td class="text left">{{ event.what }}</td>
<td class="text left">{{ event.whom }}</td><td class="text left">{{ event.why }}</td></tr>
{% endfor %}
</tbody></table></div>
{% endif %}
</section>
{% endif %}
{% endblock %}
{% block limits %}
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
{% endblock %}
"""
